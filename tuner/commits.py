"""The record that makes a step of a run count: commits/N.json.

It holds sha256 and size of every file of checkpoints/N, dtype and shape of
every leaf of the state, the facts that the run depends on, and its own sha256.
What differs from it is told by name: a file, a leaf or a fact.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

import tuner
from tuner import rundir


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


def _text(description):
  if description is None:
    return 'absent'
  dtype, shape = description
  return f'{dtype}{shape}'


ALLOW = '--allow_change=key lets one through; or choose another workdir'


def compare_facts(then, now, allow_change=(), advice=ALLOW):
  """Raises ValueError with a table of the facts that differ, and advice.

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
      f'this run is not the one that the checkpoint is of:\n{table}\n{advice}'
    )


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


def devices(arrays):
  """The hardware and the mesh that the arrays lie on."""
  meshes = (getattr(getattr(a, 'sharding', None), 'mesh', None) for a in arrays)
  mesh = next((mesh for mesh in meshes if mesh is not None), None)
  return {
    'count': jax.device_count(),
    'processes': jax.process_count(),
    'kind': jax.devices()[0].device_kind,
    'mesh': None if mesh is None else dict(mesh.shape),
  }


def versions():
  """Of this program and of what decides the numbers and the files."""
  packages = 'jax', 'flax', 'optax', 'orbax-checkpoint'
  return {
    'tuner': tuner.__version__,
    'python': '.'.join(map(str, sys.version_info[:3])),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def hash_tree(folder):
  """{name: {'bytes', 'sha256'}} of all files below, once they are on disk."""
  paths = sorted(path for path in folder.rglob('*') if path.is_file())
  folders = [path for path in folder.rglob('*') if path.is_dir()]
  rundir.flush([*paths, *folders, folder, folder.parent])
  return {
    path.relative_to(folder).as_posix(): {
      'bytes': path.stat().st_size,
      'sha256': digest,
    }
    for path, digest in zip(paths, _hash_files(paths))
  }


def fault(workdir, step):
  """Why the files of `step` are not what was committed, or ''."""
  try:
    files = read_record(workdir / f'commits/{step}.json', step)['files']
  except ValueError as error:
    return str(error)
  folder = workdir / f'checkpoints/{step}'
  for name, file in files.items():
    path = folder / name
    where = path.relative_to(workdir)
    if not path.is_file():
      return f'{where}: missing'
    size = path.stat().st_size
    if size != file['bytes']:
      return f'{where}: {size} bytes, {file["bytes"]} committed'
  try:
    digests = _hash_files([folder / name for name in files])
    for (name, file), digest in zip(files.items(), digests):
      if digest != file['sha256']:
        return f'checkpoints/{step}/{name}: sha256 differs'
  except OSError as error:
    return f'checkpoints/{step}: {error}'
  return ''


def read_record(path, step):
  """The record at `path`. Raises ValueError if damaged or of another step."""
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


def write_record(path, record):
  """All of the record or nothing, even when the machine loses power."""
  record = record | {'sha256': _digest(record)}
  rundir.write_whole(path, json.dumps(record, indent=1, sort_keys=True))


def _digest(record):
  """sha256 of all of a record but its own 'sha256'."""
  rest = {key: value for key, value in record.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _hash_files(paths):
  """sha256 of each file, in order; several at once, as hashing drops the GIL.

  A generator: the caller may stop at the first that differs.
  """
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    yield from pool.map(_hash_file, paths)


def _hash_file(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
