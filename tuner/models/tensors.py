"""The tensors of a directory's safetensors files, by name.

A file is mapped into memory, and a tensor is a view of it: only what is copied
out of a slice is read, and `forget` gives the pages back. The header is
believed no further than the file reaches. The format is
https://github.com/huggingface/safetensors: eight bytes that say how long the
header is, a JSON header, and the bytes of the tensors, end to end.
"""

import dataclasses
import json
import math
import mmap
import pathlib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# What weights are read from and written to, by the format's names.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_BYTES = {  # of an element, by the first number in the format's name
  '8': 1, '16': 2, '32': 4, '64': 8,
}  # fmt: skip
_PACKED = {'U8': 'uint8', 'I8': 'int8', 'I32': 'int32', 'I64': 'int64'}
MAX_HEADER_BYTES = 100 * 10**6  # As the format's own reader.


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a mapped file; where it begins and ends, in bytes."""

  file: 'Mapped'
  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int

  def get_shape(self) -> list[int]:
    return list(self.shape)

  def get_dtype(self) -> str:
    """The format's name of it: 'BF16'."""
    return self.dtype

  def __getitem__(self, index: Any) -> np.ndarray:
    """A view of the file: nothing is read before it is copied."""
    kind = jnp.dtype({**DTYPES, **_PACKED}[self.dtype])
    count = math.prod(self.shape)
    if not count:
      return np.empty(self.shape, kind)[index]
    flat = np.frombuffer(self.file.pages, kind, count, self.start)
    return flat.reshape(self.shape)[index]


class Mapped:
  """A safetensors file in memory, its header checked.

  Raises ValueError naming the file and what it holds instead.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      with path.open('rb') as stream:
        head, size = stream.read(512), stream.seek(0, 2)
        if size < 8:
          raise _unreadable(path, f'it has {size} bytes')
        self.pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
      raise _unreadable(path, str(error)) from error
    try:
      first, header = self._header(size)
    except ValueError as error:
      raise _unreadable(path, is_no_model_file(head) or str(error)) from None
    self.tensors = self._tensors(header, first, size)

  def _header(self, size: int) -> tuple[int, dict[str, Any]]:
    """(where the tensors begin, what the header says of each)."""
    length = int.from_bytes(self.pages[:8], 'little')
    if length > min(size - 8, MAX_HEADER_BYTES):
      raise ValueError(f'its header of {length:,} bytes is not in its {size:,}')
    try:
      header = json.loads(self.pages[8 : 8 + length])
    except ValueError as error:
      raise ValueError(f'its header is not JSON: {error}') from None
    if not isinstance(header, dict):
      raise ValueError('its header is not a JSON object')
    header.pop('__metadata__', None)
    return 8 + length, header

  def _tensors(self, header, first: int, size: int) -> dict[str, Stored]:
    """The tensors, which fill the file from `first` to its end."""
    found = {}
    for name, entry in header.items():
      try:
        found[name] = self._stored(entry, first)
      except (TypeError, KeyError, ValueError) as error:
        raise _unreadable(self.path, f'header: {name}: {error}') from None
    end = first
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
      if tensor.start != end:
        raise _unreadable(
          self.path, f'header: {name} begins at byte {tensor.start}, not {end}'
        )
      end = tensor.end
    if end != size:
      raise _unreadable(
        self.path, f'its header speaks of {end:,} bytes; there are {size:,}'
      )
    return found

  def _stored(self, entry: dict[str, Any], first: int) -> Stored:
    """Raises an error of Python where the header is not as it should be."""
    dtype, shape = str(entry['dtype']), tuple(map(int, entry['shape']))
    start, end = map(int, entry['data_offsets'])
    digits = ''.join(c for c in dtype.partition('_')[0] if c.isdigit())
    width = _BYTES.get(digits, 1 if dtype == 'BOOL' else None)
    wanted = math.prod(shape) * (width or 0)
    if min(shape, default=0) < 0 or (width and end - start != wanted):
      raise ValueError(
        f'{dtype} {list(shape)} in bytes {start} to {end}; wanted: '
        f'{wanted} bytes'
      )
    return Stored(self, dtype, shape, first + start, first + end)

  def forget(self, tensor: Stored) -> None:
    """Lets go of the pages of a tensor; they stay in the system's cache."""
    start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, 'MADV_DONTNEED') and tensor.end > start:
      self.pages.madvise(mmap.MADV_DONTNEED, start, tensor.end - start)


def _unreadable(path: pathlib.Path, reason: str) -> ValueError:
  return ValueError(f'{path}: not a readable safetensors file: {reason}')


