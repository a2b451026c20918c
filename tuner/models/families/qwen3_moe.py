"""Qwen3 of experts: heads with norms, experts without biases."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tuner.models import blocks, decoder, moe
from tuner.models.families import llama

READS = ('attention_bias', 'sliding_window', 'use_sliding_window')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 4,
  'num_experts': 128,
  'num_experts_per_tok': 8,
  'moe_intermediate_size': 768,
  'norm_topk_prob': False,
  'use_sliding_window': False,
  'sliding_window': 4096,
}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Qwen3 of experts. Raises ValueError."""
  # The hub's files say num_experts, those of `transformers` 5 the other.
  counts = {config.get(k) for k in ('num_experts', 'num_local_experts')}
  counts -= {None}
  if len(counts) > 1:
    raise ValueError(
      f'config.json: num_experts is {config["num_experts"]} and '
      f'num_local_experts is {config["num_local_experts"]}; they must agree.'
    )
  if counts:
    config = {**config, 'num_experts': counts.pop()}
  config = {**DEFAULTS, **config}
  base = llama.decoder_config(config)
  experts = moe.Experts(
    count=config['num_experts'],
    width=config['moe_intermediate_size'],
    chosen=config['num_experts_per_tok'],
    route=route(config),
  )
  window = config['sliding_window'] if config['use_sliding_window'] else None
  layers = tuple(
    decoder.Layer(window=window, mlp=moe.Moe if is_sparse else blocks.Mlp)
    for is_sparse in sparse_layers(config)
  )
  return dataclasses.replace(
    base, layers=layers, experts=experts, qk_norm='head'
  )


def route(config: dict[str, Any]) -> Callable:
  """The router that norm_topk_prob names."""
  return moe.top_softmax if config['norm_topk_prob'] else moe.softmax_top


def sparse_layers(config: dict[str, Any]) -> list[bool]:
  """Which layers have experts, by mlp_only_layers and decoder_sparse_step."""
  dense = config.get('mlp_only_layers') or ()
  step = config.get('decoder_sparse_step') or 1
  return [
    config['num_experts'] > 0 and i not in dense and (i + 1) % step == 0
    for i in range(config['num_hidden_layers'])
  ]
