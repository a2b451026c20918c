"""A run's directory: that it can be written to, has room, and has one owner."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket


def make_folder(path, key='the workdir'):
  """`path`, made and found to be writable. Raises RuntimeError if not.

  key: what the error calls it.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.probe-{os.getpid()}'
    probe.touch()
    probe.unlink(missing_ok=True)  # another host may have this pid
  except OSError as error:
    raise RuntimeError(
      f'cannot write to {path}: {error.strerror}\n'
      f'{key} must be a directory on a disk that can be written to'
    ) from error
  return path


def check_space(folder, needed):
  """Raises RuntimeError when `needed` bytes do not fit at `folder`."""
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise RuntimeError(
      f'disk full: needs {human(needed)}, {human(free)} free at {folder}\n'
      'earlier checkpoints are untouched: make room and run the same command'
    )


def write_whole(path, text):
  """All of `text` (or bytes) at `path`, or what was there; survives a cut."""
  with whole_file(path) as file:
    file.write(text.encode() if isinstance(text, str) else text)


@contextlib.contextmanager
def whole_file(path):
  """A file to write bytes to; it is at `path` once it is whole, or never."""
  tmp = path.with_name(f'.{path.name}.tmp')
  try:
    with open(tmp, 'wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(tmp, path)
  except BaseException:
    tmp.unlink(missing_ok=True)
    raise
  flush([path.parent])


def flush(paths):
  """Makes files, or the entries of directories, survive a power cut."""
  for path in paths:
    file = os.open(path, os.O_RDONLY)
    try:
      os.fsync(file)
    finally:
      os.close(file)


def terminal_width():
  """Columns of the terminal, 80 where there is none."""
  return shutil.get_terminal_size((80, 24)).columns


def human(count):
  """A number of bytes to read: 12.1 GB."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'


_locks: set[int] = set()  # open lock files of this process


def _leave_locks_to_parent():
  """A forked child, too, would hold the lock, and may outlive its parent."""
  while _locks:
    os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks_to_parent)


@contextlib.contextmanager
def lock(workdir):
  """Holds `workdir` for this process; the kernel lets go when it dies.

  Raises RuntimeError naming pid and host of the one that holds it.
  """
  path = make_folder(pathlib.Path(workdir)) / '.lock'
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  _locks.add(file)
  try:
    _take(file, path)
    yield
  finally:
    if file in _locks:  # it is not in a child forked meanwhile
      _locks.discard(file)
      os.close(file)


def _take(file, path):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    try:
      owner = json.loads(os.read(file, 4096))
      who = f'pid {int(owner["pid"])} on {str(owner["host"])!r}'
    except (ValueError, KeyError, TypeError):
      who = 'another process'
    raise RuntimeError(
      f'{path.parent} is in use by {who}; wait for it, or choose another '
      'workdir'
    ) from None
  except OSError as error:
    raise RuntimeError(
      f'cannot lock {path}: {error.strerror}; the workdir must be on a file '
      'system with locks'
    ) from error
  owner = {'pid': os.getpid(), 'host': socket.gethostname()}
  os.ftruncate(file, 0)
  os.pwrite(file, json.dumps(owner).encode(), 0)
