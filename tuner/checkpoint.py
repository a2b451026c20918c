"""Checkpoints that count only once they are proven, and one trainer a run.

Orbax writes the arrays of step N into checkpoints/N, without checksums. When
it is done, a thread hashes those files and writes commits/N.json last of all.
A step without that record does not exist; a step whose files differ from the
record is passed over, aloud, for the one before it. The record also holds the
facts that the run depends on, so that a resumed run is the same run.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import tuner


class Checkpoints:
  """The checkpoints of one run; a context manager.

  facts: nested dict of JSON values that the numbers depend on (seed, batch,
  data hash, ...). It is stored with every step and compared at `restore`;
  allow_change names the dotted keys (or sections) that may differ.
  keep_last newest steps and keep_best by score (lower is better) are kept.
  Leaving the `with` block waits for the save in flight and commits it, and
  raises when that fails, so that the exit code tells.

  With several processes each of them makes every call; the first one alone
  writes records and removes steps. They need a shared file system.
  """

  def __init__(self, workdir, facts, keep_last=2, keep_best=0, allow_change=()):
    if keep_last < 1 or keep_best < 0:
      raise ValueError(
        f'keep_last={keep_last}, keep_best={keep_best}: at least 1 and 0'
      )
    self.workdir = pathlib.Path(workdir).absolute()
    self.facts = json.loads(json.dumps(facts))
    self.keep_last = keep_last
    self.keep_best = keep_best
    self.allow_change = tuple(allow_change)
    # The step whose state is on disk and in memory alike; None: not looked.
    self.step = None
    self._verified = set()
    self._thread = self._error = None
    self._folder = _make_folder(self.workdir / 'checkpoints')
    self._commits = _make_folder(self.workdir / 'commits')
    self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    logging.getLogger('absl').addFilter(_is_news)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    try:
      self.wait()
    finally:
      self._orbax.close()
      logging.getLogger('absl').removeFilter(_is_news)

  def save(self, step, state, score=None):
    """Starts to write `state`, a pytree of arrays, as step `step`.

    Returns as soon as the arrays may be donated or changed. Waits for the
    save before, whose error it raises. A step that is already committed from
    this very state is left alone. `score` is what keep_best ranks by.
    Raises RuntimeError when the disk is too full.
    """
    self.wait()
    if step == self.step:
      return
    self._check_order(step)
    flat = {path: _own(leaf) for path, leaf in leaves(state).items()}
    needed = sum(leaf.nbytes for leaf in flat.values())
    if jax.process_index() == 0:
      self._clean(step)
    check_space(self._folder, needed)
    description = {
      'leaves': {path: describe(leaf) for path, leaf in flat.items()},
      'bytes': needed,
      'devices': _devices(flat.values()),
      'score': None if score is None else float(score),
    }
    self._orbax.save(self._folder / str(step), args=ocp.args.StandardSave(flat))
    # Not a daemon: it must outlive a main thread that forgot to wait.
    self._thread = threading.Thread(
      name='commit', target=self._finish, args=(step, description)
    )
    self._thread.start()

  def wait(self):
    """Waits until the last save is committed. Raises RuntimeError if not."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      (step, error), self._error = self._error, None
      reason = (str(error).splitlines() or [''])[0][:1000]
      free = shutil.disk_usage(self._folder).free
      what = 'pruning after' if self.step == step else 'committing'
      raise RuntimeError(
        f'{what} step {step} failed: {type(error).__name__}: {reason}\n'
        f'{_human(free)} free at {self._folder}; earlier checkpoints are '
        'untouched'
      ) from error

  def newest(self):
    """The newest committed step whose files are intact, or None.

    Says on stderr why it passed over a newer one.
    """
    self.wait()
    step = -1
    if jax.process_index() == 0:
      written = {int(p.name) for p in self._written() if p.name.isdigit()}
      steps = sorted(written.union(self._steps()), reverse=True)
      step = next(filter(self._is_whole, steps), -1)
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step < 0:
      self.step = -1
      return None
    self._verified.add(step)
    return step

  def restore(self, step, like):
    """The state of committed step `step`, shaped and placed as `like`.

    like: the same pytree with jax.ShapeDtypeStruct leaves that carry their
    shardings; a NumPy array or Python number comes back as one.
    Raises ValueError when a leaf's shape or dtype, or a fact, differs:
    orbax would cast silently.
    """
    self.wait()
    if step not in self._verified and (fault := self._fault(step)):
      raise RuntimeError(f'step {step} cannot be restored: {fault}')
    record = self.record(step)
    compare_facts(record['facts'], self.facts, self.allow_change)
    wanted = leaves(like)
    compare_leaves(record['leaves'], wanted)
    flat = self._orbax.restore(
      self._folder / str(step),
      args=ocp.args.StandardRestore(
        {path: _target(path, leaf) for path, leaf in wanted.items()}
      ),
    )
    restored = [_as_given(flat[p], leaf) for p, leaf in wanted.items()]
    self.step = step
    return jax.tree.unflatten(jax.tree.structure(like), restored)

  def record(self, step):
    """The commit record of `step`, a dict. Raises ValueError if damaged."""
    return _read_record(self._commits / f'{step}.json', step)

  def _check_order(self, step):
    """Raises rather than let a save remove steps that nobody looked at."""
    if self.step is None and self._steps():
      raise RuntimeError(
        f'{self._commits} holds steps {self._steps()}: ask newest() and '
        'restore() before saving, or choose another workdir'
      )
    if self.step is not None and step < self.step:
      raise ValueError(f'step {step} comes after step {self.step}')

  def _finish(self, step, description):
    """What the thread does: waits for orbax, commits, removes old steps."""
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        self._commit(step, description)
      self.step = step
      self._verified.add(step)
      if jax.process_index() == 0:
        self._prune(step)
    except BaseException as error:
      self._error = step, error

  def _commit(self, step, description):
    """Writes the record of `step` from the files as they are on disk."""
    folder = self._folder / str(step)
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    _flush([*paths, folder, *(p for p in folder.rglob('*') if p.is_dir())])
    _flush([self._folder])
    names = [path.relative_to(folder).as_posix() for path in paths]
    sizes = [path.stat().st_size for path in paths]
    record = {
      'step': step,
      'saved': datetime.datetime.now(datetime.UTC).isoformat(),
      'facts': self.facts,
      'versions': _versions(),
      **description,
      'files': {
        name: {'bytes': size, 'sha256': digest}
        for name, size, digest in zip(names, sizes, _hash_files(paths))
      },
    }
    record['sha256'] = _digest(record)
    _write_record(self._commits / f'{step}.json', record)

  def _prune(self, step):
    """Removes all but the kept steps, the record before the directory.

    Steps after `step`, which has just been committed, go as well: they are
    damaged, or of a future that was left by restoring an older step.
    """
    steps = [s for s in self._steps() if s <= step]
    scores = {s: score for s in steps if (score := self._score(s)) is not None}
    best = sorted(scores, key=lambda s: (scores[s], -s))[: self.keep_best]
    for old in {*self._steps()} - {*steps[-self.keep_last :], *best}:
      self._remove(old)

  def _score(self, step):
    try:
      score = self.record(step)['score']
    except ValueError:
      return None
    return None if score is None or math.isnan(score) else score

  def _remove(self, step):
    (self._commits / f'{step}.json').unlink(missing_ok=True)
    _flush([self._commits])
    shutil.rmtree(self._folder / str(step), ignore_errors=True)
    self._verified.discard(step)

  def _clean(self, step):
    """Removes what killed saves left, and `step` itself if it is redone."""
    self._remove(step)
    for path in self._commits.glob('.*.json.tmp'):
      path.unlink()
    committed = {str(s) for s in self._steps()}
    for path in self._written():
      if path.name not in committed:
        shutil.rmtree(path)

  def _steps(self):
    names = (path.stem for path in self._commits.glob('*.json'))
    return sorted(int(name) for name in names if name.isdigit())

  def _written(self):
    """The directories that orbax has made: finished, half done, removed."""
    for path in self._folder.iterdir():
      if path.name.isdigit() or 'orbax-checkpoint-tmp' in path.name:
        yield path

  def _is_whole(self, step):
    fault = self._fault(step)
    if fault:
      print(f'step {step} passed over: {fault}', file=sys.stderr, flush=True)
    return not fault

  def _fault(self, step):
    """Why the files of `step` are not what was committed, or ''."""
    try:
      files = self.record(step)['files']
    except ValueError as error:
      return str(error)
    folder = self._folder / str(step)
    for name, file in files.items():
      path = folder / name
      where = path.relative_to(self.workdir)
      if not path.is_file():
        return f'{where}: missing'
      if path.stat().st_size != file['bytes']:
        return (
          f'{where}: {path.stat().st_size} bytes, {file["bytes"]} committed'
        )
    try:
      digests = _hash_files([folder / name for name in files])
      for (name, file), digest in zip(files.items(), digests):
        if digest != file['sha256']:
          return f'checkpoints/{step}/{name}: sha256 differs'
    except OSError as error:
      return f'checkpoints/{step}: {error}'
    return ''


