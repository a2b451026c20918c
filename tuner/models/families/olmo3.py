"""OLMo 3: an OLMo 2 in which only every fourth layer looks far."""

import dataclasses
from typing import Any

from tuner.models import decoder, keys, rope
from tuner.models.families import gemma2, llama, olmo2

READS = (*olmo2.READS, 'layer_types', 'sliding_window')
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {'sliding_window': 4096}
THETAS = {'full_attention': 5e5, 'sliding_attention': 5e5}


def ropes(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  """One for each type of layer, in the order of THETAS.

  Older files have one rope_theta, which readers take for both types or for
  one; no file is known in which it is not the default.
  """
  theta = config.get('rope_theta')
  if theta not in (None, 5e5) and not config.get('rope_parameters'):
    raise ValueError(
      f'config.json: rope_theta: {theta}; without rope_parameters this family '
      'knows 500000.'
    )
  old = dict.fromkeys(THETAS, 'rope_theta')
  return tuple(rope.read_types(config, size, old, THETAS).values())


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  config = {**DEFAULTS, **config}
  types = gemma2.types_of(config, 4)
  windows = keys.windows(types, config['sliding_window'])
  order = list(THETAS)
  return dataclasses.replace(
    olmo2.olmo(llama.decoder_config(config, ropes)),
    layers=tuple(
      decoder.Layer(window=window, rope=order.index(kind))
      for kind, window in zip(types, windows, strict=True)
    ),
  )
