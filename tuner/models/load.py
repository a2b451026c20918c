"""Weights from a directory's tensors, each part straight to its device.

A device's part of a declared weight is put together in host memory from
slices of the Hugging Face tensors, one at a time a layer or expert, by several
threads. Parts that a device has not taken yet are few: the host holds the
largest part or AHEAD_BYTES, whichever is more, beyond what devices hold. On a
CPU the part is the device's own memory.
"""

import collections
import concurrent.futures
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import decoder, mxfp4, weights
from tuner.models import tensors as tensors_lib

AHEAD_BYTES = 2**29
THREADS = min(8, os.cpu_count() or 1)
ALIGNED_BYTES = 64  # So that XLA uses the memory of numpy on a CPU.
# Names of buffers, not weights, that old exporters wrote.
IGNORED = ('rotary_emb.inv_freq',)
TIED = ('lm_head.weight', 'model.embed_tokens.weight')


def load(
  path: pathlib.Path,
  model: decoder.Decoder,
  sharding: Callable[[weights.Row], jax.sharding.Sharding] | None = None,
  dtype: str = 'float32',
) -> dict[str, jax.Array]:
  """Every declared weight of a directory, by path, in its final sharding.

  Each device's part is read by itself, so that no weight is ever whole on a
  host that does not hold it. Raises ValueError when the tensors do not fit.
  """
  rows, sizes = weights.rows(model), model.config.sizes
  tensors = tensors_lib.Tensors(path)
  mxfp4.present(tensors)
  check(tensors, rows, sizes, model.config.ignored)
  if model.config.tied:
    check_tied(tensors)
  waiting, found = _Waiting(), {}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for row in rows.values():
      place = sharding(row) if sharding else _first_device()
      reader = Reader(tensors, row, sizes, jnp.dtype(dtype))
      found[row.path] = _array(reader, place, pool, waiting)
      tensors.forget(reader.names.values())
  return found


def _first_device() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _array(reader, place, pool, waiting) -> jax.Array:
  """A declared weight on the devices of this process."""
  shape = reader.row.shape(reader.sizes)
  devices = collections.defaultdict(list)
  for device, index in place.addressable_devices_indices_map(shape).items():
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    devices[spans].append(device)
  arrays = []
  for spans, group in devices.items():
    waiting.make_room(math.prod(b - a for a, b in spans), reader.dtype)
    part = reader.read(spans, pool)
    on_devices = [jax.device_put(part, device) for device in group]
    waiting.add(on_devices, part.nbytes)
    arrays += on_devices
  return jax.make_array_from_single_device_arrays(shape, place, arrays)


class _Waiting:
  """Parts on their way to devices, whose host memory is still held."""

  def __init__(self):
    self._parts: collections.deque = collections.deque()

  def add(self, arrays: list[jax.Array], size_bytes: int) -> None:
    self._parts.append((arrays, size_bytes))

  def make_room(self, count: int, dtype: np.dtype) -> None:
    """Waits until so many more elements are not too much to hold."""
    wanted = count * dtype.itemsize
    while self._parts and self._bytes() + wanted > AHEAD_BYTES:
      jax.block_until_ready(self._parts.popleft()[0])

  def _bytes(self) -> int:
    return sum(size for _, size in self._parts)


def _empty(shape, dtype) -> np.ndarray:
  """An array without values, at an address that XLA can use as its own."""
  size = math.prod(shape) * dtype.itemsize
  room = np.empty(size + ALIGNED_BYTES, np.uint8)
  first = -room.ctypes.data % ALIGNED_BYTES
  return room[first : first + size].view(dtype).reshape(shape)


