"""Weights as safetensors files, one tensor at a time.

Names and shapes follow from the declarations, so a file's header is written
before any value is there. The host holds one layer of one weight.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import decoder, weights
from tuner.models import tensors as tensors_lib

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in tensors_lib.DTYPES.items()}


@dataclasses.dataclass
class File:
  """A safetensors file to be: the shapes of its tensors, in order."""

  dtype: np.dtype
  shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  size_bytes: int = 0

  def add(self, name: str, shape: tuple[int, ...]) -> None:
    self.shapes[name] = shape
    self.size_bytes += math.prod(shape) * self.dtype.itemsize

  def header(self) -> bytes:
    """What the file begins with, padded so that the tensors are aligned."""
    entries: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name, shape in self.shapes.items():
      start, end = end, end + math.prod(shape) * self.dtype.itemsize
      entries[name] = {
        'dtype': _NAMES[self.dtype.name],
        'shape': shape,
        'data_offsets': [start, end],
      }
    text = json.dumps(entries, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text


def write_files(
  path: pathlib.Path,
  model: decoder.Decoder,
  value_of: Callable[[str], Any],
  dtype: str = 'float32',
  shard_bytes: int | None = None,
) -> dict[str, File]:
  """Writes the weights in files of at most shard_bytes; {file name: File}.

  value_of(path) gives a weight when it is its turn. Raises ValueError where a
  value does not fit the dtype, or is not of the declared shape.
  """
  rows, sizes = weights.rows(model), model.config.sizes
  plan = _plan(rows, sizes, jnp.dtype(dtype), shard_bytes or SHARD_BYTES)
  tensors = _tensors(rows, sizes, value_of)
  for file_name, file in plan.items():
    with (path / file_name).open('wb') as stream:
      stream.write(file.header())
      for name, shape in file.shapes.items():
        found, value = next(tensors)
        assert (found, value.shape) == (name, shape), (found, value.shape)
        value = tensors_lib.cast(value, file.dtype, name)
        stream.write(value.view(np.uint8).data)
        del value  # Before the next one is made.
      stream.flush()
      os.fsync(stream.fileno())
  return plan


def write_index(path: pathlib.Path, files: Mapping[str, File]) -> None:
  """The index of several files; of a single one, nothing."""
  if len(files) == 1:
    return
  weight_map = {name: f for f, file in files.items() for name in file.shapes}
  total = sum(file.size_bytes for file in files.values())
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  text = json.dumps(index, indent=2, sort_keys=True)
  (path / tensors_lib.INDEX).write_text(text + '\n')


def _plan(rows, sizes, dtype, most) -> dict[str, File]:
  """Which file holds which tensors."""
  files = [File(dtype)]
  for row in rows.values():
    shape = row.hf_shape(sizes)
    size = math.prod(shape) * dtype.itemsize
    for name in row.names(sizes).values():
      if files[-1].shapes and files[-1].size_bytes + size > most:
        files.append(File(dtype))
      files[-1].add(name, shape)
  if len(files) == 1:
    return {tensors_lib.SINGLE: files[0]}
  total = len(files)
  return {
    f'model-{i:05d}-of-{total:05d}.safetensors': file
    for i, file in enumerate(files, 1)
  }


def _tensors(rows, sizes, value_of) -> Iterator[tuple[str, np.ndarray]]:
  for row in rows.values():
    value = value_of(row.path)
    if value.shape != row.shape(sizes):
      raise ValueError(
        f'{row.path} has shape {value.shape}; its dims {row.dims} are '
        f'{row.shape(sizes)}.'
      )
    yield from hf_tensors(row, value, sizes)


def hf_tensors(
  row: weights.Row, value: Any, sizes: Mapping[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
  """A declared array as its Hugging Face tensors: the inverse of reading.

  Of an array on devices, a layer at a time comes to the host.
  """
  letters, groups = row.dims[len(row.stacked) :], ''.join(row.groups)
  order = [letters.index(d) for d in groups]
  held: Any = None
  for index, name in row.names(sizes).items():
    if held is None or held[0] != index[:1]:
      held = index[:1], _on_host(value, index[:1])
    one = held[1][index[1:]].transpose(order)
    if not one.flags.c_contiguous:
      turned = np.empty(one.shape, one.dtype)
      tensors_lib.copy(turned, one, name)
      one = turned
      del turned
    yield name, one.reshape(row.hf_shape(sizes))


def _on_host(value: Any, index: tuple[int, ...]) -> np.ndarray:
  """value[index] as numpy; index is () or one number."""
  if not isinstance(value, jax.Array):
    return np.asarray(value)[index]
  if index:
    return np.asarray(_layer(value, np.int32(index[0])))
  if len(value.sharding.device_set) == 1 or not value.is_fully_addressable:
    return np.asarray(value)
  out = np.empty(value.shape, value.dtype)
  for shard in value.addressable_shards:
    if not shard.replica_id:  # An array keeps what numpy was given of it.
      out[shard.index] = np.asarray(jnp.copy(shard.data))
  return out


@jax.jit
def _layer(value: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(value, index, keepdims=False)
