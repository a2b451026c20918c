"""The base's directory: a Hugging Face one, or one made of a GGUF file.

A GGUF file is converted once, into a directory of the cache that is found
again by the file's name, size, time and first megabyte.
"""

import hashlib
import json
import pathlib

from tuner import dataset, rundir
from tuner.models import hub

GGUF = b'GGUF'
HEAD_BYTES = 2**20


def find(path: str, revision: str | None = None) -> pathlib.Path:
  """The Hugging Face directory of config.model.path.

  Raises ValueError for what is no model, and RuntimeError where the hub does
  not give one.
  """
  file = pathlib.Path(path).expanduser() if path else None
  if file is None or not file.is_file() or not _is_gguf(file):
    if file is not None and file.is_file() and file.suffix == '.gguf':
      raise ValueError(f'config.model.path: {path} {_instead(file)}')
    return hub.base_directory(path, revision)
  if revision is not None:
    raise ValueError(
      f'config.model.revision: {revision!r}; {path} is a file, which has none.'
    )
  found = dataset.cache_dir() / 'gguf' / _key(file)
  if not found.is_dir():
    from tuner.llamacpp import read  # Its libraries are optional.

    try:
      needed = read.float32_bytes(file)
      rundir.check_space(_existing(found), needed)
      read.convert(file, found)
    except FileExistsError:  # Another process was quicker.
      pass
  return found


def _is_gguf(file: pathlib.Path) -> bool:
  with file.open('rb') as stream:
    return stream.read(len(GGUF)) == GGUF


def _instead(file: pathlib.Path) -> str:
  with file.open('rb') as stream:
    head = stream.read(8)
  if not head:
    return 'is empty; wanted: a GGUF file.'
  return f"is not a GGUF file: it begins with {head!r}, one with b'GGUF'."


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The nearest directory above that is there."""
  return next(parent for parent in path.parents if parent.is_dir())


def _key(file: pathlib.Path) -> str:
  """The file's name and a hash of what changes when it does."""
  status = file.stat()
  with file.open('rb') as stream:
    head = hashlib.sha256(stream.read(HEAD_BYTES)).hexdigest()
  version = [file.name, status.st_size, status.st_mtime_ns, head]
  digest = hashlib.sha256(json.dumps(version).encode()).hexdigest()
  return f'{file.stem}-{digest[:16]}'


def weights_hash(base_dir: pathlib.Path) -> str:
  """`hub.weights_hash`, kept in the cache."""
  return hub.weights_hash(base_dir, dataset.cache_dir() / 'weights')


def identity(
  base_dir: pathlib.Path, path: str, revision: str | None = None
) -> dict[str, str | None]:
  """`hub.identity`, its hash kept in the cache."""
  cache_dir = dataset.cache_dir() / 'weights'
  return hub.identity(base_dir, path, revision, cache_dir)


def check_run(workdir: pathlib.Path, base_dir: pathlib.Path, path: str) -> None:
  """Raises ValueError where a run began on another base, naming both.

  path: as config.model.path says it. A run whose run.json does not say is
  known by the facts of its checkpoints alone.
  """
  try:
    then = json.loads((workdir / 'run.json').read_text(encoding='utf-8'))
    base = then['base']
  except (OSError, ValueError, KeyError, TypeError):
    return
  hub.check_identity(base, identity(base_dir, path), str(workdir))
