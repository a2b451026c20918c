"""What an evaluation found, on a terminal. The record: see evaluate_parts."""

from collections.abc import Mapping, Sequence

from tuner.report import escape, evaluate_flips, evaluate_labels
from tuner.report import evaluate_parts as parts_lib
from tuner.report import evaluate_screen as screen_lib

ROWS = 2  # that flipped to each side, and as many samples where none did
PAIRS = 5  # of labels that were confused
POINTS = 12  # of a curve


def lines(
  record: Mapping,
  predictions_base: Sequence[Mapping] | None,
  predictions_tuned: Sequence[Mapping] | None,
  colour: bool,
  columns: int = 80,
) -> str:
  """What is to be seen at once, in lines of `columns` (60 or more).

  The verdict comes first. Kinds of general text, more rows and facts are on the
  page. Of what was not measured only what is always asked for is said. In
  colour as without, ⟦ ⟧ stand around what differs from the wanted answer.
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
  if parts_lib.part(record, 'comparison', 'flips'):
    _flips(show, record, predictions_base or (), predictions_tuned or ())
  elif record.get('samples'):
    _samples(show, record)
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
  for row in rows:
    if (own := row.difference) is None:
      continue
    counts = [own.get(k) for k in ('wins', 'ties', 'losses')]
    said = ' / '.join(map(_count, counts)) if any(counts) else parts_lib.NAN
    p = parts_lib.chance(own['p']).removeprefix('p ').removeprefix('= ')
    style = parts_lib.side(row.name, own)
    cells = (parts_lib.signed(own), p, said)
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
  if record.get('retention'):
    show.heading('general ability')
    # Kinds of text, as general_nats.code, are on the page.
    rows = [row for row in parts_lib.retention(record) if '.' not in row.name]
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
  elif record.get('retention_share') != 0:
    show.missing(record, 'retention')
  if reads := parts_lib.reads(record):
    state, said = reads
    show.words(said, style=state if state != 'good' else None)


def _curve(show, record):
  points, alphas = record.get('checkpoints'), record.get('alphas')
  if not points and not alphas:
    return
  show.heading('task against forgetting')
  if points:
    rows = [
      (
        f'step {point["step"]:,}',
        'good' if point.get('chosen') else None,
        *_point(point),
        parts_lib.standing(point),
      )
      for point in _few(points)
    ]
    head = (str(points[0]['metric']), 'general nats', '')
    show.table(_fitting(head), rows, 'dev split')
    if (more := len(points) - len(rows)) > 0:
      said = f'{parts_lib.count(more, "more checkpoint")} on the page'
      show.words(said, style='dim')
  bound = record.get('max_nats_increase')
  if bound is not None:
    show.words(f'bound: general nats {parts_lib.number(bound, True)} at most')
  if alphas:
    rows = [
      (f'alpha {point["alpha"]:.3g}', None, *_point(point)) for point in alphas
    ]
    title = f'{record.get("split")} split'
    show.table(('value', 'general nats'), rows, escape.visible(title))


def _few(points):
  """At most POINTS, evenly spaced; the chosen one and the last among them."""
  kept = evaluate_flips.evenly(range(len(points)), POINTS - 2)
  kept += [i for i, point in enumerate(points) if point.get('chosen')]
  return [points[i] for i in sorted({*kept, len(points) - 1})]


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
  rows, groups = evaluate_flips.flips(record, base, tuned, ROWS)
  first = groups[0].metric
  show.heading(f'rows that flipped by {escape.visible(first)}')
  flipped = parts_lib.part(record, 'comparison', 'flips')[first]
  shown = [id for which in ('lost', 'won') for id in flipped[which][:ROWS]]
  for row in rows:
    if row.where in shown:
      _row(show, row)
  left = [
    f'{more:,} more {which}'
    for which in ('lost', 'won')
    if (more := len(flipped[which]) - ROWS) > 0
  ]
  if left:
    show.words(f'{", ".join(left)}: on the page', style='dim')
  if not shown:
    show.words('none', style='dim')


def _row(show, row):
  said = [
    f'{side} {", ".join(names)}'
    for side, names in (('lost', row.lost), ('won', row.won))
    if names
  ]
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
    if output == known['reference']:
      show.aside(f'{name}: as wanted')
    elif output is not None:
      show.text(name, output, known['reference'])


def _samples(show, record):
  show.heading('samples')
  samples = record['samples']
  for i, sample in enumerate(evaluate_flips.evenly(samples, ROWS)):
    show.lines += [''] * bool(i)
    _texts(show, sample, sample.get('base'), sample.get('tuned'))
  if (more := len(samples) - ROWS) > 0:
    said = f'{parts_lib.count(more, "more sample")} on the page'
    show.words(said, style='dim')
