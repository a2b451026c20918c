"""gpt-oss: sinks, alternating windows, and experts with biases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tuner.models import decoder, keys, layers, linear, moe, rope, weights
from tuner.models.families import llama

# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'head_dim': 64,
  'num_key_value_heads': 8,
  'num_local_experts': 128,
  'num_experts_per_tok': 4,
  'sliding_window': 128,
  'attention_bias': True,
  'swiglu_alpha': 1.702,
  'swiglu_limit': 7.0,
}
THETA = 150000.0
ROPE = {
  'rope_type': 'yarn',
  'factor': 32.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'truncate': False,
  'original_max_position_embeddings': 4096,
}
READS = ('attention_bias', 'sliding_window', 'layer_types')


@dataclasses.dataclass(frozen=True)
class Experts(moe.Experts):
  """limit: what gate and up are clamped to; alpha: the sigmoid's slope."""

  alpha: float = 1.702
  limit: float = 7.0


class Moe(moe.Moe):
  """gate and up are one matrix C, in pairs at Hugging Face; all have biases."""

  PARTS = ('gate_up', 'gate_up_bias', 'down', 'down_bias')

  def _declare(self, config) -> None:
    w, name = weights.weight, 'mlp.experts.{}'.format
    self.router = w('DE', hf='mlp.router.weight', layout='ED')
    self.router_bias = w('E', hf='mlp.router.bias', init='zeros')
    hf, down = name('gate_up_proj'), name('down_proj')
    self.gate_up = w('EDCI', hf=hf, layout='ED(IC)', inputs='D')
    self.gate_up_bias = w('ECI', f'{hf}_bias', 'E(IC)', 'zeros')
    self.down = w('EID', hf=down, layout='EID', inputs='I')
    self.down_bias = w('ED', f'{down}_bias', 'ED', 'zeros')

  def _expert(self, parts, x_ND, sizes_E):
    pair_NCI = linear.grouped(x_ND, parts['gate_up'], sizes_E)
    pair_NCI += linear.grouped_bias(parts['gate_up_bias'], sizes_E, len(x_ND))
    alpha, limit = self.experts.alpha, self.experts.limit
    gate = jnp.minimum(pair_NCI[:, 0], limit)
    up = jnp.clip(pair_NCI[:, 1], -limit, limit)
    hidden = (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
    out = linear.grouped(hidden, parts['down'], sizes_E)
    return out + linear.grouped_bias(parts['down_bias'], sizes_E, len(x_ND))


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a gpt-oss; every other layer looks everywhere."""
  config = {**DEFAULTS, **config}
  if not (config.get('rope_parameters') or config.get('rope_scaling')):
    config['rope_parameters'] = ROPE
  base = llama.decoder_config(config, _ropes)
  usual = ('sliding_attention', 'full_attention') * base.L
  types = keys.layer_types(config, usual[: base.L])
  windows = keys.windows(types, config['sliding_window'])
  return dataclasses.replace(
    base,
    norm=layers.Norm(config['rms_norm_eps'], scaled_in='float32'),
    layers=tuple(decoder.Layer(window=window, mlp=Moe) for window in windows),
    sinks=True,
    experts=Experts(
      count=config['num_local_experts'],
      width=config['intermediate_size'],
      chosen=config['num_experts_per_tok'],
      route=moe.top_softmax,
      alpha=config['swiglu_alpha'],
      limit=config['swiglu_limit'],
    ),
  )


def _ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  return (rope.read(config, size, THETA),)
