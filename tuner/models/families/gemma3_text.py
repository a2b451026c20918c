"""Gemma 3, its text model: five layers with a window to one without."""

import dataclasses
from typing import Any

from tuner.models import decoder, keys, rope
from tuner.models.families import gemma2

# Its soft-cap of attention is in its config.json, but in no code that reads it.
READS = (
  *(key for key in gemma2.READS if key != 'attn_logit_softcapping'),
  'rope_local_base_freq',
  'sliding_window_pattern',
)
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  **gemma2.DEFAULTS,
  'attn_logit_softcapping': None,
  'final_logit_softcapping': None,
  'sliding_window_pattern': 6,
}
# Older files: the key of each type's theta, and what it is by default.
OLD = {'full_attention': 'rope_theta'}
OLD['sliding_attention'] = 'rope_local_base_freq'
THETAS = {'full_attention': 1e6, 'sliding_attention': 1e4}


def ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  """One for each type of layer, in the order of THETAS."""
  return tuple(rope.read_types(config, size, OLD, THETAS).values())


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a text model; that of images and text is 'gemma3'."""
  config = {**DEFAULTS, **config}
  types = gemma2.types_of(config, config['sliding_window_pattern'])
  windows = keys.windows(types, config['sliding_window'])
  order = list(THETAS)
  return dataclasses.replace(
    gemma2.gemma(config, ropes),
    qk_norm='head',
    layers=tuple(
      decoder.Layer(window=window, rope=order.index(kind))
      for kind, window in zip(types, windows, strict=True)
    ),
  )
