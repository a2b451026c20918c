"""Mistral: a Llama whose attention looks at most `sliding_window` back."""

import dataclasses
from typing import Any

from tuner.models import decoder
from tuner.models.families import llama


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Mistral; a null window means full attention."""
  return dataclasses.replace(
    llama.decoder_config(config), window=config.get('sliding_window')
  )
