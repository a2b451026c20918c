"""`peft` reads what is written here, and its own adapters go on here."""

import json
import warnings

import numpy as np
import pytest
import safetensors.numpy
import small

from tuner import adapt
from tuner.models import weights

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('quick_compiles')]

CLOSE = dict(rtol=1e-4, atol=1e-4)
OURS = {
  'fused': ('phi3', 'dora', {}),
  'one_body': ('gemma3', 'lora', dict(targets=['blocks.0.attention.q', 'up'])),
  'rslora_saved': (
    'untied',
    'lora',
    dict(scaling='rslora', rank=5, alpha=4.0)
    | dict(modules_to_save=['lm_head', 'norm', 'input_layernorm']),
  ),
  'dora_saved_biases': (
    'qwen2',
    'dora',
    dict(scaling='rslora', targets=['q', 'k', 'o', 'gate', 'up', 'down'])
    | dict(modules_to_save=['v_proj', 'embed']),
  ),
  'dora_saved_tied': ('tied', 'dora', dict(modules_to_save=['lm_head'])),
  'mixtral': ('mixtral', 'lora', dict(targets=['all', 'experts', 'router'])),
  'gate_alone': ('mixtral', 'lora', dict(targets=['q', 'w1'])),
  'saved_router': (
    'mixtral',
    'lora',
    dict(targets='down', modules_to_save=['router', 'norm']),
  ),
  'experts_rs': (
    'qwen3_moe',
    'lora',
    dict(targets=['q', 'experts'], scaling='rslora'),
  ),
  'down_alone': (
    'qwen2_moe',
    'lora',
    dict(targets=['all', 'experts.down_proj', 'shared_expert_gate']),
  ),
  'gpt_oss': ('gpt_oss', 'lora', dict(targets=['q', 'experts', 'router'])),
}
# peft adapts gate and up as one; what had one of them goes on with both.
SHARED = ('gate_alone',)


def ours(base, kind, kwargs):
  """(model, weights, adaptation, a tree that changes the model)."""
  model, values = small.load(base)
  kwargs = {'rank': 3, 'alpha': 6.0, **kwargs}
  if kwargs.get('targets', ())[:1] == ['all']:
    every = adapt.lora(weights.rows(model)).targets
    kwargs['targets'] = [*every, *kwargs['targets'][1:]]
  adaptation = getattr(adapt, kind)(weights.rows(model), **kwargs)
  return model, values, adaptation, small.factors(model, adaptation, values)


def by_peft(base, path):
  """Logits of base and adapter; every tensor of the file must be used."""
  import peft

  with warnings.catch_warnings():
    warnings.filterwarnings('error', message='.*missing adapter keys.*')
    warnings.filterwarnings('error', message='.*unexpected.*')
    model = peft.PeftModel.from_pretrained(small.torch_base(base), path)
  stored = safetensors.numpy.load_file(path / 'adapter_model.safetensors')
  saved = peft.get_peft_model_state_dict(model)
  assert set(saved) == set(stored)
  for name, tensor in stored.items():
    np.testing.assert_array_equal(saved[name].numpy(), tensor, err_msg=name)
  return small.torch_logits(model)


@pytest.mark.parametrize('name', OURS)
def test_ours_by_peft_and_back(bases, tmp_path, name):
  """peft's logits are ours; read again, every bit is what was written."""
  family, kind, kwargs = OURS[name]
  base = bases(family)
  model, values, adaptation, trainable = ours(base, kind, kwargs)
  path = tmp_path / 'adapter'
  small.write_adapter(path, base, model, adaptation, trainable)
  expected = small.logits(model, adaptation.attach(values, trainable))
  assert np.abs(expected - small.base_logits(base)).max() > 0.01
  np.testing.assert_allclose(by_peft(base, path), expected, **CLOSE)
  again = small.read_adapter(path, base, model)
  if name in SHARED:
    found = small.logits(model, again.attach(values, again.given))
    np.testing.assert_allclose(found, expected, **CLOSE)
    return
  assert again.given.keys() == trainable.keys()
  for key, value in trainable.items():
    np.testing.assert_array_equal(again.given[key], value, err_msg=key)
  assert again.saved == adaptation.saved
  for key in adaptation.targets:
    scales = (x.sizes[key].scales(x.scaling) for x in (again, adaptation))
    np.testing.assert_allclose(*scales, rtol=1e-12)


