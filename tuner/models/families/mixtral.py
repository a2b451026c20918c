"""Mixtral: a Mistral of experts, two of which each token meets."""

import dataclasses
from typing import Any

from tuner.models import decoder, moe, rope, weights
from tuner.models.families import llama

READS = ('sliding_window',)
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 8,
  'sliding_window': None,
  'num_local_experts': 8,
  'num_experts_per_tok': 2,
}
THETA = 1e6


class Moe(moe.Moe):
  """Its matrices are numbered at Hugging Face: w2(act(w1(x)) * w3(x))."""

  def _declare(self, config) -> None:
    w, name = weights.weight, 'block_sparse_moe.experts.{{E}}.w{}.weight'.format
    self.router = w('DE', hf='block_sparse_moe.gate.weight', layout='ED')
    self.gate = w('EDI', hf=name(1), layout='ID')
    self.up = w('EDI', hf=name(3), layout='ID')
    self.down = w('EID', hf=name(2), layout='DI')


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Mixtral.

  Raises ValueError for router_jitter_noise, which multiplies what goes into
  the experts in training alone: it is not done here.
  """
  config = {**DEFAULTS, **config}
  if config.get('router_jitter_noise'):
    raise ValueError(
      f'config.json: router_jitter_noise: {config["router_jitter_noise"]}; '
      'this family knows 0.'
    )
  base = llama.decoder_config(config, _ropes)
  experts = moe.Experts(
    count=config['num_local_experts'],
    width=config['intermediate_size'],
    chosen=config['num_experts_per_tok'],
    route=moe.top_softmax,
  )
  layer = decoder.Layer(window=config['sliding_window'], mlp=Moe)
  return dataclasses.replace(base, layers=(layer,) * base.L, experts=experts)


def _ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  return (rope.read(config, size, THETA),)
