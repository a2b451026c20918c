"""SmolLM3: a Llama in which every fourth layer has no rotary positions."""

import dataclasses
from typing import Any

from tuner.models import decoder, keys, rope
from tuner.models.families import llama

READS = (
  *llama.READS,
  'layer_types',
  'no_rope_layers',
  'sliding_window',
  'use_sliding_window',
)
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 4,
  'no_rope_layer_interval': 4,
  'sliding_window': None,
  'use_sliding_window': False,
  'tie_word_embeddings': True,
}
THETA = 2e6


def ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  return (rope.read(config, size, THETA),)


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  config = {**DEFAULTS, **config}
  turned = _turned(config)
  window = config['sliding_window'] if config['use_sliding_window'] else None
  usual = [
    'full_attention' if on or window is None else 'sliding_attention'
    for on in turned
  ]
  windows = keys.windows(keys.layer_types(config, usual), window)
  return dataclasses.replace(
    llama.decoder_config(config, ropes),
    layers=tuple(
      decoder.Layer(window=window, rope=0 if on else None)
      for on, window in zip(turned, windows, strict=True)
    ),
  )


def _turned(config: dict[str, Any]) -> list[bool]:
  """Whether each layer has rotary positions: what `no_rope_layers` holds.

  Raises ValueError for a wrong number of them.
  """
  count, interval = (
    config['num_hidden_layers'],
    config['no_rope_layer_interval'],
  )
  given = config.get('no_rope_layers')
  if given is None:
    return [(i + 1) % interval != 0 for i in range(count)]
  if len(given) != count:
    raise ValueError(
      f'config.json: no_rope_layers has {len(given)} entries; '
      f'num_hidden_layers is {count}.'
    )
  return [bool(on) for on in given]
