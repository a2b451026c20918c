"""Whether an adapter was made for this base.

`peft` names the base in adapter_config.json, by hub id or by path, and its
revision where it was told. Adapters of this program have the hash of the
base's weights beside it, in tuner.json, which decides whatever the name is.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from tuner.adapters import settings
from tuner.models import hub

RECORD = 'tuner.json'
KEY = 'base_weights_sha256'


@dataclasses.dataclass(frozen=True)
class Base:
  """The base to train on: config.model.path and the directory it is in.

  revision: the hub's commit, None for a local directory.
  hash_of: `hub.weights_hash` of a directory, or one that keeps what it found.
  """

  path: str
  revision: str | None
  directory: pathlib.Path
  hash_of: Callable[[pathlib.Path], str] = hub.weights_hash

  def sha256(self) -> str:
    """The hash of its weights. Reads them all where none was kept."""
    return self.hash_of(self.directory)


def check(
  base: Base,
  directory: pathlib.Path,
  said: settings.Settings,
  trained_on: str | None = None,
) -> None:
  """Raises ValueError where the adapter is of another base, naming both."""
  name = said.raw.get('base_model_name_or_path')
  revision = said.raw.get('revision')
  theirs = f'{name!r}' + (f' at {revision!r}' if revision else '')
  ours = f'{base.path!r}'
  ours += f' at {base.revision!r}' if base.revision else ''
  start = (
    f'config.adapt.path: the adapter in {directory} was trained on {theirs}; '
    f'config.model.path is {ours}'
  )
  recorded = _recorded(directory)
  if recorded is not None:
    if recorded != base.sha256():
      raise ValueError(
        f'{start}, whose weights differ: {base.sha256()[:12]}, not '
        f'{recorded[:12]} as in {RECORD}.'
      )
    return
  is_same = name == base.path or (name or '') == trained_on
  if not is_same and not _has_same_weights(base, name):
    raise ValueError(
      f'{start}. Train on the base of the adapter, or, if it is the same under '
      f'another name, say config.adapt.trained_on={name or ""!r}.'
    )
  if name == base.path and revision and base.revision:
    if not base.revision.startswith(revision) and _is_commit(revision):
      raise ValueError(f'{start}: another revision.')


def _recorded(directory: pathlib.Path) -> str | None:
  file = directory / RECORD
  if not file.is_file():
    return None
  try:
    return json.loads(file.read_text(encoding='utf-8')).get(KEY)
  except (ValueError, AttributeError) as error:
    raise ValueError(f'{file}: no JSON object: {error}') from None


def _has_same_weights(base: Base, name) -> bool:
  """Whether the adapter's base is a directory here with the same weights."""
  if not isinstance(name, str) or not name:
    return False
  there = pathlib.Path(name).expanduser()
  if not there.is_dir():
    return False
  if there.resolve() == base.directory.resolve():
    return True
  try:
    return base.hash_of(there) == base.sha256()
  except ValueError:  # No weights there.
    return False


def _is_commit(revision: str) -> bool:
  """Branches and tags move, and cannot be compared with a commit."""
  return len(revision) >= 7 and all(c in '0123456789abcdef' for c in revision)
