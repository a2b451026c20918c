"""Rotary positions (Su et al. 2021) and the ways they stretch to long texts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('default', 'linear', 'dynamic', 'llama3')


@dataclasses.dataclass(frozen=True)
class Rope:
  """One rotary embedding.

  size: the channels of a head that turn, its first ones; an even number.
  kind: 'default', 'linear' (positions divided by factor), 'dynamic' (NTK: the
    base grows once the text is longer than `original`) or 'llama3' (long waves
    stretched, short ones kept, Llama 3.1).
  original: the context, in tokens, that the model was pre-trained with.
  """

  size: int
  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  original: int = 0
  low_frequency: float = 1.0
  high_frequency: float = 4.0


def tables(rope: Rope, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cos_BTH, sin_BTH) in float32, H = rope.size / 2 pairs of channels."""
  size = rope.size
  if rope.kind == 'dynamic':
    length = jnp.maximum(positions_BT.max() + 1, rope.original)
    stretch = rope.factor * length / rope.original - (rope.factor - 1)
    theta = rope.theta * stretch ** (size / (size - 2))
    frequency_H = theta ** -(jnp.arange(0, size, 2) / size)
  else:
    frequency_H = jnp.asarray(_frequencies(rope), jnp.float32)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def _frequencies(rope: Rope) -> np.ndarray:
  """Radians a position for each pair of channels, in float64."""
  frequency_H = rope.theta ** -(np.arange(0, rope.size, 2) / rope.size)
  if rope.kind == 'linear':
    return frequency_H / rope.factor
  if rope.kind == 'llama3':
    turns_H = rope.original * frequency_H / (2 * math.pi)
    span = rope.high_frequency - rope.low_frequency
    ramp_H = np.clip((turns_H - rope.low_frequency) / span, 0.0, 1.0)
    return frequency_H * (ramp_H + (1 - ramp_H) / rope.factor)
  return frequency_H


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x with channel pairs (i, i + size/2) turned by their position's angle.

  Channels after the first `size` stay as they are.
  """
  cos, sin = (table[:, :, None, :] for table in tables)
  size = 2 * cos.shape[-1]
  turning, rest = x_BTNH[..., :size], x_BTNH[..., size:]
  first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  out = jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
  return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


def read(config: dict[str, Any], size: int) -> Rope:
  """The rotary embedding of a config.json, for `size` channels of a head.

  From `rope_parameters` (newer files) or `rope_scaling` (older ones).

  Raises ValueError for an unknown kind and where two places disagree: some
  reader of that directory is wrong.
  """
  new, old = (config.get(k) for k in ('rope_parameters', 'rope_scaling'))
  if new and old and {**new, **old} != {**old, **new}:
    raise ValueError(
      f'config.json: rope_scaling is {old} and rope_parameters is {new}; they '
      'must agree.'
    )
  scaling = {**(old or {}), **(new or {})}
  thetas = [source.get('rope_theta') for source in (config, scaling)]
  given = {float(theta) for theta in thetas if theta is not None}
  if len(given) > 1:
    raise ValueError(
      f'config.json: rope_theta is {thetas[0]} and '
      f'rope_parameters.rope_theta is {thetas[1]}; they must agree.'
    )
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in KINDS:
    raise ValueError(
      f'config.json: rope type {kind!r} is not supported; supported: '
      f'{", ".join(KINDS)}.'
    )
  original = config['max_position_embeddings']
  if kind == 'llama3':  # `transformers` reads it for this kind alone.
    original = scaling.get('original_max_position_embeddings') or original
  return Rope(
    size,
    theta=given.pop() if given else 10000.0,
    kind=kind,
    factor=float(scaling.get('factor') or 1.0),
    original=original,
    low_frequency=float(scaling.get('low_freq_factor') or 1.0),
    high_frequency=float(scaling.get('high_freq_factor') or 4.0),
  )
