"""Mixtures of experts equal those of `transformers`.

`python tests/models/test_moe.py` writes the golden logits anew, from
`transformers`, for the machines where torch is not installed.
"""

import functools
import json
import pathlib
import sys
import tempfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

if __name__ == '__main__':
  sys.path[:0] = [str(path) for path in pathlib.Path(__file__).parents[1:3]]

import moe_cases
import parity
import support

from tuner.models import families, hub, linear, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'moe.npz'
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
KEPT, T = 2, 24


@functools.cache
def ours(name):
  """(logits, the sum of the weights' sizes) of a case by this package.

  Operation by operation; the gradients' cases are compiled.
  """
  model, values = moe_cases.load_case(name)
  with jax.disable_jit():
    logits = support.logits(weights.fill(model, values), moe_cases.TOKENS)
  return np.asarray(logits), sum(np.abs(x).sum() for x in values.values())


def their_logits(path):
  import torch

  with torch.no_grad():
    return parity.load_theirs(path)(
      torch.from_numpy(moe_cases.TOKENS)
    ).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize('name', moe_cases.CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
  moe_cases.write_case(tmp_path, name)
  np.testing.assert_allclose(ours(name)[0], their_logits(tmp_path), **TOLERANCE)


@pytest.mark.parametrize('name', moe_cases.CASES)
def test_logits_equal_the_golden_ones(name):
  """Where torch is not installed: what transformers gave when it was."""
  with np.load(GOLDEN) as golden:
    expected, weight = golden[name], golden[f'{name}.weights']
  again = (
    f'Where torch is installed run {pathlib.Path(__file__).name} as a script '
    'to write them anew from transformers, and commit them.'
  )
  logits, own_weight = ours(name)
  np.testing.assert_allclose(
    own_weight, weight, 1e-6, err_msg=f'The random weights changed. {again}'
  )
  np.testing.assert_allclose(
    logits[:, -KEPT:], expected, **TOLERANCE, err_msg=again
  )


@pytest.mark.parametrize(
  'name, other',
  [
    ('mixtral_windows', 'mixtral'),
    ('qwen2_moe_windows', 'qwen2_moe'),
    ('qwen3_moe_windows', 'qwen3_moe'),
    ('gpt_oss_long_windows', 'gpt_oss'),
    ('gpt_oss_plain_rope', 'gpt_oss'),
    ('deepseek_v3_yarn', 'deepseek_v3'),
  ],
)
def test_keys_with_an_effect_change_the_logits(name, other):
  """Otherwise both sides could agree by not reading the key."""
  assert np.abs(ours(name)[0] - ours(other)[0]).max() > 0.005


def test_a_window_longer_than_the_text_changes_nothing():
  long, none = ours('mixtral_long_windows')[0], ours('mixtral')[0]
  np.testing.assert_array_equal(long, none)


@pytest.mark.parity
@pytest.mark.parametrize('name', moe_cases.FAMILIES)
def test_loss_and_gradients_equal_those_of_torch(name, tmp_path):
  """Mean NLL of the masked tokens and, where transformers has it, balance."""
  moe_cases.write_case(tmp_path, name)
  balance = 0.0 if name == 'deepseek_v3' else 0.5
  batch = support.pack([[(row, 9)] for row in moe_cases.TOKENS], T)
  model, values = support.load_model(tmp_path)
  own_loss, own = moe_cases.loss_and_gradients(model, values, batch, balance)
  loss, expected = their_gradients(tmp_path, batch['mask'], balance)
  np.testing.assert_allclose(own_loss, loss, **TOLERANCE)
  untrained = {'e_score_correction_bias'}
  seen = set()
  for row in weights.rows(model).values():
    grads = np.asarray(own[row.path])
    for key, grad in hub.hf_tensors(row, grads, model.config.sizes):
      seen.add(key)
      if key.rpartition('.')[2] in untrained:
        assert not grad.any()
        continue
      parity.assert_gradient(grad, expected[key], key)
    if row.path.rpartition('.')[2] != 'correction':
      assert np.abs(grads).max() > 1e-4, f'{row.path}: nothing was compared'
  assert seen == expected.keys()


def their_gradients(path, mask, balance):
  """(loss, gradients by name on disk) by torch's autograd."""
  import torch

  model = parity.load_theirs(path)
  out = model(
    torch.from_numpy(moe_cases.TOKENS), output_router_logits=balance > 0
  )
  targets = torch.from_numpy(moe_cases.TOKENS)[:, 1:, None]
  logprobs = torch.log_softmax(out.logits[:, :-1], -1)
  wanted = torch.from_numpy(mask)[:, 1:]
  loss = -(logprobs.gather(-1, targets)[..., 0] * wanted).sum() / wanted.sum()
  if balance:
    loss = loss + balance * out.aux_loss
  loss.backward()
  with torch.no_grad():  # Saved as weights, they get the names on disk.
    for param in model.parameters():
      param.copy_(param.grad)
  model.save_pretrained(path / 'gradients')
  file = path / 'gradients' / 'model.safetensors'
  return loss.item(), safetensors.numpy.load_file(file)


@pytest.mark.parametrize('name', moe_cases.FAMILIES)
def test_load_then_export_is_the_identity(name, tmp_path):
  moe_cases.write_case(tmp_path, name)
  model, values = support.load_model(tmp_path)
  (tmp_path / 'again').mkdir()
  hub.write(tmp_path / 'again', model, values.__getitem__)
  same_files(tmp_path, tmp_path / 'again')


def test_a_correction_stays_float32_in_a_bfloat16_model(tmp_path):
  """On the disk, in memory, in what is computed with; to the bit."""
  moe_cases.write_case(tmp_path, 'deepseek_v3')
  model, exact = support.load_model(tmp_path)
  rows = weights.rows(model)
  kept = {path for path, row in rows.items() if row.kept_in}
  assert kept == {'blocks.1.mlp.correction'}
  values = linear.cast(exact, 'bfloat16', rows)
  for folder in (tmp_path / 'once', tmp_path / 'twice'):
    folder.mkdir()
    (folder / 'config.json').write_bytes(
      (tmp_path / 'config.json').read_bytes()
    )
    hub.write(folder, model, values.__getitem__, 'bfloat16')
    values = hub.load(folder, model, dtype='bfloat16')
    for path, value in values.items():
      kind = np.float32 if path in kept else ml_dtypes.bfloat16
      assert value.dtype == kind, path
      np.testing.assert_array_equal(value, exact[path].astype(kind))
  same_files(tmp_path / 'once', tmp_path / 'twice')


@pytest.mark.parity
@pytest.mark.parametrize('name', moe_cases.FAMILIES)
def test_transformers_writes_the_same_tensors(name, tmp_path):
  moe_cases.write_case(tmp_path, name)
  parity.load_theirs(tmp_path).save_pretrained(tmp_path / 'theirs')
  same_files(tmp_path, tmp_path / 'theirs')
  config = hub.declare(tmp_path / 'theirs').config
  assert config == hub.declare(tmp_path).config


def test_layers_that_predict_further_are_passed_over(tmp_path):
  """Exactly these: the model has two layers, so that theirs is the third."""
  moe_cases.write_case(tmp_path, 'deepseek_v3')
  file, config = tmp_path / 'model.safetensors', tmp_path / 'config.json'
  tensors = safetensors.numpy.load_file(file)
  tensors['model.layers.2.eh_proj.weight'] = np.ones((1, 2), np.float32)
  safetensors.numpy.save_file(tensors, file)
  said = json.loads(config.read_text()) | {'num_nextn_predict_layers': 1}
  config.write_text(json.dumps(said))
  model, values = support.load_model(tmp_path)
  assert values.keys() == weights.rows(model).keys()
  written = hub.written_config(said, 'float32')
  assert written['num_nextn_predict_layers'] == 0
  config.write_text(json.dumps(written))
  with pytest.raises(ValueError, match='layers.2.eh_proj.weight is there, and'):
    support.load_model(tmp_path)
  config.write_text(json.dumps(said))
  tensors['model.layers.20.eh_proj.weight'] = np.ones((1, 2), np.float32)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match='1 tensors do not fit') as error:
    support.load_model(tmp_path)
  assert 'model.layers.20.eh_proj.weight is there' in str(error.value)


