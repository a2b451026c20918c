"""Arrays that are built once and memory-mapped ever after.

An entry is a directory `<directory>/<key>/` of .npy files and a manifest with
the size and checksum of each. It is written beside its place and renamed, so
it is whole or absent; one that does not match its manifest is built again.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib

import numpy as np

MANIFEST = 'manifest.json'
BLOCK_BYTES = 2**22


def key(*parts):
  """sha256 hex over parts that JSON can hold."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def cached(directory, key, build):
  """{name: array} as `build()` returns it, read from the cache where it can be.

  The arrays are memory-mapped and read-only. `directory` None: always built.
  """
  if directory is None:
    return build()
  place = pathlib.Path(directory).expanduser() / key
  if not _is_whole(place):
    _save(place, build())
  return {
    path.stem: np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))
    for path in sorted(place.glob('*.npy'))
  }


def _is_whole(place):
  """Every file is there, of its size, and has its checksum."""
  try:
    manifest = json.loads((place / MANIFEST).read_text())
    names = {path.name for path in place.iterdir()} - {MANIFEST}
    return manifest.keys() == names != set() and all(
      _check(place / name) == manifest[name] for name in names
    )
  except (OSError, ValueError, AttributeError, TypeError):
    return False


def _check(path):
  """[bytes, crc32] of a file."""
  crc = 0
  with open(path, 'rb') as file:
    while block := file.read(BLOCK_BYTES):
      crc = zlib.crc32(block, crc)
    return [file.tell(), crc]


def _save(place, arrays):
  """Writes the entry, or leaves that of another process that was quicker."""
  scratch = None
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(
      tempfile.mkdtemp(prefix=f'.{place.name[:16]}-', dir=place.parent)
    )
    new = scratch / 'new'
    new.mkdir()
    for name, array in arrays.items():
      with open(new / f'{name}.npy', 'wb') as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    manifest = {path.name: _check(path) for path in sorted(new.iterdir())}
    (new / MANIFEST).write_text(json.dumps(manifest))
    _move(new, place, scratch)
  except OSError as error:
    raise RuntimeError(
      f'{place.parent}: the cache of tokens cannot be written '
      f'({error.strerror or error}); mend it, or set another cache_dir'
    ) from error
  finally:
    if scratch:
      shutil.rmtree(scratch, ignore_errors=True)


def _move(new, place, scratch):
  for i in range(10):
    try:
      return new.rename(place)
    except OSError:
      if not place.exists():
        raise
    if _is_whole(place):
      return None
    try:  # The one there is damaged.
      place.rename(scratch / str(i))
    except FileNotFoundError:
      pass  # Another process moved it first.
  raise RuntimeError(f'{place}: other processes keep damaging this directory')
