"""Qwen3: norms on each head's queries and keys, no biases by default."""

import dataclasses
from typing import Any

from tuner.models import decoder
from tuner.models.families import llama, qwen2

READS = (*qwen2.READS, 'attention_bias')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {**qwen2.DEFAULTS, 'head_dim': 128}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  config = {**DEFAULTS, **config}
  return dataclasses.replace(
    llama.decoder_config(config),
    layers=qwen2.layers_of(config),
    qk_norm='head',
  )
