"""Every family's float32 logits, loss and gradients are `transformers`' own.

`python tests/models/test_families.py` writes the golden logits anew, from
`transformers`, for the machines where torch is not installed.
"""

import functools
import pathlib
import sys
import tempfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import transformers

if __name__ == '__main__':
  sys.path[:0] = [str(path) for path in pathlib.Path(__file__).parents[1:3]]

import cases
import parity
import support

from tuner.generate import greedy
from tuner.models import families, hub, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'families.npz'
T = 24
# Not the pad token, whose embedding gets no gradient in torch.
TOKENS = np.random.default_rng(0).integers(3, 64, (2, T))
BATCH = support.pack([[(row, 9)] for row in TOKENS], T)
# Without a rotation, a bias of keys adds the same to all scores of a query.
FLAT = {'smollm3-biases': ('model.layers.3.self_attn.k_proj.bias',)}


# As they run, in scans; the others operation by operation, which is quick.
COMPILED = ('gemma3_text', 'phi3', 'smollm3')


@functools.cache
def ours(name):
  """A case by this package."""
  family, variant = name.split('-')
  is_compiled = variant == 'base' and family in COMPILED
  return parity.ours(cases.CASES[name], BATCH, is_compiled)


@pytest.mark.parity
@pytest.mark.parametrize('name', cases.CASES)
def test_equals_transformers(name, tmp_path):
  parity.write(tmp_path, cases.CASES[name])
  expected = parity.theirs(tmp_path, BATCH)
  parity.assert_equal(ours(name), expected, FLAT.get(name, ()))


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as file:
    places = {name: i for i, name in enumerate(file['names'])}
    logits, sizes = file['logits'], file['sizes']
  return {name: (logits[i], sizes[i]) for name, i in places.items()}


@pytest.mark.parametrize('name', cases.CASES)
def test_last_logits_equal_the_golden_ones(name, golden):
  """Where torch is not installed: what transformers gave when it was."""
  again = (
    f'Where torch is installed run {pathlib.Path(__file__).name} as a script '
    'to write them anew from transformers, and commit them.'
  )
  assert golden.keys() == cases.CASES.keys(), again
  logits, size = golden[name]
  changed = f'The random weights changed. {again}'
  np.testing.assert_allclose(ours(name).size, size, 1e-6, err_msg=changed)
  np.testing.assert_allclose(
    ours(name).logits[:, -1],
    logits,
    **parity.TOLERANCE,
    err_msg=f'If test_equals_transformers passes, the golden logits are out '
    f'of date. {again}',
  )


@pytest.mark.parametrize('name', cases.CASES)
def test_keys_change_the_logits_where_they_mean_something(name):
  """Otherwise both sides could agree by not reading the key."""
  base = f'{name.split("-")[0]}-base'
  difference = np.abs(ours(name).logits - ours(base).logits).max()
  if name in cases.SAME or name == base:
    assert difference < 1e-4
  else:
    assert difference > 0.005


@pytest.mark.parametrize('name', cases.CASES)
def test_config_is_written_for_old_and_new_readers(name):
  """What export writes declares the same model."""
  config = cases.CASES[name]
  again = hub.written_config(config, 'float32')
  found = families.decoder_of(again).config
  assert found == families.decoder_of(config).config


def tensors(path):
  """Every tensor of a directory by name."""
  found = {}
  for file in path.glob('*.safetensors'):
    with safetensors.safe_open(file, 'np') as opened:
      found |= {name: opened.get_tensor(name) for name in opened.keys()}
  return found


ROUND_TRIPS = [f'{family}-base' for family in cases.FAMILIES]
ROUND_TRIPS += ['qwen2-tied', 'gemma2-untied', 'phi3-tied', 'granite-biases']
ROUND_TRIPS += ['gemma3_text-seven_layers', 'smollm3-untied']


@pytest.mark.parity
@pytest.mark.parametrize('name', ROUND_TRIPS)
def test_written_by_transformers_read_and_written_bit_for_bit(name, tmp_path):
  """Its own directory, config.json included, in bfloat16."""
  import torch

  config = transformers.AutoConfig.for_model(**cases.CASES[name])
  model = transformers.AutoModelForCausalLM.from_config(config)
  for param in model.parameters():
    torch.nn.init.normal_(param)
  theirs, own = tmp_path / 'theirs', tmp_path / 'own'
  model.to(torch.bfloat16).save_pretrained(theirs)
  declared = hub.declare(theirs)
  assert declared.config == families.decoder_of(cases.CASES[name]).config
  values = hub.load(theirs, declared, dtype='bfloat16')
  own.mkdir()
  hub.write(own, declared, values.__getitem__, 'bfloat16')
  expected, found = tensors(theirs), tensors(own)
  assert found.keys() == expected.keys()
  for key, tensor in expected.items():
    assert found[key].dtype == tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
      found[key].view(np.uint16), tensor.view(np.uint16), err_msg=key
    )


