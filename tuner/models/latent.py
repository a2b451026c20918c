"""Multi-head latent attention: DeepSeek-V2 (2024), section 2.1.

Keys and values of all heads are made from one narrow latent; positions turn
only some channels, of which the key's are shared by all heads. Letters: Q and
A, the ranks of the queries' and of the keys' and values' latent; P, A and the
key's turning channels; H, the channels of a query, its turning ones last; W,
those of a value; Y, those of a key that do not turn and of a value.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tuner.models import attention, blocks, layers, linear, rope, weights

NORM = layers.Norm(1e-6)  # Whatever config.json says of the other norms.


@dataclasses.dataclass(frozen=True)
class Latent:
  """The sizes of a family's latent attention, in channels.

  nope, rope: those of a query and a key that keep out of the rotation, and
    those that turn. query_rank: 0 where queries are made in one step.
  pairs: which of the turning channels turn together, 'neighbours' or 'halves'.
  """

  query_rank: int
  rank: int
  nope: int
  rope: int
  value: int
  pairs: str = 'neighbours'

  @property
  def letters(self) -> dict[str, int]:
    return {
      'Q': self.query_rank,
      'A': self.rank,
      'P': self.rank + self.rope,
      'W': self.value,
      'Y': self.nope + self.value,
    }

  def cache_sizes(self, config) -> tuple[int, int, int]:
    """Whole keys and values are kept, not their latent."""
    return config.N, self.nope + self.rope, self.value


class Attention(nnx.Module):
  """Attention whose queries, keys and values pass through a latent."""

  def __init__(self, config, layer):
    self._declare(config.latent)
    self.latent, self.rope = config.latent, layer.rope
    self.look = attention.Look(config.attention_scale, layer.window)

  def _declare(self, latent) -> None:
    w, name = weights.weight, 'self_attn.{}.weight'.format
    if latent.query_rank:
      self.q_a = w('DQ', hf=name('q_a_proj'), layout='QD')
      self.q_norm = w('Q', hf=name('q_a_layernorm'), init='ones')
      self.q_b = w('QNH', hf=name('q_b_proj'), layout='(NH)Q')
    else:
      self.q = w('DNH', hf=name('q_proj'), layout='(NH)D')
    self.kv_a = w('DP', hf=name('kv_a_proj_with_mqa'), layout='PD')
    self.kv_norm = w('A', hf=name('kv_a_layernorm'), init='ones')
    self.kv_b = w('ANY', hf=name('kv_b_proj'), layout='(NY)A')
    self.o = w('NWD', hf=name('o_proj'), layout='D(NW)')

  def __call__(self, x_BTD, call: blocks.Call, layer, memory):
    nope, tables = self.latent.nope, call.tables[self.rope]
    q_BTNH = self._queries(x_BTD)
    turned = rope.rotate(self._halves(q_BTNH[..., nope:]), tables)
    q_BTNH = jnp.concatenate([q_BTNH[..., :nope], turned], axis=-1)
    k_BTNH, v_BTNW = self._keys_and_values(x_BTD, tables)
    out, memory = call.attend(
      q_BTNH, k_BTNH, v_BTNW, self.look, None, layer, memory
    )
    return linear.project('BTNW,NWD->BTD', out, self.o), memory

  def _queries(self, x_BTD) -> jax.Array:
    if not self.latent.query_rank:
      return linear.project('BTD,DNH->BTNH', x_BTD, self.q)
    low_BTQ = linear.project('BTD,DQ->BTQ', x_BTD, self.q_a)
    low_BTQ = layers.rms_norm(low_BTQ, self.q_norm[...], NORM)
    return linear.project('BTQ,QNH->BTNH', low_BTQ, self.q_b)

  def _keys_and_values(self, x_BTD, tables):
    rank, nope = self.latent.rank, self.latent.nope
    low_BTP = linear.project('BTD,DP->BTP', x_BTD, self.kv_a)
    low_BTA = layers.rms_norm(low_BTP[..., :rank], self.kv_norm[...], NORM)
    both_BTNY = linear.project('BTA,ANY->BTNY', low_BTA, self.kv_b)
    k, v = both_BTNY[..., :nope], both_BTNY[..., nope:]
    turned = rope.rotate(self._halves(low_BTP[:, :, None, rank:]), tables)
    turned = jnp.broadcast_to(turned, (*k.shape[:-1], turned.shape[-1]))
    return jnp.concatenate([k, turned], axis=-1), v

  def _halves(self, x_BTNH):
    """Channels that turn together, half the width apart, as rope has them.

    The order is the same for queries and keys, so that scores do not see it.
    """
    if self.latent.pairs == 'halves':
      return x_BTNH
    return jnp.concatenate([x_BTNH[..., ::2], x_BTNH[..., 1::2]], axis=-1)