PEFT = {
  'dora_layers': (
    'untied',
    dict(target_modules=r'.*\.(0|2)\.self_attn\.[qv]_proj', use_dora=True),
  ),
  'patterns': (
    'untied',
    dict(
      target_modules=['q_proj', 'k_proj', 'up_proj'],
      rank_pattern={'layers.1.self_attn.q_proj': 5, 'up_proj': 2},
      alpha_pattern={'k_proj': 9},
    ),
  ),
  'layers': (
    'gemma3',
    dict(target_modules=['o_proj', 'gate_proj'], layers_to_transform=[1]),
  ),
  'excluded': (
    'phi3',
    dict(target_modules='all-linear', exclude_modules=['down_proj']),
  ),
  'rslora': (
    'qwen2',
    dict(
      target_modules=['q_proj'],
      use_rslora=True,
      use_dora=True,
      modules_to_save=['lm_head', 'up_proj'],
    ),
  ),
  'saved_tied': (
    'tied',
    dict(
      target_modules='all-linear',
      modules_to_save=['embed_tokens'],
      ensure_weight_tying=True,
    ),
  ),
  'mixtral': ('mixtral', dict(target_modules='all-linear')),
  'experts': (
    'qwen3_moe',
    dict(
      target_modules=['q_proj'],
      target_parameters=['experts.gate_up_proj', 'experts.down_proj'],
    ),
  ),
  'gpt_oss': (
    'gpt_oss',
    dict(target_modules=['k_proj'], target_parameters=['experts.gate_up_proj']),
  ),
}
# gate and up share lora_A there, and get each a copy of it here.
GROWN = ('experts', 'mixtral')


def made_by_peft(base, path, kwargs):
  """A random adapter saved by `peft`; returns its logits."""
  import peft
  import torch

  torch.manual_seed(0)
  config = peft.LoraConfig(r=3, lora_alpha=6, task_type='CAUSAL_LM', **kwargs)
  model = peft.get_peft_model(small.torch_base(base), config)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'magnitude' in name or 'modules_to_save' in name:
        weight.mul_(1 + 0.1 * torch.randn_like(weight))
      elif 'lora_' in name:
        weight.copy_(0.1 * torch.randn_like(weight))
  model.save_pretrained(path)
  return small.torch_logits(model)


@pytest.mark.parametrize('name', PEFT)
def test_theirs_goes_on_here_and_back(bases, tmp_path, name):
  family, kwargs = PEFT[name]
  base = bases(family)
  expected = made_by_peft(base, tmp_path / 'theirs', kwargs)
  model, values = small.load(base)
  adaptation = small.read_adapter(tmp_path / 'theirs', base, model)
  found = small.logits(model, adaptation.attach(values, adaptation.given))
  assert np.abs(expected - small.base_logits(base)).max() > 0.01
  np.testing.assert_allclose(found, expected, **CLOSE)
  back = tmp_path / 'back'
  small.write_adapter(back, base, model, adaptation, adaptation.given)
  np.testing.assert_allclose(by_peft(base, back), expected, **CLOSE)
  if name not in GROWN:
    ways = (tmp_path / 'theirs', back)
    files = (
      safetensors.numpy.load_file(way / 'adapter_model.safetensors')
      for way in ways
    )
    stored, written = files
    assert stored.keys() == written.keys()
    for key, tensor in stored.items():
      np.testing.assert_array_equal(tensor, written[key], err_msg=key)


def legacy_tensors(adaptation, model, tree):
  """The adapter of experts as `transformers` 4 had them: a Linear each."""
  found = {}
  for path in adaptation.targets:
    row = adaptation.rows[path]
    for (layer, expert), name in row.names(model.config.sizes).items():
      start = f'base_model.model.{name.removesuffix(".weight")}'
      a, b = (np.asarray(tree[f'{path}.{k}'][layer, expert]) for k in 'ab')
      found[f'{start}.lora_A.weight'] = a
      found[f'{start}.lora_B.weight'] = np.ascontiguousarray(b.T)
  return found


def test_experts_of_older_transformers(bases, tmp_path):
  """Named one by one; `peft` makes of them what it reads today."""
  base = bases('mixtral')
  made = ours(base, 'lora', dict(targets=['w1', 'w2', 'w3']))
  model, values, adaptation, tree = made
  path = tmp_path / 'adapter'
  config = small.write_adapter(path, base, model, adaptation, tree)
  del config['target_parameters'], config['rank_pattern']
  del config['alpha_pattern']
  config |= {'r': 3, 'lora_alpha': 6, 'target_modules': ['w1', 'w2', 'w3']}
  (path / 'adapter_config.json').write_text(json.dumps(config))
  tensors = legacy_tensors(adaptation, model, tree)
  safetensors.numpy.save_file(tensors, path / 'adapter_model.safetensors')
  import peft

  theirs = peft.PeftModel.from_pretrained(small.torch_base(base), path)
  again = small.read_adapter(path, base, model)
  for key, value in tree.items():
    np.testing.assert_array_equal(again.given[key], value, err_msg=key)
  expected = small.logits(model, again.attach(values, again.given))
  np.testing.assert_allclose(small.torch_logits(theirs), expected, **CLOSE)
