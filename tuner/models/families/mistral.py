"""Mistral: a Llama whose attention looks at most `sliding_window` back."""

import dataclasses
from typing import Any

from tuner.models import decoder
from tuner.models.families import llama

READS = ('sliding_window',)
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {'num_key_value_heads': 8, 'sliding_window': 4096}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Mistral; a null window means full attention."""
  config = {**DEFAULTS, **config}
  base = llama.decoder_config(config)
  layer = decoder.Layer(window=config['sliding_window'])
  return dataclasses.replace(base, layers=(layer,) * base.L)
