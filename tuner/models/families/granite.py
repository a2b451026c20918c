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
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'attention_multiplier': 1.0,
  'embedding_multiplier': 1.0,
  'logits_scaling': 1.0,
  'residual_multiplier': 1.0,
}


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Granite; each multiplier is 1 where it is left out.

  That of attention, too: 1 / sqrt(head_dim) is not its default.
  """
  config = {**DEFAULTS, **config}
  return dataclasses.replace(
    llama.decoder_config(config),
    attention_scale=config['attention_multiplier'],
    embed_scale=config['embedding_multiplier'],
    residual_scale=config['residual_multiplier'],
    logit_divisor=config['logits_scaling'],
  )
