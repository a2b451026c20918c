"""A Hugging Face directory in and out, by the declarations alone.

`load` reads safetensors slices straight into each device's part of each
weight; `write` puts the same tensors back, bit for bit. Only safetensors and
JSON are read: never pickles.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from tuner import named
from tuner.models import decoder, families, weights

SHARD_BYTES = 5 * 10**9
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


def is_id(path_or_id: str) -> bool:
  """Whether it is written as a hub id, 'org/name', and not as a path."""
  return path_or_id.count('/') == 1 and path_or_id[0] not in './~'


def directory(path_or_id: str, revision: str | None = None) -> pathlib.Path:
  """The local directory of a model: the path itself, or the hub's snapshot.

  Raises ValueError when it is neither.
  """
  path = pathlib.Path(path_or_id).expanduser()
  if path.is_dir():
    return path
  if not is_id(path_or_id):
    raise ValueError(
      f'config.model.path: {path} is not a directory, and {path_or_id!r} is '
      'not a hub id like "org/name".'
    )
  import huggingface_hub  # Slow to import, and not needed for a local path.

  return pathlib.Path(
    huggingface_hub.snapshot_download(
      path_or_id,
      revision=revision,
      allow_patterns=['*.json', '*.safetensors', '*.jinja', '*.model'],
      ignore_patterns=['consolidated*', 'original/*'],  # The same, again.
    )
  )


def base_directory(path: str, revision: str | None = None) -> pathlib.Path:
  """`directory` of config.model.path, which its errors name."""
  local = pathlib.Path(path).expanduser()
  if not path or not (is_id(path) or local.is_dir()):
    found = named.existing_path(path, 'config.model.path')
    raise ValueError(f'config.model.path: {found} is a file, not a directory.')
  try:
    return directory(path, revision)
  except OSError as error:  # All that the hub raises: no network, no such id.
    reason = (str(error).splitlines() or [''])[0]
    raise RuntimeError(
      f'config.model.path: {path!r} is no directory here, and the hub did not '
      f'give it: {reason}'
    ) from error


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """config.json of a model directory. Raises ValueError naming the file."""
  file = path / 'config.json'
  if not file.is_file():
    raise ValueError(f'{file} is missing: {path} is not a model directory.')
  config = _read_json(file)
  if 'auto_map' in config:
    raise ValueError(f'{file}: auto_map: code in model directories is not run.')
  return config


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{file} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{file} is not a JSON object.')
  return value


def declare(path: pathlib.Path) -> decoder.Decoder:
  """The declared model of a directory; its weights are not read."""
  return families.decoder_of(read_config(path))


class Tensors:
  """The tensors of a directory's safetensors files, by name.

  Opening reads headers only. Raises ValueError for missing, broken or stray
  files, naming them.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._files: dict[pathlib.Path, Any] = {}
    self.file_of = _file_of(path)

  def __contains__(self, name: str) -> bool:
    return name in self.file_of

  def slice_of(self, name: str):
    """A lazily read tensor: get_shape(), get_dtype(), [slices]."""
    file = self.file_of[name]
    try:
      return self._open(file).get_slice(name)
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{file}: {name} is not in it, and the index says so.'
      ) from error

  def _open(self, file: pathlib.Path):
    if file not in self._files:
      self._files[file] = _safe_open(file)
    return self._files[file]


def _safe_open(file: pathlib.Path):
  try:
    return safetensors.safe_open(file, framework='numpy')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{file}: not a readable safetensors file: {error}') from (
      error
    )


def _file_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file that holds each tensor, by the index or the one file there."""
  index = path / 'model.safetensors.index.json'
  if index.is_file():
    names = _read_json(index).get('weight_map')
    if not isinstance(names, dict):
      raise ValueError(f'{index} has no weight_map.')
    for name, file in names.items():
      if pathlib.PurePath(str(file)).name != file:
        raise ValueError(f'{index}: {name}: {file!r} is not a plain file name.')
      if not (path / file).is_file():
        raise ValueError(f'{index}: {name}: {file} is not in {path}.')
    return {name: path / file for name, file in names.items()}
  single = path / 'model.safetensors'
  if not single.is_file():
    raise ValueError(
      f'{path} holds neither model.safetensors nor an index; only safetensors '
      'are read.'
    )
  return dict.fromkeys(_safe_open(single).keys(), single)


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a model directory, sorted."""
  return sorted(set(_file_of(path).values()))


def weights_hash(path: pathlib.Path) -> str:
  """sha256 over the directory's weight files, names and bytes."""
  total = hashlib.sha256()
  for file in weight_files(path):
    with file.open('rb') as stream:
      digest = hashlib.file_digest(stream, 'sha256').hexdigest()
    total.update(f'{file.name} {digest}\n'.encode())
  return total.hexdigest()


def check(
  tensors: Tensors, rows: Mapping[str, weights.Row], sizes: Mapping[str, int]
) -> None:
  """Raises one ValueError with every missing, extra and misshapen tensor."""
  problems, wanted = [], set()
  for row in rows.values():
    expected = row.hf_shape(sizes)
    for name in row.names(sizes).values():
      wanted.add(name)
      problems += _problem(tensors, row, name, expected)
  extra = [n for n in tensors.file_of if n not in wanted and not _ignored(n)]
  problems += [f'{name} is there, and no weight wants it' for name in extra]
  if problems:
    listed = '\n  '.join(problems[:20])
    raise ValueError(
      f'{tensors.path}: {len(problems)} tensors do not fit config.json:\n  '
      f'{listed}'
    )


