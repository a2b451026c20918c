"""Layers as repeating groups: what is scanned, and how often it is compiled."""

import dataclasses

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies

from tuner.models import decoder, families, policy, weights

LAYERS = [decoder.Layer(window=window) for window in (None, 4, 8)]


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.lists(strategies.sampled_from(LAYERS), min_size=1))
def test_segments_cover_the_layers_in_order(layers):
  """Each layer once, in order, in the body that is of its kind."""
  kinds, found = tuple(layers), []
  for segment in decoder.segments(kinds):
    places = [segment.numbers(place) for place in range(segment.period)]
    for numbers in places:
      assert {kinds[number] for number in numbers} == {kinds[numbers[0]]}
    found += [number for group in zip(*places, strict=True) for number in group]
  assert found == list(range(len(kinds)))


@hypothesis.given(
  strategies.lists(strategies.sampled_from(LAYERS), min_size=1, max_size=4),
  strategies.integers(2, 6),
)
def test_repeated_groups_need_no_more_bodies_than_one(group, times):
  segments = decoder.segments(tuple(group) * times)
  assert sum(segment.period for segment in segments) <= len(group)


# Bodies and scans of the real models, by their number of layers.
BODIES = {
  ('llama', 32): (1, 1),
  ('gemma2', 26): (2, 1),
  ('gemma3_text', 26): (7, 2),  # Four groups of six; two more near ones.
  ('smollm3', 36): (4, 1),
  ('olmo3', 32): (4, 1),
}


@pytest.mark.parametrize('family, count', BODIES)
def test_bodies_and_loops_are_few(family, count):
  """Each body is traced once, and each segment is one loop of the program."""
  config = {'model_type': family, **cases.SMALL, 'num_hidden_layers': count}
  model = families.decoder_of(config)
  assert model.config.L == count
  bodies, loops = BODIES[family, count]
  assert len(model.blocks) == bodies

  def hidden(values, tokens):
    filled = weights.fill(model, values)
    batch = {'tokens': tokens, 'segments': jnp.ones_like(tokens)}
    batch['positions'] = jnp.broadcast_to(jnp.arange(8), tokens.shape)
    return policy.Policy(filled).hidden(batch)

  values = {
    path: jax.ShapeDtypeStruct(row.shape(model.config.sizes), jnp.float32)
    for path, row in weights.rows(model).items()
  }
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  lowered = jax.jit(hidden).lower(values, tokens).as_text()
  assert lowered.count('stablehlo.while') == loops


def test_scaling_the_residual_is_not_rounded():
  """bfloat16 would make 0.22 of a residual scale 0.2197."""
  block = families.decoder_of(cases.CASES['granite-base']).blocks[0]
  x = jnp.arange(1, 100, dtype=jnp.bfloat16)[None, None]
  exact = jnp.bfloat16(0.22 * np.arange(1, 100, dtype=np.float32))
  np.testing.assert_array_equal(block._scaled(x)[0, 0], exact)
  assert (x[0, 0] * jnp.bfloat16(0.22) != exact).any()


class Echo(nnx.Module):
  """A layer that says what came into it."""

  def __init__(self, config, layer):
    pass

  def __call__(self, x_BTD, call, layer, memory):
    return x_BTD, memory, x_BTD


def test_gemma_scales_embeddings_by_a_rounded_factor():
  """By sqrt(D) in the embedding's own dtype: 5.6569 is 5.65625 in bfloat16."""
  config = families.decoder_of(cases.CASES['gemma2-base']).config
  layers = (decoder.Layer(block=Echo),)
  model = decoder.Decoder(dataclasses.replace(config, layers=layers))
  rng = np.random.default_rng(0)
  embed = jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16)
  scale = jnp.ones(32, jnp.bfloat16)
  model = weights.fill(model, {'embed': embed, 'norm': scale})
  tokens = jnp.arange(64)[None]
  _, _, (found,) = model(tokens, tokens, attend=None)
  wide = np.asarray(embed, np.float32)
  np.testing.assert_array_equal(found[0, 0], jnp.bfloat16(wide * 5.65625))
  assert (found[0, 0] != jnp.bfloat16(wide * 32**0.5)).any()
