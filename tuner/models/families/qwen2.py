"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values."""

import dataclasses
from typing import Any

from tuner.models import decoder, keys
from tuner.models.families import llama

READS = ('sliding_window', 'use_sliding_window', 'layer_types')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 32,
  'sliding_window': 4096,
  'use_sliding_window': False,
  'max_window_layers': 28,
}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  config = {**DEFAULTS, **config}
  return dataclasses.replace(
    llama.decoder_config(config),
    layers=layers_of(config),
    attention_biases=('q', 'k', 'v'),
  )


def layers_of(config: dict[str, Any]) -> tuple[decoder.Layer, ...]:
  """The layers: `max_window_layers` look everywhere, the rest have the window.

  Unless `layer_types` says otherwise. The window counts only where
  `use_sliding_window` is on; Qwen2.5 writes both, and it is off.
  """
  window = config['sliding_window'] if config['use_sliding_window'] else None
  far = config['max_window_layers']
  usual = [
    'full_attention' if window is None or i < far else 'sliding_attention'
    for i in range(config['num_hidden_layers'])
  ]
  types = keys.layer_types(config, usual)
  return tuple(decoder.Layer(window=w) for w in keys.windows(types, window))
