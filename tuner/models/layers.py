"""The small layers: RMS norm, and rotary positions with Llama's scalings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, computed in float32.

  Zhang & Sennrich 2019, eq. 4. Rounded to x's dtype before the scale, as
  `transformers` does.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + eps)
  return normed.astype(x.dtype) * scale_D


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions (Su et al. 2021) and how they stretch to long texts.

  kind: 'default', 'linear' (positions divided by factor), 'dynamic' (NTK: the
    base grows once the text is longer than `original`) or 'llama3' (long waves
    stretched, short ones kept, Llama 3.1).
  original: the context, in tokens, that the model was pre-trained with.
  """

  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  original: int = 0
  low_frequency: float = 1.0
  high_frequency: float = 4.0


def rope_tables(
  rope: Rope, positions_BT: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """(cos_BTH, sin_BTH) in float32, H = size / 2 pairs of channels."""
  if rope.kind == 'dynamic':
    length = jnp.maximum(positions_BT.max() + 1, rope.original)
    stretch = rope.factor * length / rope.original - (rope.factor - 1)
    theta = rope.theta * stretch ** (size / (size - 2))
    frequency_H = theta ** -(jnp.arange(0, size, 2) / size)
  else:
    frequency_H = jnp.asarray(_frequencies(rope, size), jnp.float32)
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
  return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def _frequencies(rope: Rope, size: int) -> np.ndarray:
  """Radians a position for each pair of channels, in float64."""
  frequency_H = rope.theta ** -(np.arange(0, size, 2) / size)
  if rope.kind == 'linear':
    return frequency_H / rope.factor
  if rope.kind == 'llama3':
    turns_H = rope.original * frequency_H / (2 * math.pi)
    span = rope.high_frequency - rope.low_frequency
    ramp_H = np.clip((turns_H - rope.low_frequency) / span, 0.0, 1.0)
    return frequency_H * (ramp_H + (1 - ramp_H) / rope.factor)
  return frequency_H


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x with channel pairs (i, i + H/2) turned by their position's angle."""
  cos, sin = (table[:, :, None, :] for table in tables)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
