"""Safetensors files read and written one tensor at a time.

`safetensors.numpy.save_file` wants all arrays at once and copies them: twice
the model in memory. Here the header, which needs only names and shapes, is
written first and the arrays follow as they are made.
"""

import json
import math
import os
import pathlib
import struct
import typing

import numpy as np

MOST_BYTES = 5 * 10**9
DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
ITEM_BYTES = {'F32': 4, 'F16': 2, 'BF16': 2}


class Entry(typing.NamedTuple):
  """A tensor to be written; make() gives its array when its turn comes."""

  name: str
  kind: str  # of DTYPES
  shape: tuple[int, ...]
  make: typing.Callable[[], np.ndarray]

  @property
  def n_bytes(self) -> int:
    return math.prod(self.shape) * ITEM_BYTES[self.kind]


def numpy_dtype(kind: str) -> np.dtype:
  """The numpy type of 'F32', 'F16' or 'BF16'."""
  if kind != 'BF16':
    return np.dtype(DTYPES[kind])
  import jax.numpy as jnp  # Its scalar type is the one safetensors reads.

  return np.dtype(jnp.bfloat16)


def write(
  folder: pathlib.Path, entries: list[Entry], most_bytes: int = MOST_BYTES
) -> None:
  """model.safetensors, or shards of at most `most_bytes` and their index."""
  entries = sorted(entries, key=lambda e: e.name)
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    held = sum(e.n_bytes for e in shards[-1])
    if shards[-1] and held + entry.n_bytes > most_bytes:
      shards.append([])
    shards[-1].append(entry)
  if len(shards) == 1:
    _write_file(folder / 'model.safetensors', shards[0])
    return
  weight_map: dict[str, str] = {}
  for i, shard in enumerate(shards):
    name = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    _write_file(folder / name, shard)
    weight_map |= {entry.name: name for entry in shard}
  total = sum(entry.n_bytes for entry in entries)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  text = json.dumps(index, indent=2) + '\n'
  (folder / 'model.safetensors.index.json').write_text(text, encoding='utf-8')


def _write_file(path: pathlib.Path, entries: list[Entry]) -> None:
  header: dict[str, typing.Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for entry in entries:
    start, end = end, end + entry.n_bytes
    header[entry.name] = {
      'dtype': entry.kind,
      'shape': list(entry.shape),
      'data_offsets': [start, end],
    }
  head = json.dumps(header, separators=(',', ':')).encode()
  head += b' ' * (-len(head) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(head)) + head)
    for entry in entries:
      array = np.ascontiguousarray(entry.make())
      assert array.shape == entry.shape, (entry.name, array.shape, entry.shape)
      assert array.dtype == numpy_dtype(entry.kind), (entry.name, array.dtype)
      file.write(array.view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


class Reader:
  """The tensors of a Hugging Face directory; `names` maps each to its file."""

  def __init__(self, folder: pathlib.Path):
    """Raises ValueError where there is no safetensors file or one is broken."""
    self.folder = folder
    index = folder / 'model.safetensors.index.json'
    if index.exists():
      weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
      files = sorted(set(weight_map.values()))
    else:
      files = ['model.safetensors']
    self.names: dict[str, str] = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._open: tuple[str, typing.Any] = ('', None)
    for file in files:
      for name, shape, kind in self._described(file):
        if kind not in DTYPES:
          raise ValueError(
            f'{folder / file}: {name} is {kind}; known are {", ".join(DTYPES)}.'
          )
        self.names[name] = file
        self._shapes[name] = shape

  def _described(self, file: str):
    import safetensors

    path = self.folder / file
    if not path.is_file():
      raise ValueError(f'{path} is missing.')
    try:
      with safetensors.safe_open(path, 'np') as opened:
        for name in opened.keys():
          part = opened.get_slice(name)
          yield name, tuple(part.get_shape()), part.get_dtype()
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{path}: not a whole safetensors file: {error}'
      ) from None

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def load(self, name: str) -> np.ndarray:
    """The tensor as it is stored."""
    import safetensors

    file = self.names[name]
    if self._open[0] != file:  # One at a time: its pages count as memory.
      opened = safetensors.safe_open(self.folder / file, 'np')
      self._open = (file, opened)
    return self._open[1].get_tensor(name)
