"""What a run prints when it is over, in 80 columns."""

import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tuner import progress
from tuner.evals import stats


def table(base: Mapping | None, tuned: Mapping, differences: Mapping) -> str:
  """Base and tuned side by side, mean [95 % interval]; below, what was won."""
  own = tuned['metrics']
  rows = [('', *(['base'] if base else []), 'tuned')]
  for name, metric in own.items():
    both = [base['metrics'][name], metric] if base else [metric]
    rows.append((_label(name), *(_cell(m) for m in both)))
  won = [(_label(n), _difference(i)) for n, i in differences.items()]
  if base and won:
    rows += [(), ('', 'tuned - base'), *won]
  return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
  columns = range(max(len(row) for row in rows))
  widths = [max(len(r[i]) for r in rows if i < len(r)) for i in columns]
  lines = [
    '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=False))
    for row in rows
  ]
  return '\n'.join(line.rstrip() for line in lines)


def _label(name: str) -> str:
  """A metric's name without its module, short enough for two cells beside."""
  return progress.clean(name.rpartition('.')[2])[:24]


def _cell(metric: Mapping[str, Any]) -> str:
  """Ends of an interval that are no numbers are text: see generative.write."""
  value, low, high = (float(metric[key]) for key in ('value', 'low', 'high'))
  return f'{value:.3f} [{low:.3f}, {high:.3f}]'


def _difference(interval: stats.Interval) -> str:
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
      stats.SEED,
    )
    for name in names
  }


def predictions(folder: pathlib.Path, suite: str) -> list[dict[str, Any]]:
  """The written predictions of a suite."""
  text = (folder / f'{suite}.predictions.jsonl').read_text(encoding='utf-8')
  # Not splitlines: U+2028 inside an answer is no end of a line.
  return [json.loads(line) for line in text.split('\n') if line]


def examples(base: Sequence[Mapping], tuned: Sequence[Mapping], n=3) -> str:
  """n rows, evenly spaced: prompt, wanted answer, base's and tuned's."""
  step = max(1, len(tuned) // n)
  blocks = []
  for i in range(0, len(tuned), step)[:n]:
    lines = [
      ('prompt', tuned[i]['prompt'][-1]['content']),
      ('wanted', tuned[i]['reference']),
      *([('base', base[i]['output'])] if base else []),
      ('tuned', tuned[i]['output']),
    ]
    blocks.append('\n'.join(_wrapped(name, text) for name, text in lines))
  return '\n\n'.join(blocks)


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


def _wrapped(name: str, text: str, columns: int = 79, lines: int = 4) -> str:
  """`text` beside its name, white space folded, in at most `lines` lines."""
  indent = ' ' * 8
  wrapped = textwrap.wrap(
    progress.clean(' '.join(text.split())),
    columns,
    initial_indent=indent,
    subsequent_indent=indent,
    max_lines=lines,
    placeholder=' ...',
    break_on_hyphens=False,
  )
  return name.ljust(8) + '\n'.join(wrapped)[len(indent) :]
