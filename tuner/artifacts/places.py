"""Where exports may be put: never over what is not an export of ours.

A directory at OUT/FORMAT is replaced as a whole. So a place must not hold, or
lie within, what a run is made from, and what is there already must be an
earlier export.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tuner import sections
from tuner.artifacts import card, folders

RECORD = 'verify.json'


def check(
  out: pathlib.Path,
  names: Sequence[str],
  config: sections.Config,
  base_dir: pathlib.Path,
  workdir: pathlib.Path,
  key: str,
) -> None:
  """Raises ValueError where exporting to `out` would delete something else.

  names: of the formats. key: what the error calls `out`.
  """
  there = read_record(out, key)
  known = _sources(config, base_dir)
  for name in names:
    place = out / name
    rejected = folders.beside(place)[-1]
    for path in (place, *folders.beside(place)):
      if path.is_symlink():
        raise ValueError(
          f'{key}: {path} is a symbolic link; a directory is to be put there. '
          'Remove it or choose another place.'
        )
      if path.exists() and not path.is_dir():
        raise ValueError(
          f'{key}: {path} is a file; a directory is to be put there. Move it '
          'away or choose another place.'
        )
      _check_apart(path, known, workdir, key)
    for path in (place, rejected):
      if not _is_ours(path, name in there):
        raise ValueError(
          f'{key}: {path} is there, and no export of this program: it would be '
          'deleted. Move it away or choose another place.'
        )


def _sources(config, base_dir) -> dict[str, pathlib.Path]:
  """What the run is made from, by what an error calls it."""
  found = {'the base': base_dir}
  given = {
    'config.model.path': config.model.path,
    'config.adapt.path': config.adapt.get('path'),
  }
  for name, path in given.items():
    if isinstance(path, str) and path:
      local = pathlib.Path(path).expanduser()
      if local.exists():
        found[name] = local
  return found


def _check_apart(path, known, workdir, key) -> None:
  own = path.resolve()
  for name, source in known.items():
    other = source.resolve()
    if own == other or own in other.parents or other in own.parents:
      raise ValueError(
        f'{key}: {path} would be put over {name}, {source}; choose another '
        'place.'
      )
  run = workdir.resolve()
  if own == run or own in run.parents:
    raise ValueError(
      f'{key}: {path} would be put over the run in {workdir}; choose another '
      'place.'
    )


def _is_ours(path: pathlib.Path, is_recorded: bool) -> bool:
  """Whether it may be replaced: not there, empty, or an export."""
  if not path.exists() or is_recorded or not any(path.iterdir()):
    return True
  file = path / 'README.md'
  if not file.is_file():
    return False
  return card.MADE_WITH in file.read_text(encoding='utf-8', errors='replace')


def read_record(out: pathlib.Path, key: str) -> dict[str, Mapping[str, Any]]:
  """verify.json of what lies there, by format; raises ValueError for another.

  {} where there is none.
  """
  file = out / RECORD
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
    if all('checks' in one for one in found.values()):
      return found
  except (ValueError, AttributeError, TypeError):
    pass
  raise ValueError(
    f'{key}: {file} is no record of exports: it would be replaced. Move it '
    'away or choose another place.'
  )
