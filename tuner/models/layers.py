"""The small layers: RMS norm, scales, caps and activations by their names."""

import dataclasses

import jax
import jax.numpy as jnp

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Norm:
  """How a family's RMS norm scales.

  offset: added to the scale; 1 where a checkpoint holds w of 1 + w (Gemma).
  scaled_in: 'own' dtype, rounded before the scale, or 'float32'; they differ
    in bfloat16 alone.
  """

  eps: float
  offset: float = 0.0
  scaled_in: str = 'own'

  @property
  def init(self) -> str:
    """What a fresh scale holds, so that it multiplies by 1."""
    return 'zeros' if self.offset else 'ones'


def rms_norm(x: jax.Array, scale_D: jax.Array, norm: Norm) -> jax.Array:
  """x / rms(x) * scale over the last axis, the mean in float32.

  Zhang & Sennrich 2019, eq. 4.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + norm.eps)
  if norm.scaled_in == 'own':
    return normed.astype(x.dtype) * (scale_D + norm.offset)
  scale32_D = scale_D.astype(jnp.float32) + norm.offset
  return (normed * scale32_D).astype(x.dtype)


def scaled(x: jax.Array, scale: float) -> jax.Array:
  """scale * x in x's dtype, rounded once: bfloat16 has no 0.22 or 1 / 3."""
  if scale == 1.0:
    return x
  return (scale * x.astype(jnp.float32)).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """x squeezed into (-cap, cap) by tanh; x itself without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)