def leaves(tree):
  """{dotted path: leaf} of a pytree, such as 'params.mlp.kernel'."""
  flat = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name in flat:
      raise ValueError(f'two leaves of the state are called {name!r}')
    flat[name] = leaf
  return flat


def describe(leaf):
  """[dtype, shape] of an array, ShapeDtypeStruct or Python number."""
  dtype = leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)
  return [str(dtype), list(np.shape(leaf))]


def compare_leaves(committed, wanted):
  """Raises ValueError naming each leaf that is not as it was committed."""
  now = {path: describe(leaf) for path, leaf in wanted.items()}
  lines = []
  for path in sorted(committed.keys() | now.keys()):
    old, new = committed.get(path), now.get(path)
    if old != new:
      lines.append(f'{path}: checkpoint {_text(old)}, now {_text(new)}')
  if lines:
    more = [f'and {len(lines) - 20} more'] if len(lines) > 20 else []
    raise ValueError(
      'the state differs from the checkpoint:\n  '
      + '\n  '.join(lines[:20] + more)
    )


def compare_facts(then, now, allow_change=()):
  """Raises ValueError with a table of the facts that differ.

  A key of allow_change lets that fact, or all facts below it, through; one
  that names no fact is an error.
  """
  then, now = _flat_facts(then), _flat_facts(now)
  keys = sorted(then.keys() | now.keys())
  for allowed in allow_change:
    if not any(_is_under(key, allowed) for key in keys):
      raise ValueError(
        f'allow_change={allowed}: no such fact; there are {", ".join(keys)}'
      )
  rows = [('key', 'checkpoint', 'now')]
  for key in keys:
    old, new = (_fact_text(facts, key) for facts in (then, now))
    if old != new and not any(_is_under(key, a) for a in allow_change):
      rows.append((key, *_shorten(old, new)))
  if len(rows) > 1:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = '\n'.join(
      '  ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
      for row in rows
    )
    raise ValueError(
      'this run is not the one that the checkpoint is of:\n'
      f'{table}\n--allow_change=key lets one through; or choose another '
      'workdir'
    )


