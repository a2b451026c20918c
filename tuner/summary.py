"""The written rows of a suite, and a few of them to look at."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def predictions(folder: pathlib.Path, suite: str) -> list[dict[str, Any]]:
  """The written predictions of a suite. Raises ValueError."""
  return _lines(folder / f'{suite}.predictions.jsonl')


def losses(folder: pathlib.Path, suite: str) -> list[dict[str, Any]] | None:
  """Nats and targets of each row; None: written before there were such files.

  Raises ValueError.
  """
  path = folder / f'{suite}.losses.jsonl'
  return _lines(path) if path.is_file() else None


def record(path: pathlib.Path) -> dict[str, Any] | None:
  """A written result; None where there is none. Raises ValueError."""
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(_damaged(path, error)) from error
  if not isinstance(found, dict):
    raise ValueError(_damaged(path, f'{type(found).__name__}, not an object'))
  return found


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    # Not splitlines: U+2028 inside an answer is no end of a line.
    lines = path.read_text(encoding='utf-8').split('\n')
    return [json.loads(line) for line in lines if line]
  except (OSError, ValueError) as error:
    raise ValueError(_damaged(path, error)) from error


def _damaged(path: pathlib.Path, error) -> str:
  suite = path.name.removesuffix('.jsonl').removesuffix('.json')
  for kind in ('.predictions', '.losses'):
    suite = suite.removesuffix(kind)
  return (
    f'{path} cannot be read: {error}. Delete {path.parent / suite}.json, and '
    'what it holds is measured anew.'
  )


def samples(rows: Sequence[Mapping], n: int) -> list[tuple[str, ...]]:
  """(prompt, reference, output) of n rows, evenly spaced."""
  picked = [rows[i] for i in spread(len(rows), n)]
  return [(asked(row), row['reference'], row['output']) for row in picked]


def asked(row: Mapping) -> str:
  """What was said last before the answer."""
  return str(row['prompt'][-1]['content'])


def spread(n: int, k: int) -> list[int]:
  """At most k of the first n numbers, evenly spaced."""
  step = max(1, n // k)
  return list(range(0, n, step))[:k]
