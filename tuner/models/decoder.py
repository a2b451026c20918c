"""The decoder: embedding, L stacked and scanned blocks, norm and head.

Each weight is declared once, in the constructor; a family (models/families/)
turns a config.json into a `DecoderConfig`. A decoder is a plain pytree: fill
its weights (`weights.fill`) and pass it through jit, grad and scan.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuner import mesh
from tuner.models import attention, layers, linear, weights

REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a config.json says, in this project's letters (CONTRIBUTING.md)."""

  L: int
  D: int
  N: int
  K: int
  H: int
  F: int
  V: int
  rope: layers.Rope
  eps: float
  max_positions: int
  window: int | None = None
  tied: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False

  @property
  def sizes(self) -> dict[str, int]:
    """The size of every letter."""
    return {letter: getattr(self, letter) for letter in 'LDNKHFV'}


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, config: DecoderConfig):
    w, name = weights.weight, 'self_attn.{}_proj.weight'.format
    self.q = w('DNH', hf=name('q'), layout='(NH)D')
    self.k = w('DKH', hf=name('k'), layout='(KH)D')
    self.v = w('DKH', hf=name('v'), layout='(KH)D')
    self.o = w('NHD', hf=name('o'), layout='D(NH)')
    if config.attention_bias:
      bias = 'self_attn.{}_proj.bias'.format
      self.q_bias = w('NH', hf=bias('q'), layout='(NH)', init='zeros')
      self.k_bias = w('KH', hf=bias('k'), layout='(KH)', init='zeros')
      self.v_bias = w('KH', hf=bias('v'), layout='(KH)', init='zeros')
      self.o_bias = w('D', hf=bias('o'), init='zeros')
    self.config = config

  def __call__(self, x_BTD, tables, attend, layer, memory):
    q = linear.project('BTD,DNH->BTNH', x_BTD, self.q)
    k = linear.project('BTD,DKH->BTKH', x_BTD, self.k)
    v = linear.project('BTD,DKH->BTKH', x_BTD, self.v)
    if self.config.attention_bias:
      q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
    q, k = layers.rotate(q, tables), layers.rotate(k, tables)
    out, memory = attend(q, k, v, layer, memory)
    out = linear.project('BTNH,NHD->BTD', out, self.o)
    if self.config.attention_bias:
      out = out + self.o_bias[...]
    return out, memory


class Mlp(nnx.Module):
  """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

  def __init__(self, config: DecoderConfig):
    w, name = weights.weight, 'mlp.{}_proj.weight'.format
    self.gate = w('DF', hf=name('gate'), layout='FD')
    self.up = w('DF', hf=name('up'), layout='FD')
    self.down = w('FD', hf=name('down'), layout='DF')
    if config.mlp_bias:
      bias = 'mlp.{}_proj.bias'.format
      self.gate_bias = w('F', hf=bias('gate'), init='zeros')
      self.up_bias = w('F', hf=bias('up'), init='zeros')
      self.down_bias = w('D', hf=bias('down'), init='zeros')
    self.config = config

  def __call__(self, x_BTD):
    gate = linear.project('BTD,DF->BTF', x_BTD, self.gate)
    up = linear.project('BTD,DF->BTF', x_BTD, self.up)
    if self.config.mlp_bias:
      gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
    out = linear.project('BTF,FD->BTD', jax.nn.silu(gate) * up, self.down)
    return out + self.down_bias[...] if self.config.mlp_bias else out


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: DecoderConfig):
    norm = '{}_layernorm.weight'.format
    self.attention_norm = weights.weight('D', hf=norm('input'), init='ones')
    self.attention = Attention(config)
    self.mlp_norm = weights.weight('D', hf=norm('post_attention'), init='ones')
    self.mlp = Mlp(config)
    self.eps = config.eps

  def __call__(self, x_BTD, tables, attend, layer, memory):
    normed = layers.rms_norm(x_BTD, self.attention_norm[...], self.eps)
    out, memory = self.attention(normed, tables, attend, layer, memory)
    x_BTD = x_BTD + out
    normed = layers.rms_norm(x_BTD, self.mlp_norm[...], self.eps)
    return mesh.constrain(x_BTD + self.mlp(normed), 'BTD'), memory


class Decoder(nnx.Module):
  """A causal language model whose weights are declared, not yet filled."""

  def __init__(self, config: DecoderConfig):
    self.embed = weights.weight('VD', hf='model.embed_tokens.weight')
    self.blocks = weights.stack(Block(config), 'model.layers.{L}.')
    self.norm = weights.weight('D', hf='model.norm.weight', init='ones')
    if not config.tied:
      self.head = weights.weight('DV', hf='lm_head.weight', layout='VD')
    self.config = config

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Callable,
    memory: Any = None,
    remat: str = 'none',
  ) -> tuple[jax.Array, Any]:
    """(hidden_BTD after the last norm, memory).

    attend: (q_BTNH, k_BTKH, v_BTKH, layer, memory) -> (out_BTNH, memory), such
      as `attend_packed` or generate.greedy's; memory is carried through layers.
    remat: 'none', 'dots' or 'full': what the backward pass computes again.
    """
    embed = mesh.constrain(linear.value_of(self.embed), 'VD')
    x = jnp.take(embed, tokens_BT, axis=0)
    x = mesh.constrain(x, 'BTD')
    tables = layers.rope_tables(self.config.rope, positions_BT, self.config.H)

    def layer(carry, block_and_index):
      block, index = block_and_index
      return block(carry[0], tables, attend, index, carry[1]), None

    if REMAT[remat] is not None:
      layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    index_L = jnp.arange(self.config.L)
    (x, memory), _ = jax.lax.scan(layer, (x, memory), (self.blocks, index_L))
    return layers.rms_norm(x, self.norm[...], self.config.eps), memory

  def head_weight(self) -> Any:
    """The array or weight kind that makes logits: the head or the embedding."""
    return linear.value_of(self.embed if self.config.tied else self.head)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """float32 logits_BTV of hidden states."""
    return head_logits(self.head_weight(), x_BTD, self.config.tied)


def head_logits(head: Any, x_BTD: jax.Array, tied: bool) -> jax.Array:
  """float32 logits_BTV by a head of dims DV, or VD if it is the embedding."""
  spec = 'BTD,VD->BTV' if tied else 'BTD,DV->BTV'
  return linear.project(spec, x_BTD, head).astype(jnp.float32)


def attend_packed(
  segments_BT: jax.Array, window: int | None = None, reach: int | None = None
) -> Callable:
  """An `attend` over whole rows; see `attention.packed`."""

  def attend(q, k, v, layer, memory):
    del layer
    return attention.packed(q, k, v, segments_BT, window, reach), memory

  return attend