def check_space(folder, needed):
  """Raises RuntimeError when `needed` bytes do not fit at `folder`."""
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise RuntimeError(
      f'disk full: needs {_human(needed)}, {_human(free)} free at {folder}\n'
      'earlier checkpoints are untouched: make room and run the same command'
    )


_locks = set()  # open lock files of this process


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
  path = _make_folder(pathlib.Path(workdir)) / '.lock'
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


def _make_folder(path):
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.probe-{os.getpid()}'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise RuntimeError(
      f'cannot write to {path}: {error.strerror}\n'
      'the workdir must be a directory on a disk that can be written to'
    ) from error
  return path


def _is_news(record):
  """False for the tracebacks that orbax logs of errors that `wait` raises."""
  tellers = 'async_checkpointer.py', 'future.py'
  return record.filename not in tellers or not record.exc_info


def _own(leaf):
  """An array that orbax may read later: jax ones are immutable, not NumPy's."""
  if isinstance(leaf, jax.Array):
    return leaf
  return np.array(leaf, dtype=describe(leaf)[0])


def _target(path, leaf):
  """What orbax should restore a leaf as."""
  if getattr(leaf, 'sharding', None) is not None:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(f'{path}: the tree to restore into lacks a sharding')
  return np.empty(np.shape(leaf), describe(leaf)[0])