def same_files(one, other):
  a, b = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (one, other)
  )
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('mixtral', dict(router_jitter_noise=0.1), 'router_jitter_noise: 0.1'),
    ('qwen3_moe', dict(num_local_experts=4), 'num_local_experts is 4'),
    ('deepseek_v3', dict(norm_topk_prob=False), 'norm_topk_prob: False'),
    ('deepseek_v3', dict(scoring_func='softmax'), "scoring_func: 'softmax'"),
    ('deepseek_v3', dict(n_group=3), 'n_group: 3'),
    ('deepseek_v3', dict(attention_bias=True), 'attention_bias: True'),
    ('gpt_oss', dict(layer_types=['full_attention']), 'layer_types has 1'),
  ],
)
def test_what_a_family_does_not_do_is_refused(name, changes, message):
  with pytest.raises(ValueError, match=f'config.json: .*{message}'):
    families.decoder_of({**moe_cases.FAMILIES[name], **changes})


PUBLISHED = {  # Parameters, in 10^9: what differs from the defaults.
  'mixtral': (46.7, dict(intermediate_size=14336, vocab_size=32000)),
  'qwen3_moe': (
    30.5,
    dict(
      hidden_size=2048,
      num_hidden_layers=48,
      vocab_size=151936,
      head_dim=128,
      num_key_value_heads=4,
    ),
  ),
  'qwen2_moe': (
    14.3,
    dict(
      hidden_size=2048,
      num_hidden_layers=24,
      num_attention_heads=16,
      vocab_size=151936,
    ),
  ),
  'gpt_oss': (
    20.9,
    dict(
      hidden_size=2880,
      intermediate_size=2880,
      num_hidden_layers=24,
      num_attention_heads=64,
      vocab_size=201088,
      num_local_experts=32,
    ),
  ),
  'deepseek_v3': (
    671.0,
    dict(
      hidden_size=7168,
      intermediate_size=18432,
      num_hidden_layers=61,
      num_attention_heads=128,
      vocab_size=129280,
    ),
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_models_are_as_large_as_published(name):
  """Nothing is allocated: what is declared is counted."""
  expected, changes = PUBLISHED[name]
  usual = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
  config = {**moe_cases.COMMON, 'model_type': name, **usual, **changes}
  if 'num_key_value_heads' not in changes:
    del config['num_key_value_heads']
  model = families.decoder_of(config)
  found = weights.count(weights.rows(model), model.config.sizes)
  assert round(found / 1e9, 1) == expected


@pytest.mark.parity
@pytest.mark.parametrize('name', moe_cases.FAMILIES)
def test_defaults_are_those_of_transformers(name):
  """A config.json may leave keys out, and transformers reads them so."""
  needed = set(moe_cases.COMMON) - {
    'num_key_value_heads',
    'rope_theta',
    'tie_word_embeddings',
  }
  short = {k: moe_cases.FAMILIES[name][k] for k in {*needed, 'model_type'}}
  kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
  whole = kind.from_dict(short).to_dict()
  own, full = (families.decoder_of(c).config for c in (short, whole))
  assert own == full and own.ignored == full.ignored


def write_golden():
  """Writes GOLDEN from `transformers`."""
  arrays = {}
  for name in moe_cases.CASES:
    with tempfile.TemporaryDirectory() as folder:
      moe_cases.write_case(pathlib.Path(folder), name)
      arrays[name] = their_logits(pathlib.Path(folder))[:, -KEPT:]
      arrays[f'{name}.weights'] = ours(name)[1]
  np.savez_compressed(GOLDEN, **arrays)
  print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
  write_golden()
