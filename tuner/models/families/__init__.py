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
      f'{", ".join(known())}.{_more(config)}'
    )
  family = importlib.import_module(f'{__name__}.{model_type}')
  keys.check_counts(config)
  keys.refuse_others(config, family.READS)
  return decoder.Decoder(family.decoder_config(config))


def _more(config: dict[str, Any]) -> str:
  """What more to say of a model that is not supported.

  Of text and images, the text part stands alone. Code that a directory brings
  is not run; beside a known model_type it is not needed.
  """
  if 'auto_map' in config:
    return ' The code that its auto_map names is not run.'
  inner = config.get('text_config')
  if not isinstance(inner, dict):
    return ''
  return (
    ' It holds a text_config of model_type '
    f'{inner.get("model_type")!r}: save that part as a model of its own.'
  )
