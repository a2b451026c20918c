"""A directory that is whole or not there, whatever cuts its writing short.

It is written beside its place, under a hidden name, and the two are exchanged
in one call of the kernel. So a reader finds the old directory or the new one,
and what a killed process has left is removed by the next.
"""

import ctypes
import errno
import json
import os
import pathlib
import shutil
from typing import Any

from tuner import rundir

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD
# A kernel, C library or file system that cannot exchange.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class Folder:
  """The directory to be at `path`; until `keep`, it is at `scratch`.

  `scratch` is made empty. Leaving a `with` block without `keep` or `reject`
  removes it and leaves `path` as it was.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.scratch, _, self.rejected = beside(path)

  def __enter__(self) -> 'Folder':
    sweep(self.path)
    self.scratch.mkdir(parents=True)
    return self

  def __exit__(self, *_) -> None:
    shutil.rmtree(self.scratch, ignore_errors=True)

  def keep(self) -> None:
    """Puts what was written in its place, at once and to last."""
    self._flush()
    place(self.scratch, self.path)
    shutil.rmtree(self.rejected, ignore_errors=True)

  def reject(self) -> None:
    """Leaves what was written to be looked at, beside its place."""
    shutil.rmtree(self.rejected, ignore_errors=True)
    self.scratch.rename(self.rejected)

  def _flush(self) -> None:
    paths = sorted(self.scratch.rglob('*'))
    rundir.flush([*paths, self.scratch])


def beside(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """Where it is written, what it replaces is for a moment, and is rejected."""
  names = f'.{path.name}.tmp', f'.{path.name}.old', f'{path.name}.rejected'
  return tuple(path.with_name(name) for name in names)


def sweep(path: pathlib.Path) -> None:
  """Removes what a killed process left beside `path`; mends `path` first."""
  scratch, old, _ = beside(path)
  if old.exists() and not path.exists():
    old.rename(path)  # Killed between the two renames of `place`.
  for left in (old, scratch):
    shutil.rmtree(left, ignore_errors=True)


def place(scratch: pathlib.Path, path: pathlib.Path) -> None:
  """Makes `scratch` the directory at `path`; what was there is removed."""
  if not path.exists():
    os.replace(scratch, path)
  elif _exchange(scratch, path):
    shutil.rmtree(scratch)
  else:
    old = beside(path)[1]
    path.rename(old)
    os.replace(scratch, path)
    shutil.rmtree(old)
  rundir.flush([path.parent])


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Exchanges two directories; False where the system cannot."""
  call = getattr(ctypes.CDLL(None, use_errno=True), 'renameat2', None)
  if call is None:
    return False
  paths = os.fsencode(one), os.fsencode(other)
  if call(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0:
    return True
  code = ctypes.get_errno()
  if code in _CANNOT:
    return False
  raise OSError(code, os.strerror(code), str(one), None, str(other))


def size(path: pathlib.Path) -> int:
  """Bytes of all files below `path`."""
  return sum(p.stat().st_size for p in path.rglob('*') if p.is_file())


def write_json(path: pathlib.Path, value: Any) -> None:
  path.write_bytes(as_json(value))


def as_json(value: Any) -> bytes:
  """JSON as all our files have it: two spaces, a newline at its end."""
  return (json.dumps(value, indent=2) + '\n').encode()
