"""What an evaluation found, in words and rows, for the text and for the page.

The record is eval/evaluation.json, plain JSON; a part of it that is null, empty
or not there was not measured, which is said with what would measure it, never
shown as zero:

record = {
  'base': name of the model, 'step': of the tuned one, 'split', 'n': rows,
  'reads': how often the split was read, and any other fact, as 'config',
  'metric': the first to be asked for; else that of the checkpoints, or the
            first of content,
  'systems': {'base', 'tuned': metrics | None}, where metrics are
    {name: {'value', 'low', 'high', 'n', 'kind': one of KINDS}},
  'comparison': {'metrics': {name: {'difference', 'low', 'high', 'p', 'wins',
    'ties', 'losses'}}, 'flips': {name: {'won': [row id], 'lost': [row id]}}},
  'retention': {'base': metrics, 'tuned': metrics},
  'checkpoints': [{'step', 'metric', 'value', 'low', 'high', 'nats_increase',
    'chosen', 'allowed'}] on the dev split, step 0 being the base,
  'max_nats_increase': the bound of 'allowed',
  'alphas': [{'alpha', 'value', 'low', 'high', 'nats_increase'}],
  'harness': {'base', 'tuned': {task: {metric: {'value', 'stderr', 'n'}}}},
  'samples': [{'prompt', 'reference', 'base', 'tuned'}],
  'confusion': {'base', 'tuned': {'labels', 'counts'} | None}, see
    evaluate_labels,
}

Nothing in it is escaped, nor in what is returned here; the pages do that.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

KINDS = ('content', 'format', 'likelihood')
NAN = '–'
# What would measure a part that is not there.
MISSING = {
  'base': 'the base was not measured: config.evaluate.base=True',
  'tuned': 'no tuned model was measured: train, or evaluate --step=N',
  'comparison': 'base and tuned were not compared row by row: no answers were '
  'generated; config.evaluate.metrics',
  'retention': 'general ability was not measured: a greater '
  'config.retention.share, or what scripts/fetch_retention.py writes',
  'checkpoints': 'no checkpoints were measured on the way: '
  'config.evaluate.every above 0',
  'alphas': 'weights between base and tuned were not measured: evaluate '
  '--alphas=0.25,0.5,0.75',
  'samples': 'no samples: no answers were generated; config.evaluate.metrics',
  'flips': 'rows that flipped are not known: that takes answers of base and '
  'tuned',
}
# Whose name is not that of the metric and '_increase'.
_INCREASES = {'nats_increase': 'general_nats'}
_SMALLER_IS_BETTER = (
  'nats_per_token', 'general_nats', 'nats_increase', 'kl_nats', 'refusals',
)  # fmt: skip


class Row(NamedTuple):
  """One metric of both systems; any of the three may be None."""

  name: str
  kind: str
  base: Mapping[str, Any] | None
  tuned: Mapping[str, Any] | None
  difference: Mapping[str, Any] | None

  @property
  def n(self) -> int | None:
    return ((self.tuned or self.base) or {}).get('n')


def metrics(record: Mapping) -> list[Row]:
  """The metrics of the task, those of content first, then by their order."""
  systems = record.get('systems') or {}
  differences = part(record, 'comparison', 'metrics')
  rows = _rows(systems.get('base'), systems.get('tuned'), differences)
  order = {kind: i for i, kind in enumerate(KINDS)}
  return sorted(rows, key=lambda row: order.get(row.kind, len(KINDS)))


def kinds(rows: Sequence[Row]) -> Iterator[tuple[str | None, Row]]:
  """Each row, and before the first of a kind its name; None: no title."""
  has_kinds, last = any(row.kind for row in rows), ''
  for row in rows:
    own = row.kind or ('other' if has_kinds else '')
    yield (own if own != last else None), row
    last = own


def retention(record: Mapping) -> list[Row]:
  """The metrics of general ability; an increase is the difference of its own.

  That of the base over itself is left out.
  """
  found = record.get('retention') or {}
  base, tuned = found.get('base') or {}, found.get('tuned') or {}
  of = {_INCREASES.get(k, k.removesuffix('_increase')): k for k in tuned}
  own = {
    name: tuned[key] | {'difference': tuned[key]['value']}
    for name, key in of.items()
    if name != key and name in tuned
  }
  said = {of[name] for name in own}
  kept, before = (
    {name: metric for name, metric in side.items() if name not in said}
    for side in (tuned, base)
  )
  return _rows(before, kept, own)


def harness(record: Mapping) -> list[Row]:
  """The tasks of lm-eval; intervals are 1.96 of its standard errors."""
  found = record.get('harness') or {}
  return _rows(_tasks(found.get('base')), _tasks(found.get('tuned')), {})


def _tasks(found):
  return {
    f'{task} {name}': {**metric, **_ends(metric)}
    for task, metrics in (found or {}).items()
    for name, metric in metrics.items()
  }


def _ends(metric):
  value, error = metric['value'], metric.get('stderr')
  if error is None:
    return {}
  half = 1.96 * float(error)
  return {'low': float(value) - half, 'high': float(value) + half}


def _rows(base, tuned, differences) -> list[Row]:
  base, tuned = base or {}, tuned or {}
  names = dict.fromkeys((*tuned, *base, *differences))
  return [
    Row(
      name,
      str((tuned.get(name) or base.get(name) or {}).get('kind') or ''),
      base.get(name),
      tuned.get(name),
      differences.get(name),
    )
    for name in names
  ]


def main_metric(record: Mapping) -> str | None:
  """The metric that the verdict is about; None where nothing was measured."""
  rows = metrics(record)
  names = [row.name for row in rows]
  checkpoints = record.get('checkpoints') or [{}]
  for name in (record.get('metric'), checkpoints[0].get('metric')):
    if name in names:
      return name
  compared = [row.name for row in rows if row.difference]
  return next(iter((*compared, *names)), None)


def verdict(record: Mapping) -> tuple[str, str]:
  """(good | bad | look, one sentence of numbers).

  good and bad: the whole interval of the difference is on that side of 0.
  """
  rows = {row.name: row for row in metrics(record)}
  row = rows.get(main_metric(record) or '')
  if row is None:
    return 'look', 'nothing was measured'
  said, state = _score(row), 'look'
  if row.difference:
    said, state = _gain(row), side(row.name, row.difference)
  if row.tuned is None:
    return state, said
  after = (record.get('retention') or {}).get('tuned') or {}
  if increase := after.get('nats_increase'):
    said += f'; general text {signed(increase)} nats a token'
  else:
    said += '; general text not measured'
  return state, said


def _score(row):
  """Where there is no difference: of what there is."""
  if row.tuned is None:
    return f'{row.name} {plain(row.base)} on {count(row.n)}, the base alone'
  said = f'{row.name} {plain(row.tuned)} on {count(row.n)}'
  if row.base is None:
    return f'{said}; not compared with a base'
  return f'{said}, the base {plain(row.base)}'


def _gain(row):
  own = row.difference
  counts = [f'{own[k]:,} {name}' for k, name in SIDES if own.get(k) is not None]
  p = [chance(own['p'])] if own.get('p') is not None else []
  inside = '; '.join([*p, ', '.join(counts)] if counts else p)
  said = f'{row.name} {signed(own)} on {count(row.n)}'
  return said + f' ({inside})' * bool(inside)


SIDES = (('wins', 'won'), ('losses', 'lost'))


def side(name: str, difference: Mapping) -> str:
  """Whether a difference is good, bad, or not told apart from 0: look."""
  low, high = float(difference['low']), float(difference['high'])
  if low > 0 or high < 0:
    smaller = name.rpartition('.')[2] in _SMALLER_IS_BETTER
    return 'good' if (low > 0) is not smaller else 'bad'
  return 'look'


def number(value: Any, sign: bool = False) -> str:
  """Three decimals of what is below 10, fewer of more, – of what is none."""
  if value is None or not math.isfinite(float(value)):
    return NAN
  value, plus = float(value), '+' if sign else ''
  size = abs(value)
  if 0 < size < 0.0005:
    return f'{value:{plus}.0e}'
  if size >= 1e6:
    return f'{value:{plus}.3g}'
  digits = 3 if size < 9.9995 else 2 if size < 99.995 else 1
  return f'{value:{plus},.{digits}f}'


def interval(found: Mapping, sign: bool = False) -> str:
  """'[low, high]' of 95 %; nothing where it has none."""
  if found.get('low') is None or found.get('high') is None:
    return ''
  return f'[{number(found["low"], sign)}, {number(found["high"], sign)}]'


def plain(found: Mapping) -> str:
  return f'{number(found["value"])} {interval(found)}'.rstrip()


def signed(found: Mapping) -> str:
  value = found['difference'] if 'difference' in found else found['value']
  return f'{number(value, True)} {interval(found, True)}'.rstrip()


def chance(p: Any) -> str:
  """'p = 0.03'; what is below a ten thousandth is only that."""
  p = float(p)
  if not math.isfinite(p):
    return f'p {NAN}'
  return 'p < 0.0001' if p < 1e-4 else f'p = {p:.2g}'


def reads(record: Mapping) -> tuple[str, str] | None:
  """(state, how often the split was read and what that means)."""
  times, split = record.get('reads'), record.get('split')
  if times is None:
    return None
  if times == 1:
    return 'good', f'the {split} split was read once'
  return 'look', (
    f'the {split} split was read {times:,} times: what was chosen after seeing '
    'it was not held out from it'
  )


def facts(record: Mapping) -> list[tuple[str, str]]:
  """Every plain value of the record and of its records of such, by name."""
  found = []
  for key, value in record.items():
    inner = value.items() if isinstance(value, Mapping) else [('', value)]
    found += [
      (f'{key} {name}'.rstrip(), f'{own:,}' if type(own) is int else str(own))
      for name, own in inner
      if isinstance(own, str | int | float)
    ]
  return found


def missing(record: Mapping, name: str) -> str | None:
  """What is said of a part that is not there; None where it is."""
  found = record.get(name)
  if name in ('base', 'tuned'):
    found = (record.get('systems') or {}).get(name)
  if name == 'flips':
    found = part(record, 'comparison', 'flips')
  return None if found else MISSING[name]


def standing(point: Mapping) -> str:
  """What a checkpoint is: base (step 0), chosen, outside the bound, or ''."""
  if point['step'] == 0:
    return 'base'
  if point.get('chosen'):
    return 'chosen'
  return '' if point.get('allowed', True) else 'outside the bound'


def part(record: Mapping, name: str, key: str) -> Mapping:
  """A part of a part; empty where it is not there."""
  return (record.get(name) or {}).get(key) or {}


def count(n: int | None, noun: str = 'row') -> str:
  return f'{n or 0:,} {noun}{"s" * (n != 1)}'
