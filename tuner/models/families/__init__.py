"""One file a family: `<model_type>.py` turns a config.json into a decoder.

READS of a family: the keys of `keys.OFF` that it gives a meaning.
"""

import importlib
import pkgutil
from typing import Any

from tuner.models import decoder, keys


def known() -> list[str]:
  """The model types that have a file here."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def decoder_of(config: dict[str, Any]) -> decoder.Decoder:
  """The declared model of a config.json. Raises ValueError for unknown ones."""
  model_type = config.get('model_type')
  if model_type not in known():
    raise ValueError(
      f'config.json: model_type: {model_type!r} is not supported; supported: '
      f'{", ".join(known())}.{_inner(config)}'
    )
  family = importlib.import_module(f'{__name__}.{model_type}')
  keys.refuse_others(config, family.READS)
  return decoder.Decoder(family.decoder_config(config))


def _inner(config: dict[str, Any]) -> str:
  """What to say of a model of text and images: its text part stands alone."""
  inner = config.get('text_config')
  if not isinstance(inner, dict):
    return ''
  return (
    ' It holds a text_config of model_type '
    f'{inner.get("model_type")!r}: save that part as a model of its own.'
  )