class Reader:
  """Parts of one declared weight, from the file."""

  def __init__(
    self,
    tensors: tensors_lib.Tensors,
    row: weights.Row,
    sizes: Mapping[str, int],
    dtype: np.dtype,
  ):
    self.tensors, self.row, self.sizes = tensors, row, sizes
    self.dtype = np.dtype(row.kept_in or dtype)
    self.names = row.names(sizes)

  def read(self, spans: tuple[tuple[int, int], ...], pool=None) -> np.ndarray:
    """The declared array's elements within (start, stop) of each axis."""
    row = self.row
    out = _empty([b - a for a, b in spans], self.dtype)
    over = spans[: len(row.stacked)]
    inner = dict(zip(row.dims, spans, strict=True))
    firsts = [a for a, _ in over]

    def one(place):
      here = tuple(i - a for i, a in zip(place, firsts, strict=True))
      self._one(out[(*here, ...)], self.names[place], inner)

    places = itertools.product(*(range(*span) for span in over))
    list(pool.map(one, places) if pool else map(one, places))
    return out

  def _one(self, out: np.ndarray, name: str, spans) -> None:
    """One Hugging Face tensor's part, put into `out`, which has our axes."""
    if name not in self.tensors.virtual:
      return self._piece(out, name, spans)
    row = self.row  # It is made on reading: so little by little.
    first = row.groups[0][0]
    axis = row.dims[len(row.stacked) :].index(first)
    turned = np.moveaxis(out, axis, 0)
    for i, at in enumerate(range(*spans[first])):
      piece = np.moveaxis(turned[i : i + 1], 0, axis)
      self._piece(piece, name, spans | {first: (at, at + 1)})
    return None

  def _piece(self, out: np.ndarray, name: str, spans) -> None:
    row, sizes = self.row, self.sizes
    reads, inner, split = [], [], []
    for group in row.groups:
      first, rest = group[0], math.prod(sizes[d] for d in group[1:])
      a, b = spans[first]
      reads.append(slice(a * rest, b * rest))
      inner += [slice(None)] + [slice(*spans[d]) for d in group[1:]]
      split += [b - a] + [sizes[d] for d in group[1:]]
    value = self.tensors.slice_of(name)[tuple(reads)]
    value = value.reshape(split)[tuple(inner)]
    letters, order = row.dims[len(row.stacked) :], ''.join(row.groups)
    target = out.transpose([letters.index(d) for d in order])
    tensors_lib.copy(target, value, f'{self.tensors.path}: {name}')


def check(
  tensors: tensors_lib.Tensors,
  rows: Mapping[str, weights.Row],
  sizes: Mapping[str, int],
  ignored: tuple[str, ...] = (),
) -> None:
  """Raises one ValueError with every missing, extra and misshapen tensor.

  ignored: what the names of tensors begin with that may be there unread.
  """
  problems, wanted = [], set()
  for row in rows.values():
    expected = row.hf_shape(sizes)
    for name in row.names(sizes).values():
      wanted.add(name)
      problems += _problem(tensors, row, name, expected)
  extra = [
    name
    for name in tensors.names()
    if name not in wanted
    and not name.startswith(ignored)
    and not _ignored(name)
  ]
  problems += [f'{name} is there, and no weight wants it' for name in extra]
  if problems:
    more = [f'and {len(problems) - 20} more'] if len(problems) > 20 else []
    listed = '\n  '.join(problems[:20] + more)
    raise ValueError(
      f'{tensors.path}: {len(problems)} tensors do not fit config.json:\n  '
      f'{listed}'
    )


def _problem(tensors, row, name, expected) -> list[str]:
  if name not in tensors:
    tied = '; tied? Then config.json must say tie_word_embeddings: true'
    hint = tied if name == TIED[0] else ''
    return [f'{name} is missing (dims {row.dims}){hint}']
  found = tensors.slice_of(name)
  shape, problems = tuple(found.get_shape()), []
  if shape != expected:
    problems.append(
      f'{name} has shape {shape}; config.json implies {expected} = {row.layout}'
      + _resized(row, shape, expected)
    )
  if found.get_dtype() not in tensors_lib.DTYPES:
    problems.append(
      f'{name} has dtype {found.get_dtype()}; read are '
      f'{", ".join(tensors_lib.DTYPES)}'
    )
  return problems


def _resized(row, shape, expected) -> str:
  """What to do where only the rows of a vocabulary differ."""
  if not row.layout.startswith('V') or shape[1:] != expected[1:]:
    return ''
  return (
    f'; is the vocabulary resized? Then config.json must say vocab_size: '
    f'{shape[0]}'
  )


def _ignored(name: str) -> bool:
  """Buffers that old exporters wrote; a tied head stored a second time."""
  return name.endswith(IGNORED) or name == TIED[0]


def check_tied(tensors: tensors_lib.Tensors) -> None:
  """A head stored beside a tied embedding must equal it."""
  if TIED[0] not in tensors:
    return
  head, embed = (tensors.slice_of(name) for name in TIED)
  same = head.get_shape() == embed.get_shape()
  step = 1024
  for i in range(0, head.get_shape()[0] if same else 0, step):
    same = same and np.array_equal(head[i : i + step], embed[i : i + step])
  tensors.forget(TIED)
  if not same:
    raise ValueError(
      f'{tensors.path}: config.json ties the head to the embedding, and '
      f'{TIED[0]} differs from {TIED[1]}.'
    )
