"""Files -> a Table, once, on all cores, kept for as long as they are as now."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import stat
import time
from typing import Any

import numpy as np

from tuner.data import cache, files, forms, parallel, records, store
from tuner.data import rows as rows_lib
from tuner.data import split as split_lib

VERSION = 3  # Raise when the same files come to give another table.
CHUNK, CHUNK_BYTES = 2048, 2**23  # Records, and bytes of them, read at once.
END_BYTES = 2**20  # of a file's beginning and end, by which it is known
AT_REST_S = 2.0  # A younger file could change again with the same times.
SMALL_BYTES = 2**24  # Of files: not worth starting workers for.


@dataclasses.dataclass(frozen=True)
class Spec:
  """What to read: one source of rows."""

  paths: tuple[str, ...]
  system: str | None = None  # put before rows without a system message
  form: str | None = None
  columns: tuple[tuple[str, str], ...] = ()
  ignore: str | None = None  # see split.position
  name: str = ''
  carry: tuple[str, ...] = ()  # columns of the files that go into Row.carried


def read(paths, system=None, form=None, columns=None):
  """The Table of one file or more. Raises ValueError with all that is wrong."""
  if isinstance(paths, str | os.PathLike):
    paths = (paths,)
  paths = tuple(os.fspath(path) for path in paths)
  columns = tuple(sorted((columns or {}).items()))
  table = read_all([Spec(paths, system, form, columns)])
  table.faults.raise_any('cannot train on this data')
  return table


def read_all(specs, cache_dir=None, workers=None):
  """The Table of several Specs, in order; look at its `faults`.

  workers: processes; None: by the size of the files. Raises ValueError for
  paths that cannot be, and for a form or columns that there are not.
  """
  parts = []
  for spec in specs:
    _check(spec)
    paths = files.expand(spec.paths)
    versions = [_version(path) for path in paths]
    # What is not a file, or cannot be read, is not kept: items() says why.
    place = cache_dir if all(versions) else None
    own = (spec.system, spec.form, spec.columns, spec.ignore)
    # Tables from before there was carry stay known.
    key = cache.key(
      VERSION, versions, *own, *([spec.carry] if spec.carry else [])
    )
    fill = functools.partial(_fill, spec, paths, workers)
    found = dict(cache.grown(place, key, fill))
    notes = json.loads(found.pop('notes').tobytes())
    parts.append(
      store.Part(
        {name: found[name] for name in store.ARRAYS},
        [
          {'path': path, **record}
          for path, record in zip(paths, notes['files'], strict=True)
        ],
        collections.Counter(notes['extra']),
        [
          (rows_lib.place(paths[file], *at), text)
          for file, *at, text in notes['faults']
        ],
        spec.name,
      )
    )
  return store.Table(parts)


def walk(spec):
  """Yields the Rows of a Spec as they are read; nothing is kept.

  Raises ValueError for the first thing that is wrong.
  """
  _check(spec)
  reader, faults = _Reader(spec), rows_lib.Faults()
  for path in files.expand(spec.paths):
    own = 0, 0  # Line and column of the row that is being read.
    try:
      for line, column, payload in files.items(path):
        own = line, column
        where = rows_lib.place(path, *own)
        row = dataclasses.replace(reader.row(payload)[0], where=where)
        own = 0, 0
        yield row
    except rows_lib.Refused as refused:
      own = own if any(own) else (refused.line, 0)
      faults.add(rows_lib.place(path, *own), str(refused))
    faults.raise_any('cannot train on this stream')


def _check(spec):
  """Raises ValueError for a Spec that no file could satisfy."""
  forms.reader(spec.form, dict(spec.columns))
  split_lib.compile_ignore(spec.ignore)
  if spec.system is not None:
    rows_lib.check_text('system', spec.system)


def _fill(spec, paths, workers, add):
  """Reads all files; gives arrays and notes to `add`. Whether to keep them."""
  for name, dtype in store.ARRAYS.items():
    add(name, np.zeros(0, dtype))
  n_bytes = [_size(path) for path in paths]
  if workers is None:
    workers = parallel.count(sum(n_bytes), SMALL_BYTES)
  notes: dict[str, Any] = {
    'files': [
      {
        'forms': collections.Counter(),
        'rows': 0,
        'bytes': n,
        'faults': 0,
        'is_whole': True,
      }
      for n in n_bytes
    ],
    'extra': collections.Counter(),
    'faults': [],
  }

  is_lasting = True

  def fault(file, line, column, text):
    notes['files'][file]['faults'] += 1
    notes['faults'].append((file, line, column, text))

  def file_fault(file, refused):
    nonlocal is_lasting
    is_lasting &= refused.is_lasting
    notes['files'][file]['is_whole'] = False
    fault(file, refused.line, 0, str(refused))

  results = parallel.ordered(
    functools.partial(_Reader, spec),
    _chunks(paths, file_fault),
    workers,
    'reading',
    size=lambda chunk: len(chunk[1]),
  )
  for arrays, file, found, extra, wrong in results:
    for name, array in arrays.items():
      add(name, array)
    notes['files'][file]['rows'] += len(arrays['size'])
    notes['files'][file]['forms'].update(found)
    notes['extra'].update(extra)
    for item in wrong:
      fault(*item)
  notes['faults'].sort(key=lambda item: item[:3])
  add('notes', np.frombuffer(json.dumps(notes).encode(), np.uint8))
  return is_lasting


def _chunks(paths, fault):
  """Yields (file, Items) of all files; what is wrong with one goes to fault."""
  for i, path in enumerate(paths):
    chunk: list[files.Item] = []
    n_bytes = 0
    try:
      for item in files.items(path):
        chunk.append(item)
        n_bytes += len(item.payload)
        if len(chunk) == CHUNK or n_bytes > CHUNK_BYTES:
          yield i, chunk
          chunk, n_bytes = [], 0
    except rows_lib.Refused as refused:
      fault(i, refused)
    if chunk:
      yield i, chunk


class _Reader:
  """Records to arrays; made once a worker."""

  def __init__(self, spec):
    self._read = forms.reader(spec.form, dict(spec.columns), spec.carry)
    self._ignore = split_lib.compile_ignore(spec.ignore)
    self._system = (
      {'role': 'system', 'content': spec.system} if spec.system else None
    )

  def row(self, payload):
    """(Row, name of its form). Raises Refused."""
    is_read = isinstance(payload, dict)
    record = payload if is_read else records.parse(payload)
    row, form = self._read(record, '')
    return with_system(row, self._system), form

  def __call__(self, chunk):
    """(arrays, file, Counter of forms, Counter of extra columns, faults)."""
    file, items = chunk
    arrays: dict[str, Any] = {name: [] for name in store.ARRAYS}
    found: collections.Counter = collections.Counter()
    extra: collections.Counter = collections.Counter()
    faults = []
    for line, column, payload in items:
      try:
        row, form = self.row(payload)
      except rows_lib.Refused as refused:
        faults.append((file, line, column, str(refused)))
        continue
      store.append(arrays, row, self._ignore, file, line, column)
      found[form] += 1
      extra.update(row.extra)
    return store.whole(arrays), file, found, extra, faults


def with_system(row, system):
  """The row, with the system message in front where it has none."""
  messages = row.messages
  if not system or not messages or messages[0]['role'] == 'system':
    return row
  n_prompt = None if row.n_prompt is None else row.n_prompt + 1
  return dataclasses.replace(
    row, messages=(system, *messages), n_prompt=n_prompt
  )


def outline(spec):
  """[size, hash of both ends] of each file: most changes show, no move does.

  None for what is no file.
  """
  return [_outline(path) for path in files.expand(spec.paths)]


def _outline(path):
  if not os.path.isfile(path):
    return None
  with open(path, 'rb') as file:
    ends = file.read(END_BYTES)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END_BYTES))
    ends += file.read(END_BYTES)
  return [size, hashlib.sha256(ends).hexdigest()]


def _version(path):
  """What changes when the file does; None for one that may be in motion."""
  try:
    status = os.stat(path)
  except OSError:
    return None
  age_s = time.time() - status.st_mtime
  if not stat.S_ISREG(status.st_mode) or abs(age_s) < AT_REST_S:
    return None
  return [
    os.path.realpath(path),
    status.st_ino,
    status.st_size,
    status.st_mtime_ns,
    status.st_ctime_ns,
  ]


def _size(path):
  try:
    return os.stat(path).st_size
  except OSError:
    return 0
