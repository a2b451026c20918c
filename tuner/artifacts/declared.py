"""Whether two directories declare the same model: config.json against another.

What is compared is what a config.json means here (decoder.DecoderConfig), so
that a file in other words passes and another number does not.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.models import decoder

# Formats keep numbers as float32: two of them are the same within this.
ROUNDED = 1e-6


def differences(
  found: decoder.DecoderConfig, wanted: decoder.DecoderConfig
) -> list[str]:
  """'name: value, not the wanted value' of each part that differs."""
  there, asked = (dict(_parts(_plain(x), '')) for x in (found, wanted))
  return [
    f'{name}: {there.get(name)!r}, not {asked.get(name)!r}'
    for name in sorted(there.keys() | asked.keys())
    if not _is_same(there.get(name), asked.get(name))
  ]


def _plain(config: decoder.DecoderConfig) -> decoder.DecoderConfig:
  """The config without windows that are as long as any text."""
  layers = tuple(
    dataclasses.replace(layer, window=None)
    if layer.window and layer.window >= config.max_positions
    else layer
    for layer in config.layers
  )
  return dataclasses.replace(config, layers=layers)


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
  """(dotted name, plain value) of all that is nested in records."""
  inner: Mapping[str, Any]
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    inner = {field.name: getattr(value, field.name) for field in fields}
  elif isinstance(value, tuple | list):
    inner = {str(i): one for i, one in enumerate(value)}
  elif isinstance(value, Mapping):
    inner = value
  else:
    yield name, getattr(value, '__name__', value)
    return
  for key, one in inner.items():
    yield from _parts(one, f'{name}.{key}' if name else str(key))


def _is_same(one: Any, other: Any) -> bool:
  numbers = (int, float)
  if isinstance(one, numbers) and isinstance(other, numbers):
    return abs(one - other) <= ROUNDED * max(abs(one), abs(other))
  return one == other
