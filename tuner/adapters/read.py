"""An adapter's directory -> values to start training from."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from tuner import named
from tuner.adapters import low_rank, place, settings, sites
from tuner.models import hub, tensors, weights

Rows = Mapping[str, weights.Row]
Sizes = Mapping[str, int]
WEIGHTS = 'adapter_model.safetensors'
SHOWN = 20  # faults in full; of more, how many


@dataclasses.dataclass(frozen=True)
class Stored:
  """An adapter as it is on disk, in this project's letters.

  sizes: rank and alpha of each adapted path. values: the trainable tree.
  saved: the paths that train whole. sha256: of both files.
  """

  directory: pathlib.Path
  settings: settings.Settings
  sizes: dict[str, low_rank.Size]
  values: dict[str, np.ndarray]
  saved: tuple[str, ...]
  sha256: str


def adapter(
  rows: Rows, sizes: Sizes, path: str, revision: str | None = None
) -> Stored:
  """The adapter of a directory or hub id. Raises ValueError with all faults."""
  directory = _directory(path, revision)
  said = settings.read(directory, list(sites.names(rows, sizes)))
  reading = place.Reading(rows, sizes, said)
  for name, tensor in _tensors(directory / WEIGHTS):
    reading.take(name, tensor)
  found = reading.finish()
  if reading.faults:
    shown = reading.faults[:SHOWN]
    more = len(reading.faults) - len(shown)
    rest = [f'and {more} more'] if more else []
    raise ValueError('\n  '.join([f'{directory / WEIGHTS}:', *shown, *rest]))
  digest = hashlib.sha256()
  for file in (settings.CONFIG, WEIGHTS):
    digest.update((directory / file).read_bytes())
  ranks, values, saved = found
  return Stored(directory, said, ranks, values, saved, digest.hexdigest())


def _directory(path: str, revision: str | None) -> pathlib.Path:
  local = pathlib.Path(path).expanduser()
  if local.is_dir():
    return local
  if not path or not hub.is_id(path):
    found = named.existing_path(path, 'config.adapt.path')
    raise ValueError(f'config.adapt.path: {found} is a file, not a directory.')
  try:
    return hub.directory(path, revision)
  except OSError as error:  # All that the hub raises: no network, no such id.
    reason = (str(error).splitlines() or [''])[0]
    raise RuntimeError(
      f'config.adapt.path: {path!r} is no directory here, and the hub did not '
      f'give it: {reason}'
    ) from error


def _tensors(file: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """Names and tensors as float32, which holds all that their dtypes do."""
  if not file.is_file():
    pickled = file.with_name('adapter_model.bin')
    why = f'no {WEIGHTS}'
    if pickled.exists():
      why += (
        f', only {pickled.name}, a pickle, which runs code when it is read; '
        'save it again with safe_serialization=True'
      )
    raise ValueError(f'config.adapt.path: {file.parent} has {why}.')
  for name, stored in tensors.Mapped(file).tensors.items():
    if stored.dtype not in tensors.DTYPES:
      allowed = ', '.join(tensors.DTYPES)
      raise ValueError(
        f'{file}: {name} is {stored.dtype}; allowed are {allowed}.'
      )
    yield name, stored[...].astype(np.float32)
