"""In bfloat16, too, the numbers are those of `transformers`.

Both round after every operation, though not all in the same order, so that a
whole pass agrees in the mean; what is rounded where in a norm, and that the
router's correction is not, shows where nothing else is rounded.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import moe_cases
import numpy as np
import parity
import pytest
import safetensors.numpy
import support

from tuner.models import decoder, hub, weights

pytestmark = pytest.mark.parity
EPS = float(jnp.finfo(jnp.bfloat16).eps)  # From 1 to the next: 1 / 128.
TOKENS = moe_cases.TOKENS
NORMS = {'llama': 'own', 'gemma2': 'float32', 'olmo2': 'float32'}


def write(path, name, **changes):
  """A random directory of a case, of either harness."""
  if name in moe_cases.CASES:
    moe_cases.write_case(path, name)
  else:
    parity.write(path, {**cases.CASES[f'{name}-base'], **changes})


def change(path, **changes):
  """The directory with other tensors: an array, or a function of the one."""
  file = path / 'model.safetensors'
  found = safetensors.numpy.load_file(file)
  for key, value in changes.items():
    name = key.replace('__', '.')
    found[name] = value(found[name]) if callable(value) else value
  safetensors.numpy.save_file(found, file)


def ours(path, model, compiled=True):
  """float32 logits of bfloat16's pass, as it runs or step by step."""
  values = hub.load(path, model, dtype='bfloat16')
  with jax.disable_jit(not compiled):
    return np.asarray(support.logits(weights.fill(model, values), TOKENS))


def theirs(path):
  import torch

  model = parity.load_theirs(path, 'bfloat16')
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def assert_near(own, expected):
  """Some forty roundings of up to half an EPS, of either sign."""
  mean = np.abs(own - expected).mean() / np.sqrt(np.square(expected).mean())
  assert 0 < mean < np.sqrt(40) / 2 * EPS / 2, mean / EPS


@pytest.mark.parametrize('name', NORMS)
def test_a_pass_agrees_in_the_mean(name, tmp_path):
  write(tmp_path, name)
  assert_near(ours(tmp_path, hub.declare(tmp_path)), theirs(tmp_path))


def only_a_norm(path, name):
  """A model that is its last norm, of which logits are the channels.

  Its one layer adds nothing: what its parts end with is zero.
  """
  off = dict(num_hidden_layers=1, tie_word_embeddings=False)
  if name == 'gemma2':
    off |= dict(final_logit_softcapping=None, layer_types=['full_attention'])
  write(path, name, **off)
  change(
    path,
    lm_head__weight=np.eye(64, 32, dtype=np.float32),
    model__layers__0__self_attn__o_proj__weight=np.zeros_like,
    model__layers__0__mlp__down_proj__weight=np.zeros_like,
  )


def unlike(own, expected):
  """The share of elements that differ."""
  return (own != expected)[..., :32].mean()


@pytest.mark.parametrize('name', NORMS)
def test_a_norm_rounds_where_theirs_does(name, tmp_path):
  """The same to the bit; rounded elsewhere, many elements differ."""
  only_a_norm(tmp_path, name)
  model, expected = hub.declare(tmp_path), theirs(tmp_path)
  norm = model.config.norm
  assert norm.scaled_in == NORMS[name]
  # The float32 of two libraries may differ by its own rounding.
  own = ours(tmp_path, model, compiled=False)
  np.testing.assert_allclose(own, expected, rtol=EPS)
  assert unlike(own, expected) < 0.01
  other = {'own': 'float32', 'float32': 'own'}[norm.scaled_in]
  norm = dataclasses.replace(norm, scaled_in=other)
  model = decoder.Decoder(dataclasses.replace(model.config, norm=norm))
  assert unlike(ours(tmp_path, model, compiled=False), expected) > 0.1


def test_experts_are_chosen_by_a_float32_correction(tmp_path):
  """bfloat16 has nothing between 64 and 64.5: all would be corrected alike."""
  write(tmp_path, 'deepseek_v3')
  noise = np.random.default_rng(0).standard_normal(8).astype(np.float32)
  name = 'model__layers__1__mlp__gate__e_score_correction_bias'
  change(tmp_path, **{name: 64 + 0.1 * noise})
  expected = theirs(tmp_path)
  own = ours(tmp_path, hub.declare(tmp_path))
  assert_near(own, expected)
  change(tmp_path, **{name: np.full(8, 64, np.float32)})
  rounded = ours(tmp_path, hub.declare(tmp_path))
  with pytest.raises(AssertionError):
    assert_near(rounded, expected)
