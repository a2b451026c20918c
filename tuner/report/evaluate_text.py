"""What an evaluation found, on a terminal. The record: see evaluate_parts."""

from collections.abc import Mapping, Sequence

from tuner.report import escape, evaluate_flips, evaluate_labels
from tuner.report import evaluate_parts as parts_lib
from tuner.report import evaluate_screen as screen_lib

ROWS = 3  # that flipped to each side, and as many samples
PAIRS = 8  # of labels that were confused
_FACTS = 18  # columns of a fact's name


def lines(
  record: Mapping,
  predictions_base: Sequence[Mapping] | None,
  predictions_tuned: Sequence[Mapping] | None,
  colour: bool,
  columns: int = 80,
) -> str:
  """The whole evaluation in lines of `columns` (60 or more), the verdict first.

  What was not measured is said in a line of its own. In colour as without,
  ⟦ ⟧ stand around what differs from the wanted answer.
  """
  show = screen_lib.Screen(columns, colour)
  state, said = parts_lib.verdict(record)
  show.words(said, style=state)
  _scores(show, record)
  _retention(show, record)
  if tasks := parts_lib.harness(record):
    show.heading('lm-eval')
    _systems(show, tasks)
  _curve(show, record)
  _confused(show, record)
  _flips(show, record, predictions_base or (), predictions_tuned or ())
  _samples(show, record)
  show.heading('facts')
  for name, value in parts_lib.facts(record):
    show.words(f'{name:<{_FACTS}}  {value}')
  return '\n'.join(show.lines) + '\n'


def _scores(show, record):
  rows = parts_lib.metrics(record)
  show.heading('scores')
  is_single = show.missing(record, 'base', 'tuned')
  if not rows:
    return
  _systems(show, rows)
  if is_single or show.missing(record, 'comparison'):
    return
  show.lines.append('')
  table: list[tuple] = []
  for title, row in parts_lib.kinds([row for row in rows if row.difference]):
    own = row.difference or {}
    if title:
      table.append((title, None))
    counts = [_count(own.get(k)) for k in ('wins', 'ties', 'losses')]
    p = parts_lib.chance(own['p']).removeprefix('p ').removeprefix('= ')
    style = parts_lib.side(row.name, own)
    cells = (parts_lib.signed(own), p, ' / '.join(counts))
    table.append((f'  {row.name}', style, *cells))
  show.table(('tuned - base', 'p', 'won / tied / lost'), table)


def _systems(show, rows):
  table: list[tuple] = []
  for title, row in parts_lib.kinds(rows):
    if title:
      table.append((title, None))
    both = [
      parts_lib.plain(system) if system else parts_lib.NAN
      for system in (row.base, row.tuned)
    ]
    table.append((f'  {row.name}', None, *both, _count(row.n)))
  show.table(('base', 'tuned', 'n'), table)


def _count(n):
  return parts_lib.NAN if n is None else f'{n:,}'


def _retention(show, record):
  show.heading('general ability')
  if not show.missing(record, 'retention'):
    rows = parts_lib.retention(record)
    _systems(show, rows)
    table = [
      (
        f'  {row.name}',
        parts_lib.side(row.name, row.difference),
        parts_lib.signed(row.difference),
      )
      for row in rows
      if row.difference
    ]
    if table:
      show.lines.append('')
      show.table(('tuned - base',), table)
  if reads := parts_lib.reads(record):
    state, said = reads
    show.words(said, style=state if state != 'good' else None)


def _curve(show, record):
  show.heading('task against forgetting')
  if not show.missing(record, 'checkpoints'):
    points = record['checkpoints']
    rows = [
      (
        f'step {point["step"]:,}',
        'good' if point.get('chosen') else None,
        *_point(point),
        parts_lib.standing(point),
      )
      for point in points
    ]
    head = (str(points[0]['metric']), 'general nats', '')
    show.table(_fitting(head), rows, 'dev split')
  bound = record.get('max_nats_increase')
  if bound is not None:
    show.words(f'bound: general nats {parts_lib.number(bound, True)} at most')
  if not show.missing(record, 'alphas'):
    rows = [
      (f'alpha {point["alpha"]:.3g}', None, *_point(point))
      for point in record['alphas']
    ]
    title = f'{record.get("split")} split'
    show.table(('value', 'general nats'), rows, escape.visible(title))


def _fitting(head):
  """Heads of columns, short enough for their numbers."""
  return [escape.cut(escape.visible(name), 24) for name in head]


def _point(point):
  return (
    parts_lib.plain(point),
    parts_lib.number(point.get('nats_increase'), True),
  )


def _confused(show, record):
  tables = evaluate_labels.tables(record)
  if tables is None:  # Most tasks have no labels.
    return
  show.heading('confused labels')
  if tables.absent:
    absent = parts_lib.count(len(tables.absent), 'label')
    show.words(f'{absent} that no row wants')
  pairs = evaluate_labels.confused(tables)
  for pair in pairs[:PAIRS]:
    counts = f'{_count(pair.tuned)} (base {_count(pair.base)})'
    show.words(f'{counts}: {pair.wanted} taken for {pair.said}')
  if (more := len(pairs) - PAIRS) > 0:
    said = f'{parts_lib.count(more, "more pair")} on the page'
    show.words(said, style='dim')


def _flips(show, record, base, tuned):
  show.heading('rows that flipped')
  if show.missing(record, 'flips'):
    return
  rows, groups = evaluate_flips.flips(record, base, tuned, ROWS)
  for name in dict.fromkeys(group.metric for group in groups):
    own = [f'{g.total:,} {g.side}' for g in groups if g.metric == name]
    show.words(f'{name}: {", ".join(own)}')
  first = groups[0].metric
  for row in rows:
    if first in (*row.lost, *row.won):
      _row(show, row)
  left = [
    f'{more:,} more {g.side}'
    for g in groups[:2]
    if (more := g.total - g.shown) > 0
  ]
  if left:
    show.words(f'{first}: {", ".join(left)}', style='dim')


def _row(show, row):
  said = [
    f'{side} {", ".join(names)}'
    for side, names in (('lost', row.lost), ('won', row.won))
    if names
  ]
  show.lines.append('')
  mark, style = ('✗', 'bad') if row.lost else ('✓', 'good')
  show.words(f'{mark} {row.where}: {"; ".join(said)}', style=style)
  known = row.tuned or row.base
  if known is None:
    show.words('its prediction is not among those given', style='dim')
    return
  outputs = (row.base, row.tuned)
  _texts(show, known, *((side['output'] if side else None) for side in outputs))


def _texts(show, known, base, tuned):
  last, before = evaluate_flips.asked(known['prompt'])
  show.text('prompt', last + (f' ({before})' if before else ''))
  show.text('wanted', known['reference'])
  for name, output in (('base', base), ('tuned', tuned)):
    if output is not None:
      show.text(name, output, known['reference'])


def _samples(show, record):
  show.heading('samples')
  if show.missing(record, 'samples'):
    return
  samples = record['samples']
  for i, sample in enumerate(evaluate_flips.evenly(samples, ROWS)):
    show.lines += [''] * bool(i)
    _texts(show, sample, sample.get('base'), sample.get('tuned'))
  if (more := len(samples) - ROWS) > 0:
    said = f'{parts_lib.count(more, "more sample")} on the page'
    show.words(said, style='dim')
