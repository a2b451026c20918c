"""The written predictions of a suite, and a few of them to look at."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def predictions(folder: pathlib.Path, suite: str) -> list[dict[str, Any]]:
  """The written predictions of a suite."""
  text = (folder / f'{suite}.predictions.jsonl').read_text(encoding='utf-8')
  # Not splitlines: U+2028 inside an answer is no end of a line.
  return [json.loads(line) for line in text.split('\n') if line]


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
