"""Ropes: what a config.json says of them, and texts of several lengths."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner.models import families, rope

BASE = dict(max_position_embeddings=64)
GROWING = {
  'dynamic': rope.Rope(8, kind='dynamic', factor=4.0, original=9),
  'longrope': rope.Rope(
    8, kind='longrope', original=9, short=(1, 1, 1, 1), long=(2, 3, 4, 5)
  ),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=support.QUICK)
def tables(kind, positions_BT, lengths_B=None):
  return rope.tables(GROWING[kind], positions_BT, lengths_B)


@pytest.mark.parametrize('kind', GROWING)
def test_packed_texts_turn_as_each_alone(kind):
  """By the length of their own text, whatever else is in the row or batch."""
  lengths = (5, 12, 9)
  alone = [tables(kind, jnp.arange(length)[None]) for length in lengths]
  row = jnp.concatenate([jnp.arange(length) for length in lengths])
  # Padding has position 0 throughout.
  rows = jnp.stack([jnp.pad(row, (0, 3)), jnp.zeros(len(row) + 3, int)])
  found = tables(kind, rows)
  for part, table in enumerate(found):
    expected = np.concatenate([both[part][0] for both in alone])
    np.testing.assert_allclose(table[0, : len(row)], expected, 1e-6, 1e-6)
  far, near = alone[1][1][0, :5], alone[0][1][0]
  assert np.abs(far - near).max() > 0.01


@pytest.mark.parametrize('kind', GROWING)
def test_a_text_that_is_being_written_turns_by_what_it_may_become(kind):
  """Its first tokens and each later one as in the whole text."""
  whole = tables(kind, jnp.arange(12)[None])
  length = jnp.array([12])
  start = tables(kind, jnp.arange(8)[None], length)
  last = tables(kind, jnp.array([[11]]), length)
  for table, first, end in zip(whole, start, last, strict=True):
    np.testing.assert_allclose(first, table[:, :8], 1e-6, 1e-6)
    np.testing.assert_allclose(end, table[:, 11:], 1e-6, 1e-6)


YARN = dict(rope_type='yarn', factor=4.0)
LONG = dict(rope_type='longrope', **cases.WAVES)
WRONG = [
  (
    dict(rope_parameters=dict(rope_type='mrope')),
    "config.json: rope type 'mrope' is not supported; supported: default, "
    'linear, dynamic, yarn, longrope, llama3.',
  ),
  (
    dict(
      rope_parameters=YARN | dict(mrope_section=[1], llama_4_scaling_beta=1)
    ),
    "config.json: rope of type 'yarn': llama_4_scaling_beta, mrope_section not "
    'known.',
  ),
  (
    dict(rope_scaling=dict(type='llama3', factor=8.0, low_freq_factor=1.0)),
    "config.json: rope of type 'llama3': high_freq_factor missing.",
  ),
  (
    dict(rope_scaling=dict(type='linear')),
    "config.json: rope of type 'linear': factor missing.",
  ),
  (
    dict(rope_scaling=LONG | dict(long_factor=[1, 2])),
    'config.json: long_factor has 2 numbers; 8 channels turn, so it must have '
    '4.',
  ),
  (
    dict(partial_rotary_factor=0.5),
    'config.json: partial_rotary_factor: 0.5; this family knows 1.',
  ),
  (
    dict(rope_theta=5.0, rope_parameters=dict(rope_theta=6.0)),
    'config.json: rope_theta is 5.0 and rope_parameters.rope_theta is 6.0; '
    'they must agree.',
  ),
  (
    dict(rope_parameters=LONG | cases.BEYOND) | cases.WITHIN,
    'config.json: original_max_position_embeddings is 24 and '
    'rope_parameters.original_max_position_embeddings is 23; they must agree.',
  ),
  (
    dict(rope_parameters=YARN, rope_scaling=dict(type='yarn', factor=2.0)),
    "config.json: rope_scaling is {'type': 'yarn', 'factor': 2.0} and "
    "rope_parameters is {'rope_type': 'yarn', 'factor': 4.0}; they must agree.",
  ),
]


@pytest.mark.parametrize('config, message', WRONG)
def test_what_is_not_understood_is_refused(config, message):
  with pytest.raises(ValueError) as error:
    rope.read({**BASE, **config}, 8)
  assert str(error.value) == message


def test_both_spellings_may_stand_if_they_agree():
  old = dict(rope_theta=5.0, rope_scaling=dict(type='yarn', factor=4.0))
  new = dict(rope_parameters=YARN | dict(rope_theta=5.0))
  found = [rope.read({**BASE, **said}, 8) for said in (old, new, old | new)]
  assert found[0] == found[1] == found[2]
  assert found[0].kind == 'yarn' and found[0].theta == 5.0


def family(name, **changes):
  return families.decoder_of({'model_type': name, **cases.SMALL, **changes})


FAMILY_ERRORS = [
  (
    dict(name='llama', num_hidden_layers='two'),
    "config.json: num_hidden_layers: 'two'; wanted: a whole number above 0.",
  ),
  (
    dict(name='llama', hidden_size=-32),
    'config.json: hidden_size: -32; wanted: a whole number above 0.',
  ),
  (
    dict(name='mixtral', num_local_experts=8, num_experts_per_tok=20),
    'config.json: num_experts_per_tok: 20; there are 8 experts.',
  ),
  (
    dict(name='gemma3_text', rope_parameters=YARN),
    'config.json: rope_parameters holds factor, rope_type; for this family it '
    'holds a dict for each of full_attention, sliding_attention.',
  ),
  (
    dict(
      name='gemma3_text', rope_theta=5.0, **cases.ropes(dict(rope_theta=6.0))
    ),
    'config.json: rope_theta is 5.0 and rope_parameters.rope_theta is 6.0; '
    'they must agree.',
  ),
  (
    dict(name='olmo3', rope_theta=5.0),
    'config.json: rope_theta: 5.0; without rope_parameters this family knows '
    '500000.',
  ),
  (
    dict(name='phi3', rope_scaling=dict(type='linear', factor=2.0)),
    "config.json: rope type 'linear'; this family knows default, longrope.",
  ),
  (
    dict(name='llama', sliding_window=5),
    "config.json: sliding_window: 5; the family 'llama' does not read it, so "
    'it must not be there.',
  ),
  (
    dict(name='mistral', attention_bias=True),
    "config.json: attention_bias: True; the family 'mistral' does not read it, "
    'so it must not be there.',
  ),
  (
    dict(name='gemma2', hidden_activation='relu'),
    "config.json: hidden_activation: 'relu'; supported: silu, gelu, "
    'gelu_pytorch_tanh.',
  ),
  (
    dict(name='gemma3_text', attn_logit_softcapping=5.0),
    "config.json: attn_logit_softcapping: 5.0; the family 'gemma3_text' does "
    'not read it, so it must not be there.',
  ),
  (
    dict(name='qwen2', layer_types=['full_attention', 'chunked_attention']),
    'config.json: layer_types holds chunked_attention; supported: '
    'full_attention, sliding_attention.',
  ),
  (
    dict(name='qwen2', layer_types=['full_attention']),
    'config.json: layer_types has 1 entries; num_hidden_layers is 2.',
  ),
  (
    dict(name='qwen3', layer_types=['full_attention', 'sliding_attention']),
    'config.json: layer_types holds sliding_attention, and no sliding_window '
    'is in use.',
  ),
  (
    dict(name='smollm3', no_rope_layers=[1]),
    'config.json: no_rope_layers has 1 entries; num_hidden_layers is 2.',
  ),
  (
    dict(name='qwen3', hidden_act='gelu'),
    "config.json: hidden_act: 'gelu'; this family knows 'silu'.",
  ),
]


@pytest.mark.parametrize('changes, message', FAMILY_ERRORS)
def test_a_family_refuses_what_it_does_not_know(changes, message):
  with pytest.raises(ValueError) as error:
    family(**changes)
  assert str(error.value) == message


def test_su_is_what_longrope_was_called():
  """In the first Phi-3 files, the original length beside the dict."""
  su, new = (
    dict(rope_scaling=dict(type=kind, **cases.WAVES), **cases.BEYOND)
    for kind in ('su', 'longrope')
  )
  found = family('phi3', **su).config
  assert found == family('phi3', **new).config
  assert found.ropes[0].kind == 'longrope' and found.ropes[0].original == 23
  with pytest.raises(ValueError, match="rope type 'su' is not supported"):
    family('llama', **su)


def test_an_unknown_family_is_refused_with_all_that_are_known():
  inner = {'model_type': 'gemma3', 'text_config': {'model_type': 'gemma3_text'}}
  with pytest.raises(ValueError) as error:
    families.decoder_of(inner)
  known = families.known()
  assert set(cases.FAMILIES) <= set(known)
  assert str(error.value) == (
    "config.json: model_type: 'gemma3' is not supported; supported: "
    f'{", ".join(known)}. It holds a text_config of model_type '
    "'gemma3_text': save that part as a model of its own."
  )