def is_no_model_file(head: bytes) -> str:
  """What a file that begins so is instead of a model's, or ''."""
  if head.startswith(b'version https://git-lfs'):
    return (
      'it is a pointer of Git LFS, and the file itself was not fetched; run '
      '`git lfs pull` there'
    )
  if head.lstrip()[:9].lower().startswith((b'<!doctype', b'<html')):
    return 'it is an HTML page, as a failed download leaves; fetch it again'
  if head.startswith((b'\x80\x02', b'PK\x03\x04')):
    return 'it is a pickle or a zip; only safetensors are read'
  if head.startswith(b'GGUF'):
    return 'it is a GGUF file; give it as config.model.path by itself'
  return ''


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object. Raises ValueError naming the file."""
  data = file.read_bytes()
  try:
    value = json.loads(data.decode('utf-8'))
  except ValueError as error:
    reason = is_no_model_file(data[:512]) or error
    raise ValueError(f'{file} is not JSON: {reason}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{file} is not a JSON object.')
  return value


class Tensors:
  """The tensors of a directory, by name, from whichever file holds them.

  Opening reads headers only. Raises ValueError for missing, broken or stray
  files, naming them. `virtual` are tensors that stand for others: anything
  with get_shape(), get_dtype() and [slices].
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._files: dict[pathlib.Path, Mapped] = {}
    self.file_of = _file_of(path)
    self.virtual: dict[str, Any] = {}
    self.made_of: dict[str, list[str]] = {}
    self._hidden: dict[str, pathlib.Path] = {}

  def __contains__(self, name: str) -> bool:
    return name in self.virtual or name in self.file_of

  def names(self) -> list[str]:
    return [*self.file_of, *self.virtual]

  def replace(self, virtual: dict[str, Any], stored: Iterable[str]) -> None:
    """Puts `virtual` in the place of the stored tensors that they are made of.

    Those can still be read by their names (`slice_of`), which begin with the
    name of what they make.
    """
    for name in set(stored):
      self._hidden[name] = self.file_of.pop(name)
    self.virtual.update(virtual)
    for name in virtual:
      self.made_of[name] = [n for n in self._hidden if n.startswith(name)]

  def slice_of(self, name: str) -> Any:
    """A lazily read tensor: get_shape(), get_dtype(), [slices]."""
    return self.virtual[name] if name in self.virtual else self._stored(name)

  def forget(self, names: Iterable[str]) -> None:
    """Lets go of the pages that reading these has mapped."""
    for name in names:
      for stored in self.made_of.get(name, [name]):
        tensor = self._stored(stored)
        tensor.file.forget(tensor)

  def _stored(self, name: str) -> Stored:
    file = self.file_of.get(name) or self._hidden[name]
    if file not in self._files:
      self._files[file] = Mapped(file)
    if name not in self._files[file].tensors:
      raise ValueError(f'{file}: {name} is not in it, and the index says so.')
    return self._files[file].tensors[name]


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a model directory, sorted."""
  return sorted(set(_file_of(path).values()))


def _file_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file that holds each tensor, by the index or the one file there."""
  index, single = path / INDEX, path / SINGLE
  if not index.is_file():
    if not single.is_file():
      raise ValueError(
        f'{path} holds neither {SINGLE} nor an index; only safetensors are '
        'read.'
      )
    return dict.fromkeys(Mapped(single).tensors, single)
  names = read_json(index).get('weight_map')
  if not isinstance(names, dict):
    raise ValueError(f'{index} has no weight_map.')
  for name, file in names.items():
    if pathlib.PurePath(str(file)).name != file:
      raise ValueError(f'{index}: {name}: {file!r} is not a plain file name.')
    if not (path / file).is_file():
      raise ValueError(f'{index}: {name}: {file} is not in {path}.')
  return {name: path / file for name, file in names.items()}


ROWS = 16  # copied at once where axes change places


def copy(target: np.ndarray, value: np.ndarray, name: str = '') -> None:
  """target[...] = value, cast to its dtype; an overflow is a ValueError.

  Written for two arrays whose axes lie in memory in different orders, where
  numpy goes through one of them against the grain: a few rows of the source
  at a time stay in the cache (10 x as fast for 8192 x 2048 in bfloat16).
  """
  near, far = _fastest(target), _fastest(value)
  if near == far:  # Blocks bound what a cast holds.
    step = max(1, 2**20 // max(1, value[:1].size)) if value.ndim else 1
    for i in range(0, len(value) if value.ndim else 1, step):
      span = slice(i, i + step) if value.ndim else ...
      _copy_block(target[span], value[span], name)
    return
  others = [d for d in range(value.ndim) if d not in (near, far)]
  for place in np.ndindex(*(value.shape[d] for d in others)):
    index: list[Any] = [slice(None)] * value.ndim
    for d, i in zip(others, place, strict=True):
      index[d] = i
    for i in range(0, value.shape[near], ROWS):
      index[near] = slice(i, i + ROWS)
      _copy_block(target[tuple(index)], value[tuple(index)], name)


def _fastest(x: np.ndarray) -> int:
  """The axis along which neighbours in memory lie."""
  steps = [(abs(s), -d) for d, s in enumerate(x.strides) if x.shape[d] > 1]
  return -min(steps)[1] if steps else 0


def _copy_block(target, value, name) -> None:
  bits = f'u{target.dtype.itemsize}'  # numpy moves its own dtypes faster.
  target.view(bits)[...] = cast(value, target.dtype, name).view(bits)


def cast(value: np.ndarray, dtype: Any, name: str = '') -> np.ndarray:
  """The values in another floating dtype, rounded to the nearest.

  Raises ValueError where a finite value becomes infinite.
  """
  dtype = np.dtype(dtype)
  if value.dtype == dtype:
    return value
  with np.errstate(over='ignore'):
    out = value.astype(dtype)
  limit = float(jnp.finfo(dtype).max)
  if float(jnp.finfo(value.dtype).max) <= limit:
    return out
  if (over := np.isinf(out) & np.isfinite(value)).any():
    worst = np.abs(value[over].astype(np.float64)).max()
    raise ValueError(
      f'{name}: the value {worst:g} does not fit {dtype}, which ends at '
      f'{limit:g}; choose bfloat16 or float32.'
    )
  return out