def _problem(tensors, row, name, expected) -> list[str]:
  if name not in tensors:
    return [f'{name} is missing (dims {row.dims})']
  found = tensors.slice_of(name)
  problems = []
  if tuple(found.get_shape()) != expected:
    shape = tuple(found.get_shape())
    problems.append(
      f'{name} has shape {shape}; config.json implies {expected} = {row.layout}'
    )
  if found.get_dtype() not in DTYPES:
    problems.append(
      f'{name} has dtype {found.get_dtype()}; read are {", ".join(DTYPES)}'
    )
  return problems


def _ignored(name: str) -> bool:
  """Buffers that old exporters wrote; a tied head stored a second time."""
  return name.endswith('rotary_emb.inv_freq') or name == 'lm_head.weight'


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
  tensors = Tensors(path)
  check(tensors, rows, sizes)
  if model.config.tied:
    _check_tied(tensors)

  def read(row):
    place = sharding(row) if sharding else _first_device()
    shape = row.shape(sizes)
    part = _Reader(tensors, row, sizes, np.dtype(dtype))
    return jax.make_array_from_callback(shape, place, part)

  # Few at a time: each holds its part on the host until the device has it.
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return dict(zip(rows, pool.map(read, rows.values()), strict=True))


def _first_device() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _check_tied(tensors: Tensors) -> None:
  """A head stored beside a tied embedding must equal it."""
  if 'lm_head.weight' not in tensors:
    return
  head = tensors.slice_of('lm_head.weight')[:]
  if not np.array_equal(head, tensors.slice_of('model.embed_tokens.weight')[:]):
    raise ValueError(
      f'{tensors.path}: config.json ties the head to the embedding, and '
      'lm_head.weight differs from model.embed_tokens.weight.'
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
  """index into the declared array -> that part of it, from the file."""

  tensors: Tensors
  row: weights.Row
  sizes: Mapping[str, int]
  dtype: np.dtype

  def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
    row, sizes = self.row, self.sizes
    whole = dict(zip(row.dims, row.shape(sizes), strict=True))
    parts = dict(zip(row.dims, index, strict=True))
    spans = {d: parts[d].indices(whole[d])[:2] for d in row.dims}
    names, over = row.names(sizes), row.stacked
    out = np.empty([b - a for a, b in spans.values()], self.dtype)
    for place in itertools.product(*(range(*spans[d]) for d in over)):
      here = tuple(i - spans[d][0] for i, d in zip(place, over, strict=True))
      out[here] = self._one(names[place], row.dims[len(over) :], spans)
    return out

  def _one(self, name, letters, spans) -> np.ndarray:
    """One Hugging Face tensor's part, in the order of `letters`."""
    groups, sizes = self.row.groups, self.sizes
    reads, inner = [], []
    for group in groups:
      first, rest = group[0], math.prod(sizes[d] for d in group[1:])
      a, b = spans[first]
      reads.append(slice(a * rest, b * rest))
      inner += [slice(None)] + [slice(*spans[d]) for d in group[1:]]
    value = self.tensors.slice_of(name)[tuple(reads)]
    order = ''.join(groups)
    firsts = {group[0] for group in groups}
    split = [
      spans[d][1] - spans[d][0] if d in firsts else sizes[d] for d in order
    ]
    value = value.reshape(split)[tuple(inner)]
    return value.transpose([order.index(d) for d in letters])


def hf_tensors(
  row: weights.Row, value: np.ndarray, sizes: Mapping[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
  """A declared array as its Hugging Face tensors: the inverse of reading."""
  letters = row.dims[len(row.stacked) :]
  order = [letters.index(d) for d in ''.join(row.groups)]
  shape = row.hf_shape(sizes)
  for index, name in row.names(sizes).items():
    one = value[index].transpose(order).reshape(shape)
    yield name, np.ascontiguousarray(one)


def write(
  path: pathlib.Path,
  model: decoder.Decoder,
  value_of: Callable[[str], jax.Array],
  dtype: str = 'float32',
) -> None:
  """Writes the weights as safetensors, in files of at most 5 GB, with index.

  value_of(path) gives a weight when it is its turn, so that one file's worth
  of weights is held at a time.
  """
  rows, sizes = weights.rows(model), model.config.sizes
  files: list[tuple[list[str], int]] = []
  shard: dict[str, np.ndarray] = {}

  def held():
    return sum(tensor.nbytes for tensor in shard.values())

  def flush():
    files.append((list(shard), held()))
    _save(path / f'model-{len(files):05d}.safetensors', shard)
    shard.clear()

  for row in rows.values():
    host = np.asarray(value_of(row.path)).astype(dtype)
    for name, tensor in hf_tensors(row, host, sizes):
      if shard and held() + tensor.nbytes > SHARD_BYTES:
        flush()
      shard[name] = tensor
  flush()
  _name_shards(path, files)


def _name_shards(
  path: pathlib.Path, files: list[tuple[list[str], int]]
) -> None:
  """One file becomes model.safetensors; several get an index.

  files: the names of each file's tensors and their size in bytes.
  """
  if len(files) == 1:
    (path / 'model-00001.safetensors').rename(path / 'model.safetensors')
    return
  weight_map, total = {}, 0
  for i, (names, size) in enumerate(files, 1):
    final = f'model-{i:05d}-of-{len(files):05d}.safetensors'
    (path / f'model-{i:05d}.safetensors').rename(path / final)
    total += size
    weight_map.update(dict.fromkeys(names, final))
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  text = json.dumps(index, indent=2, sort_keys=True)
  (path / 'model.safetensors.index.json').write_text(text + '\n')


def _save(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
