"""What a run prints when it is over, in 80 columns."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tuner import progress
from tuner.evals import stats

SEED = 0


def table(base: Mapping | None, tuned: Mapping, differences: Mapping) -> str:
  """Base and tuned side by side: mean [95 % interval], and what was won."""
  rows = [('', *(['base'] if base else []), 'tuned', *_won(base))]
  for name, own in tuned['metrics'].items():
    cells = [name]
    if base:
      cells.append(_cell(base['metrics'][name]))
    cells.append(_cell(own))
    if base:
      cells.append(_difference(differences.get(name)))
    rows.append(tuple(cells))
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  return '\n'.join(line.rstrip() for line in lines)


def _won(base) -> list[str]:
  return ['tuned - base'] if base else []


def _cell(metric: Mapping[str, float]) -> str:
  return f'{metric["value"]:.3f} [{metric["low"]:.3f}, {metric["high"]:.3f}]'


def _difference(interval) -> str:
  if interval is None:
    return ''
  return f'{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]'


def differences(
  base: Sequence[Mapping], tuned: Sequence[Mapping]
) -> dict[str, stats.Interval]:
  """Paired differences of every score, on the same rows in the same order."""
  if [p['id'] for p in base] != [p['id'] for p in tuned]:
    raise RuntimeError('base and tuned were not measured on the same rows.')
  names = tuned[0]['scores'] if tuned else ()
  return {
    name: stats.paired(
      [p['scores'][name] for p in tuned],
      [p['scores'][name] for p in base],
      SEED,
    )
    for name in names
  }


def predictions(folder: pathlib.Path, suite: str) -> list[dict[str, Any]]:
  """The written predictions of a suite."""
  text = (folder / f'{suite}.predictions.jsonl').read_text(encoding='utf-8')
  # Not splitlines: U+2028 inside an answer is no end of a line.
  return [json.loads(line) for line in text.split('\n') if line]


def examples(base: Sequence[Mapping], tuned: Sequence[Mapping], n=3) -> str:
  """n rows, evenly spaced: question, wanted, base, tuned; one line each."""
  step = max(1, len(tuned) // n)
  blocks = []
  for i in range(0, len(tuned), step)[:n]:
    lines = [
      ('prompt', tuned[i]['prompt'][-1]['content']),
      ('wanted', tuned[i]['reference']),
      *([('base', base[i]['output'])] if base else []),
      ('tuned', tuned[i]['output']),
    ]
    blocks.append('\n'.join(f'{name:7s}{_short(text)}' for name, text in lines))
  return '\n\n'.join(blocks)


def _short(text: str, columns: int = 72) -> str:
  """One printable line of at most `columns` characters."""
  line = progress.clean(' '.join(text.split()))
  return line if len(line) <= columns else line[: columns - 3] + '...'
