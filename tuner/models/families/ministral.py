"""Ministral: a Mistral whose layers may look far and near by turns."""

import dataclasses
from typing import Any

from tuner.models import decoder, keys
from tuner.models.families import llama

READS = ('sliding_window', 'layer_types')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {'num_key_value_heads': 8, 'sliding_window': 4096}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Ministral; a null window means full attention."""
  config = {**DEFAULTS, **config}
  base = llama.decoder_config(config)
  window = config['sliding_window']
  usual = 'full_attention' if window is None else 'sliding_attention'
  types = keys.layer_types(config, [usual] * base.L)
  layers = (decoder.Layer(window=w) for w in keys.windows(types, window))
  return dataclasses.replace(base, layers=tuple(layers))
