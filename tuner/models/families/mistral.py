"""Mistral: a Llama whose attention looks at most `sliding_window` back."""

import dataclasses
from typing import Any

from tuner.models import decoder
from tuner.models.families import llama

# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {'num_key_value_heads': 8, 'sliding_window': 4096}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Mistral; a null window means full attention."""
  config = {**DEFAULTS, **config}
  return dataclasses.replace(
    llama.decoder_config(config), window=config['sliding_window']
  )
