"""DeepSeek-V3: latent attention, dense layers first, then experts."""

import dataclasses
import math
from typing import Any

from tuner.models import blocks, decoder, latent, moe, rope, weights
from tuner.models.families import llama

# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 2048,
  'first_k_dense_replace': 3,
  'n_group': 8,
  'topk_group': 4,
  'routed_scaling_factor': 2.5,
  'q_lora_rank': 1536,
  'kv_lora_rank': 512,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'v_head_dim': 128,
  'rope_interleave': True,
  'num_nextn_predict_layers': 1,
}
# What others of its kind may say, and this one must not.
FIXED = {
  'norm_topk_prob': True,
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
  'moe_layer_freq': 1,
}
READS = ()


class Moe(moe.Moe):
  """Experts chosen with a correction that nothing trains, and a shared one."""

  def _declare(self, config) -> None:
    super()._declare(config)
    self._declare_shared('mlp.shared_experts')
    # In bfloat16, experts that are nearly level would change places.
    hf = 'mlp.gate.e_score_correction_bias'
    self.correction = weights.weight(
      'E', hf=hf, init='zeros', kept_in='float32'
    )


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a DeepSeek-V3. Raises ValueError."""
  config = {**DEFAULTS, **config}
  _check(config)
  attention = latent.Latent(
    query_rank=config['q_lora_rank'] or 0,
    rank=config['kv_lora_rank'],
    nope=config['qk_nope_head_dim'],
    rope=config['qk_rope_head_dim'],
    value=config['v_head_dim'],
    pairs='neighbours' if config['rope_interleave'] else 'halves',
  )
  own = {
    'head_dim': attention.nope + attention.rope,
    'num_key_value_heads': config['num_attention_heads'],
  }
  base = llama.decoder_config({**config, **own}, _ropes)
  layers = tuple(
    decoder.Layer(
      attention=latent.Attention,
      mlp=blocks.Mlp if i < config['first_k_dense_replace'] else Moe,
    )
    for i in range(base.L)
  )
  scale = base.attention_scale * _stretch(config) ** 2
  return dataclasses.replace(
    base,
    layers=layers,
    experts=_experts(config),
    latent=attention,
    attention_scale=scale,
    ignored=_ignored(base.L, config['num_nextn_predict_layers'] or 0),
  )


def _ignored(first: int, count: int) -> tuple[str, ...]:
  """The layers that predict several tokens at once, after all others."""
  return tuple(f'model.layers.{first + i}.' for i in range(count))


def _check(config: dict[str, Any]) -> None:
  for key, known in FIXED.items():
    if config.get(key, known) != known:
      raise ValueError(
        f'config.json: {key}: {config[key]!r}; this family knows {known!r}.'
      )
  experts, groups = config['n_routed_experts'], config['n_group']
  if experts % groups or experts // groups < 2:
    raise ValueError(
      f'config.json: n_routed_experts: {experts} and n_group: {groups}; a '
      'group has two experts or more, and all groups as many.'
    )


def _experts(config: dict[str, Any]) -> moe.Experts:
  width = config['moe_intermediate_size']
  return moe.Experts(
    count=config['n_routed_experts'],
    width=width,
    chosen=config['num_experts_per_tok'],
    route=moe.sigmoid_top,
    shared=width * config['n_shared_experts'],
    groups=config['n_group'],
    open_groups=config['topk_group'],
    scale=config['routed_scaling_factor'],
  )


def _ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  del size
  return (rope.read(config, config['qk_rope_head_dim']),)


def _stretch(config: dict[str, Any]) -> float:
  """What longer texts multiply queries and keys by: yarn's mscale_all_dim."""
  own = config.get('rope_parameters') or config.get('rope_scaling') or {}
  factor, by = own.get('factor') or 1.0, own.get('mscale_all_dim') or 0.0
  return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0
