"""Granite: a Llama with four multipliers."""

import dataclasses
from typing import Any

from tuner.models import decoder
from tuner.models.families import llama

READS = (
  *llama.READS,
  'attention_multiplier',
  'embedding_multiplier',
  'logits_scaling',
  'residual_multiplier',
)


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Granite; each multiplier is 1 where it is left out.

  That of attention, too: 1 / sqrt(head_dim) is not its default.
  """
  return dataclasses.replace(
    llama.decoder_config(config),
    attention_scale=config.get('attention_multiplier', 1.0),
    embed_scale=config.get('embedding_multiplier', 1.0),
    residual_scale=config.get('residual_multiplier', 1.0),
    logit_divisor=config.get('logits_scaling', 1.0),
  )
