"""Checkpoints that count only once they are proven.

Orbax writes the arrays of step N into checkpoints/N, without checksums. When
it is done, a thread hashes those files and writes commits/N.json last of all.
A step without that record does not exist; a step whose files differ from the
record is passed over, aloud, for the one before it. The record also holds the
facts that the run depends on, so that a resumed run is the same run.
"""

import datetime
import json
import logging
import math
import pathlib
import shutil
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tuner import commits, rundir


class Checkpoints:
  """The checkpoints of one run; a context manager.

  facts: nested dict of JSON values that the numbers depend on (seed, batch,
  data hash, ...). It is stored with every step and compared at `restore`;
  allow_change names the dotted keys (or sections) that may differ.
  keep_last newest steps and keep_best by score (lower is better) are kept,
  and what the last save named as chosen. Leaving the `with` block waits for the
  save in flight and commits it, and raises when that fails, so that the exit
  code tells.

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
    self._chosen = None
    self._verified = set()
    self._thread = self._error = None
    self._folder = rundir.make_folder(self.workdir / 'checkpoints')
    self._commits = rundir.make_folder(self.workdir / 'commits')
    self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

  def __enter__(self):
    logging.getLogger('absl').addFilter(_is_news)
    return self

  def __exit__(self, *_):
    try:
      self.wait()
    finally:
      self._orbax.close()
      logging.getLogger('absl').removeFilter(_is_news)

  def save(self, step, state, score=None, chosen=None):
    """Starts to write `state`, a pytree of arrays, as step `step`.

    Returns as soon as the arrays may be donated or changed. Waits for the
    save before, whose error it raises. A step that is already committed from
    this very state is left alone. `score` is what keep_best ranks by;
    `chosen` a step that stays, however old.
    Raises RuntimeError when the disk is too full.
    """
    self.wait()
    self._chosen = chosen
    if step == self.step:
      return
    self._check_order(step)
    flat = {path: _own(leaf) for path, leaf in commits.leaves(state).items()}
    needed = sum(leaf.nbytes for leaf in flat.values())
    if jax.process_index() == 0:
      self._clean(step)
    rundir.check_space(self._folder, needed)
    description = {
      'leaves': {path: commits.describe(leaf) for path, leaf in flat.items()},
      'bytes': needed,
      'devices': commits.devices(flat.values()),
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
        f'{rundir.human(free)} free at {self._folder}; earlier checkpoints '
        'are untouched'
      ) from error

  def newest(self):
    """The newest committed step whose files are intact, or None.

    Says on stderr why it passed over a newer one.
    """
    self.wait()
    step = -1
    if jax.process_index() == 0:
      written = {int(p.name) for p in self._written() if p.name.isdecimal()}
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
    if step not in self._verified and (
      fault := commits.fault(self.workdir, step)
    ):
      raise RuntimeError(f'step {step} cannot be restored: {fault}')
    record = self.record(step)
    commits.compare_facts(record['facts'], self.facts, self.allow_change)
    wanted = commits.leaves(like)
    commits.compare_leaves(record['leaves'], wanted)
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
    return commits.read_record(self._commits / f'{step}.json', step)

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
    record = {
      'step': step,
      'saved': datetime.datetime.now(datetime.UTC).isoformat(),
      'facts': self.facts,
      'versions': commits.versions(),
      **description,
      'files': commits.hash_tree(self._folder / str(step)),
    }
    commits.write_record(self._commits / f'{step}.json', record)

  def _prune(self, step):
    """Removes all but the kept steps, the record before the directory.

    Steps after `step`, which has just been committed, go as well: they are
    damaged, or of a future that was left by restoring an older step.
    """
    steps = [s for s in self._steps() if s <= step]
    scores = {s: score for s in steps if (score := self._score(s)) is not None}
    best = sorted(scores, key=lambda s: (scores[s], -s))[: self.keep_best]
    kept = {*steps[-self.keep_last :], *best, self._chosen}
    for old in {*self._steps()} - kept:
      self._remove(old)

  def _score(self, step):
    try:
      score = self.record(step)['score']
    except ValueError:
      return None
    return None if score is None or math.isnan(score) else score

  def _remove(self, step):
    (self._commits / f'{step}.json').unlink(missing_ok=True)
    rundir.flush([self._commits])
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
    return sorted(int(name) for name in names if name.isdecimal())

  def _written(self):
    """The directories that orbax has made: finished, half done, removed."""
    for path in self._folder.iterdir():
      if path.name.isdecimal() or 'orbax-checkpoint-tmp' in path.name:
        yield path

  def _is_whole(self, step):
    fault = commits.fault(self.workdir, step)
    if fault:
      print(f'step {step} passed over: {fault}', file=sys.stderr, flush=True)
    return not fault


def _is_news(record):
  """False for the tracebacks that orbax logs of errors that `wait` raises."""
  tellers = 'async_checkpointer.py', 'future.py'
  return record.filename not in tellers or not record.exc_info


def _own(leaf):
  """An array that orbax may read later: jax ones are immutable, not NumPy's."""
  if isinstance(leaf, jax.Array):
    return leaf
  return np.array(leaf, dtype=commits.describe(leaf)[0])


def _target(path, leaf):
  """What orbax should restore a leaf as."""
  if getattr(leaf, 'sharding', None) is not None:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError(f'{path}: the tree to restore into lacks a sharding')
  return np.empty(np.shape(leaf), commits.describe(leaf)[0])


def _as_given(restored, leaf):
  """Python numbers come back as such."""
  return restored if hasattr(leaf, 'dtype') else type(leaf)(restored.item())
