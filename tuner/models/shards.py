"""Safetensors files written one tensor at a time.

A header needs names and shapes alone, so it is written before any value is
there; the arrays follow as they are made.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tuner.models import tensors

MOST_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in tensors.DTYPES.items()}


class Entry(NamedTuple):
  """A tensor to be written; make() gives its array when its turn comes."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def size_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


Files = dict[str, list[Entry]]


def write_files(
  path: pathlib.Path, entries: Iterable[Entry], most_bytes: int = MOST_BYTES
) -> Files:
  """Writes files of at most most_bytes; which entries each file holds.

  make() is called once of each, in the entries' order.
  """
  files = _divided(entries, most_bytes)
  for name, held in files.items():
    with (path / name).open('wb') as stream:
      stream.write(_header(held))
      for entry in held:
        _write(stream, entry)
      stream.flush()
      os.fsync(stream.fileno())
  return files


def write_index(path: pathlib.Path, files: Mapping[str, list[Entry]]) -> None:
  """The index of several files; of a single one, nothing."""
  if len(files) == 1:
    return
  weight_map = {e.name: name for name, held in files.items() for e in held}
  total = sum(e.size_bytes for held in files.values() for e in held)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  text = json.dumps(index, indent=2, sort_keys=True)
  (path / tensors.INDEX).write_text(text + '\n')


def _divided(entries: Iterable[Entry], most_bytes: int) -> Files:
  """A file is full where the next entry does not fit."""
  files: list[list[Entry]] = [[]]
  size = 0
  for entry in entries:
    if files[-1] and size + entry.size_bytes > most_bytes:
      files.append([])
      size = 0
    files[-1].append(entry)
    size += entry.size_bytes
  if len(files) == 1:
    return {tensors.SINGLE: files[0]}
  total = len(files)
  return {
    f'model-{i:05d}-of-{total:05d}.safetensors': held
    for i, held in enumerate(files, 1)
  }


def _header(entries: list[Entry]) -> bytes:
  """What a file begins with, padded so that the tensors are aligned."""
  said: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for entry in entries:
    start, end = end, end + entry.size_bytes
    said[entry.name] = {
      'dtype': _NAMES[entry.dtype.name],
      'shape': entry.shape,
      'data_offsets': [start, end],
    }
  text = json.dumps(said, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text


def _write(stream, entry: Entry) -> None:
  """Its array is gone when this ends, before the next one is made."""
  array = np.ascontiguousarray(entry.make())
  assert array.shape == entry.shape, (entry.name, array.shape, entry.shape)
  assert array.dtype == entry.dtype, (entry.name, array.dtype, entry.dtype)
  stream.write(array.view(np.uint8).data)