def _as_given(restored, leaf):
  """Python numbers come back as such."""
  return restored if hasattr(leaf, 'dtype') else type(leaf)(restored.item())


def _flat_facts(facts, prefix=''):
  flat = {}
  for key, value in facts.items():
    if isinstance(value, dict) and value:
      flat.update(_flat_facts(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def _is_under(key, section):
  return key == section or key.startswith(section + '.')


def _fact_text(facts, key):
  return json.dumps(facts[key], sort_keys=True) if key in facts else 'absent'


def _shorten(old, new, width=70):
  """Both texts cut to the part where they first differ."""
  first = len(os.path.commonprefix([old, new]))
  start = max(0, first - width // 2)
  return [
    ('…' if start else '')
    + text[start : start + width]
    + ('…' if len(text) > start + width else '')
    for text in (old, new)
  ]


def _text(description):
  if description is None:
    return 'absent'
  dtype, shape = description
  return f'{dtype}{shape}'


def _human(count):
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'


def _devices(arrays):
  """The hardware and the mesh that the arrays lie on."""
  meshes = (getattr(getattr(a, 'sharding', None), 'mesh', None) for a in arrays)
  mesh = next((mesh for mesh in meshes if mesh is not None), None)
  return {
    'count': jax.device_count(),
    'processes': jax.process_count(),
    'kind': jax.devices()[0].device_kind,
    'mesh': None if mesh is None else dict(mesh.shape),
  }


def _versions():
  packages = 'jax', 'flax', 'optax', 'orbax-checkpoint'
  return {
    'tuner': tuner.__version__,
    'python': '.'.join(map(str, sys.version_info[:3])),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _hash_files(paths):
  """sha256 of each file, in order; several at once, as hashing drops the GIL.

  A generator: the caller may stop at the first that differs.
  """
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    yield from pool.map(_hash_file, paths)


def _hash_file(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(record):
  """sha256 of all of a record but its own 'sha256'."""
  rest = {key: value for key, value in record.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_record(path, step):
  name = f'commits/{path.name}'
  try:
    record = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise ValueError(f'{name}: missing, the save was not finished') from error
  except (OSError, ValueError) as error:
    raise ValueError(f'{name}: cannot be read: {error}') from error
  if not isinstance(record, dict) or record.get('sha256') != _digest(record):
    raise ValueError(f'{name}: the record differs from its own sha256')
  if record['step'] != step:
    raise ValueError(f'{name}: this is the record of step {record["step"]}')
  return record


def _write_record(path, record):
  """All of the record or nothing, even when the machine loses power."""
  tmp = path.with_name(f'.{path.name}.tmp')
  with open(tmp, 'w') as file:
    json.dump(record, file, indent=1, sort_keys=True)
    file.flush()
    os.fsync(file.fileno())
  os.replace(tmp, path)
  _flush([path.parent])


def _flush(paths):
  for path in paths:
    file = os.open(path, os.O_RDONLY)
    try:
      os.fsync(file)
    finally:
      os.close(file)
