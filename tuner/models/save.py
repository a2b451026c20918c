"""Weights as safetensors files, one tensor at a time.

Names and shapes follow from the declarations. The host holds one layer of one
weight.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import decoder, shards, weights
from tuner.models import tensors as tensors_lib

SHARD_BYTES = shards.MOST_BYTES


def write_files(
  path: pathlib.Path,
  model: decoder.Decoder,
  value_of: Callable[[str], Any],
  dtype: str = 'float32',
  shard_bytes: int | None = None,
) -> shards.Files:
  """Writes the weights in files of at most shard_bytes; what each file holds.

  value_of(path) gives a weight when it is its turn. dtype: of all weights but
  those that are kept in their own. Raises ValueError where a value does not
  fit the dtype, or is not of the declared shape.
  """
  rows, sizes = weights.rows(model), model.config.sizes
  tensors = _tensors(rows, sizes, value_of)

  def make(name: str, kind: np.dtype) -> np.ndarray:
    found, value = next(tensors)
    assert found == name, (found, name)
    return tensors_lib.cast(value, kind, name)

  entries = []
  for row in rows.values():
    kind, shape = jnp.dtype(row.kept_in or dtype), row.hf_shape(sizes)
    for name in row.names(sizes).values():
      made = functools.partial(make, name, kind)
      entries.append(shards.Entry(name, kind, shape, made))
  return shards.write_files(path, entries, shard_bytes or SHARD_BYTES)


write_index = shards.write_index


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
      held = index[:1], _on_host(value, index[:1], order)
    one = held[1][index[1:]].transpose(order)
    if not one.flags.c_contiguous:
      turned = np.empty(one.shape, one.dtype)
      tensors_lib.copy(turned, one, name)
      one = turned
      del turned
    yield name, one.reshape(row.hf_shape(sizes))


def _on_host(
  value: Any, index: tuple[int, ...], order: list[int]
) -> np.ndarray:
  """value[index] as numpy; index is () or one number.

  What was divided over devices lies in memory as its last axes in that order
  do: it is the only copy on the way to a file.
  """
  if not isinstance(value, jax.Array):
    return np.asarray(value)[index]
  if index:
    value = _layer(value, np.int32(index[0]))
  if len(value.sharding.device_set) == 1 or not value.is_fully_addressable:
    return np.asarray(value)
  lead = value.ndim - len(order)
  axes = [*range(lead), *(lead + axis for axis in order)]
  laid = np.empty([value.shape[axis] for axis in axes], value.dtype)
  out = laid.transpose(np.argsort(axes))
  for shard in value.addressable_shards:
    if not shard.replica_id:
      # An array keeps what numpy was given of it; this one is let go.
      part = jax.make_array_from_single_device_arrays(
        shard.data.shape, shard.data.sharding, [shard.data]
      )
      tensors_lib.copy(out[shard.index], np.asarray(part))
  return out


@jax.jit
def _layer(value: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(value, index, keepdims=False)
