"""Our float32 logits, loss and gradients equal those of `transformers`.

`python tests/models/test_parity.py` writes the golden logits anew, from
`transformers`, for the machines where torch is not installed.
"""

import functools
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest
import transformers

if __name__ == '__main__':
  sys.path[:0] = [str(path) for path in pathlib.Path(__file__).parents[1:3]]

import support

from tuner.models import families, hub, policy, weights
from tuner.objectives import sft

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'logits.npz'
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
T = 24
KEPT = 2  # Golden logits of each row's last tokens: all others lead to them.
SMALL = dict(vocab_size=64)
# Not the pad token, whose embedding gets no gradient in torch.
TOKENS = np.random.default_rng(0).integers(3, 64, (2, T))


def rope(kind, **keys):
  """Both spellings at once would hide which one was read: the newer alone."""
  rope = {'rope_type': kind, 'rope_theta': 10000.0, **keys}
  return dict(rope_parameters=rope, rope_theta=None)


LLAMA3 = dict(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
MISTRAL = dict(model_type='mistral', architectures=['MistralForCausalLM'])
# A key that is None is left out of config.json; 'null' is written as null.
CASES = {
  'tied': {},
  'untied': dict(tie_word_embeddings=False),
  'mha': dict(num_key_value_heads=4),
  'mha_by_default': dict(num_key_value_heads=None),
  'mqa': dict(num_key_value_heads=1),
  'biases': dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
  'wide_heads': dict(head_dim=12, num_key_value_heads=1),
  'heads_by_default': dict(head_dim=None),
  'eps': dict(rms_norm_eps=0.5),
  'theta': dict(rope_parameters=None, rope_theta=500.0),
  'linear': rope('linear', factor=3.0),
  'dynamic_within': rope('dynamic', factor=4.0),
  'dynamic_beyond': rope('dynamic', factor=4.0)
  | {'max_position_embeddings': 9},
  'dynamic_original': rope(
    'dynamic', factor=4.0, original_max_position_embeddings=9
  ),
  'llama3': rope('llama3', **LLAMA3),
  'old_linear': dict(
    rope_parameters=None, rope_scaling={'type': 'linear', 'factor': 3.0}
  ),
  'old_llama3': dict(
    rope_parameters=None,
    rope_theta=500000.0,
    rope_scaling={'rope_type': 'llama3', **LLAMA3},
  ),
  'theta_in_scaling': dict(
    rope_parameters=None,
    rope_theta=None,
    rope_scaling={'rope_type': 'linear', 'factor': 3.0, 'rope_theta': 500.0},
  ),
  'window_shorter': MISTRAL | {'sliding_window': 7},
  'window_longer': MISTRAL | {'sliding_window': 100},
  'window_null': MISTRAL | {'sliding_window': 'null'},
  'bfloat16': dict(dtype='bfloat16'),
}


def write_case(path, name):
  """The random model directory of a case; the same seed for all."""
  values = support.write_model(path, **SMALL, **CASES[name])
  # With norms of 5 the float32 rounding of transformers itself, against its
  # own float64, is 1e-4.
  values = {k: v / 4 if 'norm' in k else v for k, v in values.items()}
  config = json.loads((path / 'config.json').read_text())
  config = {k: v for k, v in config.items() if v is not None}
  config = {k: None if v == 'null' else v for k, v in config.items()}
  (path / 'config.json').write_text(json.dumps(config))
  dtype = config.get('dtype', 'float32')
  hub.write(path, hub.declare(path), values.__getitem__, dtype)


@functools.cache
def ours(name):
  """(logits, the sum of the weights' sizes) of a case by this package."""
  with tempfile.TemporaryDirectory() as folder:
    write_case(pathlib.Path(folder), name)
    model, values = support.load_model(pathlib.Path(folder))
  filled = weights.fill(model, values)
  logits = support.logits(filled, TOKENS)
  return np.asarray(logits), sum(np.abs(x).sum() for x in values.values())


def theirs(path):
  """The model of a directory as `transformers` loads it, in float32."""
  import torch

  torch.set_num_threads(1)  # Several spin while they wait for a core.
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )


