"""A Hugging Face directory: where it is, what it declares, which one it is.

`load` reads its weights and `write` puts the same tensors back, bit for bit,
by the declarations alone. Only safetensors and JSON are read: never pickles.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from tuner import named
from tuner.models import decoder, families, save, tensors, written
from tuner.models import load as load_lib

load = load_lib.load
hf_tensors = save.hf_tensors
weight_files = tensors.files
Tensors = tensors.Tensors
written_config = written.written_config
# Formats of config.json's quantization_config that are read.
DEQUANTISED = ('mxfp4',)
AT_REST_S = 2.0  # A file written later may change within its time stamp.


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
    if (path / 'adapter_config.json').is_file():
      raise ValueError(
        f'{path} is an adapter of `peft`, not a model: config.model.path takes '
        'the base that it was trained on; then go on from it with '
        f"config.adapt = dict(name='peft', path={str(path)!r})."
      )
    raise ValueError(f'{file} is missing: {path} is not a model directory.')
  config = tensors.read_json(file)
  if quantised := config.get('quantization_config'):
    _check_quantised(file, quantised)
  return config


def _check_quantised(file: pathlib.Path, found: Any) -> None:
  method = found.get('quant_method') if isinstance(found, dict) else found
  if method not in DEQUANTISED:
    raise ValueError(
      f'{file}: quantization_config: {method or found!r}: weights that are '
      f'already quantised are not read, {", ".join(DEQUANTISED)} apart; give '
      'the unquantised model.'
    )


def declare(path: pathlib.Path) -> decoder.Decoder:
  """The declared model of a directory; its weights are not read."""
  return families.decoder_of(read_config(path))


def weights_hash(
  path: pathlib.Path, cache_dir: pathlib.Path | None = None
) -> str:
  """sha256 over the directory's weight files, names and bytes.

  Files are hashed several at once, and each once only where cache_dir, a
  directory to be, keeps what was found for its place, inode, size and time.
  """
  total, files = hashlib.sha256(), weight_files(path)
  with concurrent.futures.ThreadPoolExecutor(load_lib.THREADS) as pool:
    digests = pool.map(lambda file: _file_hash(file, cache_dir), files)
    for file, digest in zip(files, digests, strict=True):
      total.update(f'{file.name} {digest}\n'.encode())
  return total.hexdigest()


def _file_hash(file: pathlib.Path, cache_dir: pathlib.Path | None) -> str:
  kept = _kept(file, cache_dir)
  if kept is not None and kept.is_file():
    digest = kept.read_text(encoding='ascii', errors='replace').strip()
    if len(digest) == 64:
      return digest
  digest = _digest(file, *_version(file))
  if kept is not None and kept == _kept(file, cache_dir):
    _keep(kept, digest)
  return digest


def _kept(
  file: pathlib.Path, cache_dir: pathlib.Path | None
) -> pathlib.Path | None:
  """Where the hash of a file as it is now is kept; None: nowhere."""
  if cache_dir is None or abs(time.time() - file.stat().st_mtime) < AT_REST_S:
    return None
  key = hashlib.sha256(json.dumps(_version(file)).encode()).hexdigest()
  return cache_dir / key


def _version(file: pathlib.Path) -> tuple[str | int, ...]:
  """What changes when a file does."""
  status = file.stat()
  return (
    os.path.realpath(file),
    status.st_ino,
    status.st_size,
    status.st_mtime_ns,
    status.st_ctime_ns,
  )


@functools.lru_cache(maxsize=1024)
def _digest(file: pathlib.Path, *version) -> str:
  """sha256 of a file, once in a process for each version of it."""
  del version
  with file.open('rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def _keep(kept: pathlib.Path, digest: str) -> None:
  """Writes a cache entry; a cache that cannot be written is none."""
  scratch = kept.with_name(f'.{kept.name}.{os.getpid()}')
  try:
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(digest + '\n', encoding='ascii')
    scratch.replace(kept)
  except OSError:
    with contextlib.suppress(OSError):
      scratch.unlink(missing_ok=True)


def revision_of(base_dir: pathlib.Path) -> str | None:
  """The hub's commit of a directory in its cache; None of any other."""
  is_snapshot = base_dir.parent.name == 'snapshots'
  return base_dir.name if is_snapshot else None


def identity(
  base_dir: pathlib.Path,
  path: str,
  revision: str | None = None,
  cache_dir: pathlib.Path | None = None,
) -> dict[str, str | None]:
  """{'path', 'revision', 'weights'}: which base it is.

  path: as config.model.path says it. revision: as the hub resolved it; where
  None, what the directory's place in the hub's cache says.
  """
  return {
    'path': path,
    'revision': revision or revision_of(base_dir),
    'weights': weights_hash(base_dir, cache_dir),
  }


def check_identity(
  then: dict[str, Any], now: dict[str, Any], where: str
) -> None:
  """Raises ValueError where a base is another one than `then`.

  Its bytes decide: the same weights at another path are the same base.
  where: what was made from the base of `then`.
  """
  if then.get('weights') == now['weights']:
    return
  raise ValueError(
    f'{where}: another base.\n'
    f'  it was made from {_said(then)}\n'
    f'  here is          {_said(now)}\n'
    'Set config.model.path and config.model.revision to the former.'
  )


def _said(base: dict[str, Any]) -> str:
  return (
    f'{base.get("path")} at revision {base.get("revision")}, weights sha256 '
    f'{base.get("weights")}'
  )


def write(
  path: pathlib.Path,
  model: decoder.Decoder,
  value_of: Callable[[str], Any],
  dtype: str = 'float32',
  shard_bytes: int | None = None,
) -> None:
  """Writes the weights as safetensors, with an index where they are several.

  value_of(path) gives a weight when it is its turn; files are of at most
  shard_bytes, 5 GB where None; see save.write_files.
  """
  files = save.write_files(path, model, value_of, dtype, shard_bytes)
  _name_shards(path, files)


_name_shards = save.write_index
