"""One file a family: `<model_type>.py` turns a config.json into a decoder."""

import importlib
import pkgutil
from typing import Any

from tuner.models import decoder


def known() -> list[str]:
  """The model types that have a file here."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def decoder_of(config: dict[str, Any]) -> decoder.Decoder:
  """The declared model of a config.json. Raises ValueError for unknown ones."""
  model_type = config.get('model_type')
  if model_type not in known():
    raise ValueError(
      f'config.json: model_type: {model_type!r} is not supported; supported: '
      f'{", ".join(known())}.'
    )
  family = importlib.import_module(f'{__name__}.{model_type}')
  return decoder.Decoder(family.decoder_config(config))