def their_logits(path, tokens):
  import torch

  with torch.no_grad():
    return theirs(path)(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize('name', CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
  write_case(tmp_path, name)
  expected = their_logits(tmp_path, TOKENS)
  np.testing.assert_allclose(ours(name)[0], expected, **TOLERANCE)


@pytest.mark.parametrize('name', CASES)
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
    logits[:, -KEPT:],
    expected,
    **TOLERANCE,
    err_msg=f'{name}: the forward pass no longer equals that of transformers. '
    f'If test_logits_equal_those_of_transformers passes, the golden logits '
    f'are out of date. {again}',
  )


@pytest.mark.parametrize(
  'name',
  ['heads_by_default', 'dynamic_within', 'dynamic_original']
  + ['window_longer', 'window_null'],
)
def test_keys_without_effect_change_nothing(name):
  np.testing.assert_array_equal(ours(name)[0], ours('tied')[0])


@pytest.mark.parametrize(
  'name',
  ['eps', 'theta', 'linear', 'dynamic_beyond', 'llama3', 'old_linear']
  + ['old_llama3', 'theta_in_scaling', 'window_shorter', 'bfloat16'],
)
def test_keys_with_an_effect_change_the_logits(name):
  """Otherwise both sides could agree by not reading the key."""
  assert np.abs(ours(name)[0] - ours('tied')[0]).max() > 0.005


def test_mistral_defaults_are_those_of_transformers():
  """A config.json may leave them out, and transformers reads them so."""
  config = {**support.LLAMA, 'model_type': 'mistral'}
  for key in ('num_key_value_heads', 'head_dim', 'tie_word_embeddings'):
    config.pop(key)
  expected = transformers.MistralConfig.from_dict(config)
  found = families.decoder_of(config).config
  assert found.layers[0].window == expected.sliding_window == 4096
  assert found.K == expected.num_key_value_heads
  assert found.H == expected.head_dim
  assert found.tied == expected.tie_word_embeddings


@pytest.mark.parity
@pytest.mark.parametrize('name', ['tied', 'biases'])
def test_loss_and_gradients_equal_those_of_torch(name, tmp_path):
  """Mean NLL of the masked tokens, and its gradient for every weight."""
  write_case(tmp_path, name)
  batch = support.pack([[(row, 9)] for row in TOKENS], T)
  model, values = support.load_model(tmp_path)

  @jax.value_and_grad
  def loss(values):
    tuned = policy.Policy(weights.fill(model, values), chunk=16)
    loss_sum, weight, _ = sft.sft(tuned, None, batch)
    return loss_sum / weight

  own_loss, own = jax.jit(loss, compiler_options=support.QUICK)(values)
  their_loss, expected = their_gradients(tmp_path, TOKENS, batch['mask'])
  np.testing.assert_allclose(own_loss, their_loss, **TOLERANCE)
  seen = set()
  for row in weights.rows(model).values():
    value = np.asarray(own[row.path])
    for key, grad in hub.hf_tensors(row, value, model.config.sizes):
      np.testing.assert_allclose(grad, expected[key], **TOLERANCE, err_msg=key)
      assert np.abs(grad).max() > 1e-3, f'{key}: nothing was compared'
      seen.add(key)
  assert seen == expected.keys()


def their_gradients(path, tokens, mask):
  """(loss, gradient by name) by torch's autograd."""
  import torch

  model = theirs(path)
  logits = model(torch.from_numpy(tokens)).logits[:, :-1]
  targets = torch.from_numpy(tokens)[:, 1:, None]
  picked = torch.log_softmax(logits, -1).gather(-1, targets)[..., 0]
  wanted = torch.from_numpy(mask)[:, 1:]
  loss = -(picked * wanted).sum() / wanted.sum()
  loss.backward()
  grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
  return loss.item(), grads


def write_golden():
  """Writes GOLDEN from `transformers`."""
  arrays = {}
  for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      write_case(path, name)
      logits = their_logits(path, TOKENS)
      arrays[name] = logits[:, -KEPT:]
      arrays[f'{name}.weights'] = ours(name)[1]
  GOLDEN.parent.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN, **arrays)
  print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
  write_golden()
