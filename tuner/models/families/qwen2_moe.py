"""Qwen 1.5 and 2 of experts: one more expert that all tokens meet, gated."""

import dataclasses
from typing import Any

from tuner.models import blocks, decoder, keys, moe, weights
from tuner.models.families import llama, qwen3_moe

READS = ('sliding_window', 'use_sliding_window', 'layer_types')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 16,
  'num_experts': 60,
  'num_experts_per_tok': 4,
  'moe_intermediate_size': 1408,
  'shared_expert_intermediate_size': 5632,
  'norm_topk_prob': False,
  'qkv_bias': True,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
}


class Moe(moe.Moe):
  """Experts and the shared one."""

  def _declare(self, config) -> None:
    super()._declare(config)
    self._declare_shared('mlp.shared_expert')
    hf = 'mlp.shared_expert_gate.weight'
    self.shared_scale = weights.weight('DU', hf=hf, layout='UD')


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Qwen2 of experts."""
  config = {**DEFAULTS, **config}
  base = llama.decoder_config(config)
  experts = moe.Experts(
    count=config['num_experts'],
    width=config['moe_intermediate_size'],
    chosen=config['num_experts_per_tok'],
    route=qwen3_moe.route(config),
    shared=config['shared_expert_intermediate_size'],
  )
  sparse = qwen3_moe.sparse_layers(config)
  layers = tuple(
    decoder.Layer(window=window, mlp=Moe if is_sparse else blocks.Mlp)
    for is_sparse, window in zip(sparse, _windows(config), strict=True)
  )
  biases = ('q', 'k', 'v') if config['qkv_bias'] else ()
  return dataclasses.replace(
    base, layers=layers, experts=experts, attention_biases=biases
  )


def _windows(config: dict[str, Any]) -> list[int | None]:
  """By layer_types; by default every other of the first max_window_layers."""
  is_used, ends = config['use_sliding_window'], config['max_window_layers']
  usual = [
    'sliding_attention' if is_used and i < ends and i % 2 == 0
    else 'full_attention'
    for i in range(config['num_hidden_layers'])
  ]  # fmt: skip
  types = keys.layer_types(config, usual)
  return keys.windows(types, config['sliding_window'] if is_used else None)