@pytest.mark.parametrize('family', cases.FAMILIES)
def test_defaults_are_those_of_transformers(family):
  """A config.json may leave keys out, and transformers reads them so."""
  # As many heads as the default of their keys, which must divide them.
  given = cases.REQUIRED | dict(num_attention_heads=32, hidden_size=128)
  given |= dict(model_type=family, num_hidden_layers=30)
  expected = transformers.AutoConfig.for_model(**given)
  found = families.decoder_of(given).config
  assert found.K == expected.num_key_value_heads
  size = getattr(expected, 'head_dim', None) or 128 // 32
  assert found.H == size
  assert found.tied == expected.tie_word_embeddings
  act = getattr(expected, 'hidden_activation', None)
  assert found.activation == (act or expected.hidden_act)
  cap = getattr(expected, 'attn_logit_softcapping', None)
  assert found.attention_cap == cap
  assert found.logit_cap == getattr(expected, 'final_logit_softcapping', None)
  scalar = getattr(expected, 'query_pre_attn_scalar', size)
  scale = getattr(expected, 'attention_multiplier', scalar**-0.5)
  assert found.attention_scale == scale
  assert found.logit_divisor == getattr(expected, 'logits_scaling', 1)
  assert found.residual_scale == getattr(expected, 'residual_multiplier', 1)
  assert [layer.window for layer in found.layers] == their_windows(expected)
  turned = getattr(expected, 'no_rope_layers', [1] * 30)
  assert [layer.rope is not None for layer in found.layers] == list(
    map(bool, turned)
  )
  thetas = {rope.theta for rope in found.ropes}
  said = expected.rope_parameters
  said = said.values() if 'full_attention' in said else [said]
  assert thetas == {rope['rope_theta'] for rope in said}
  assert {rope.kind for rope in found.ropes} == {'default'}


def their_windows(config):
  """How far back each layer looks, by a config of `transformers`."""
  window = getattr(config, 'sliding_window', None)
  types = getattr(config, 'layer_types', None)
  if not types:
    return [window] * config.num_hidden_layers
  return [window if kind == 'sliding_attention' else None for kind in types]


GREEDY = ['gemma2-base', 'smollm3-base', 'phi3-longrope_beyond']


@pytest.mark.parametrize('name', GREEDY)
def test_cached_decoding_is_the_argmax_of_the_full_forward(name, tmp_path):
  """Past the window, through soft-caps, without rotary positions."""
  parity.write(tmp_path, cases.CASES[name])
  model = weights.fill(*support.load_model(tmp_path))
  rng = np.random.default_rng(1)
  # Texts are padded to 64, the model's positions less the answer's.
  prompts = [rng.integers(3, 64, n).tolist() for n in (24, 31, 40)]
  answers = greedy.generate(model, prompts, [-1], 6)
  rows = np.zeros((len(prompts), 46), int)
  for row, prompt, answer in zip(rows, prompts, answers, strict=True):
    row[: len(prompt) + 6] = prompt + answer
  best = np.asarray(support.logits(model, rows)).argmax(-1)
  for row, prompt, answer in zip(best, prompts, answers, strict=True):
    start = len(prompt) - 1
    assert row[start : start + 6].tolist() == answer


def test_a_stretching_rope_goes_by_the_text_and_not_by_its_padding(tmp_path):
  """A short prompt, padded beyond the original length; then beyond it."""
  parity.write(tmp_path, cases.CASES['phi3-longrope_within'])
  model = weights.fill(*support.load_model(tmp_path))
  original = model.config.ropes[0].original
  assert 16 <= original < 40
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, 64, n).tolist() for n in (10, original + 1)]
  answers = greedy.generate(model, prompts, [-1], 6)
  for prompt, answer in zip(prompts, answers, strict=True):
    row = np.array([prompt + answer])
    best = np.asarray(support.logits(model, row)).argmax(-1)[0]
    assert best[len(prompt) - 1 : -1].tolist() == answer


def write_golden():
  """Writes GOLDEN from `transformers`."""
  logits, sizes = [], []
  for config in cases.CASES.values():
    with tempfile.TemporaryDirectory() as folder:
      sizes.append(parity.write(pathlib.Path(folder), config))
      run = parity.theirs(pathlib.Path(folder), BATCH)
      logits.append(run.logits[:, -1])
  np.savez_compressed(
    GOLDEN, names=list(cases.CASES), logits=logits, sizes=sizes
  )
  print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
  write_golden()
