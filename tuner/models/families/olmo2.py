"""OLMo 2: norms after attention and mlp, and of queries and keys."""

import dataclasses
from typing import Any

from tuner.models import decoder, layers
from tuner.models.families import llama

READS = ('attention_bias',)
NORMS = decoder.Norms(
  attention=None,
  attention_post='post_attention_layernorm',
  mlp=None,
  mlp_post='post_feedforward_layernorm',
)


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  return olmo(llama.decoder_config(config))


def olmo(base: decoder.DecoderConfig) -> decoder.DecoderConfig:
  """What OLMo 2 and 3 change in a Llama."""
  norm = layers.Norm(base.norm.eps, scaled_in='float32')
  return dataclasses.replace(base, norms=NORMS, norm=norm, qk_norm='heads')
