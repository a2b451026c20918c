"""Phi-3, 3.5 and 4: one matrix of queries, keys and values, one of gate, up."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from tuner.models import blocks, decoder, linear, rope, weights
from tuner.models.families import llama

READS = ('sliding_window', 'partial_rotary_factor')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {'original_max_position_embeddings': 4096, 'sliding_window': None}
KINDS = ('default', 'longrope')
SAID_IN = ('rope_parameters', 'rope_scaling')


class Attention(blocks.Attention):
  """One projection of Z heads: N of queries, K of keys, K of values."""

  def _declare(self, config) -> None:
    qkv, o = 'self_attn.qkv_proj.weight', 'self_attn.o_proj.weight'
    self.qkv = weights.weight('DZH', hf=qkv, layout='(ZH)D')
    self.o = weights.weight('NHD', hf=o, layout='D(NH)')

  def _project(self, x_BTD):
    qkv_BTZH = linear.project('BTD,DZH->BTZH', x_BTD, self.qkv)
    ends = self.config.N, self.config.N + self.config.K
    return jnp.split(qkv_BTZH, ends, axis=2)


class Mlp(blocks.Mlp):
  """A gated linear unit whose gate and up are one projection."""

  def _declare(self, config) -> None:
    gate_up, down = 'mlp.gate_up_proj.weight', 'mlp.down_proj.weight'
    self.gate_up = weights.weight('DCF', hf=gate_up, layout='(CF)D')
    self.down = weights.weight('FD', hf=down, layout='DF')

  def _project(self, x_BTD):
    gate_up = linear.project('BTD,DCF->BTCF', x_BTD, self.gate_up)
    return gate_up[:, :, 0], gate_up[:, :, 1]


def ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  """The rope. Raises ValueError for kinds that this family never had.

  'su' is what its first files call longrope.
  """
  config = {**config, **{key: _renamed(config.get(key)) for key in SAID_IN}}
  found = rope.read(config, size, partial=True)
  if found.kind not in KINDS:
    raise ValueError(
      f'config.json: rope type {found.kind!r}; this family knows '
      f'{", ".join(KINDS)}.'
    )
  return (found,)


def _renamed(said: dict[str, Any] | None) -> dict[str, Any] | None:
  names = {k: 'longrope' for k, v in (said or {}).items() if v == 'su'}
  return {**said, **names} if said else said


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  config = {**DEFAULTS, **config}
  base = llama.decoder_config(config, ropes)
  window = config['sliding_window']
  layer = decoder.Layer(window=window, attention=Attention, mlp=Mlp)
  return dataclasses.replace(base, layers=(layer,) * base.L)
