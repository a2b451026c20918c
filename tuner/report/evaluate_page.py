"""What an evaluation found, as one HTML page that needs nothing else.

The record is that of `evaluate_parts`. The page runs no script and loads
nothing: its policy forbids both, so that what models say can at most be read.
"""

from collections.abc import Mapping, Sequence

from tuner.report import (
  escape,
  evaluate_heat,
  evaluate_labels,
  evaluate_plot,
  evaluate_rows,
  evaluate_style,
)
from tuner.report import evaluate_parts as parts_lib

_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
  "form-action 'none'"
)
_KINDS = {
  'content': 'content: what the answer says',
  'format': 'format: whether it can be read',
  'likelihood': 'likelihood: what the model expects',
}


def html(
  record: Mapping,
  predictions_base: Sequence[Mapping] | None,
  predictions_tuned: Sequence[Mapping] | None,
  title: str,
) -> str:
  """The whole page as text; predictions are those of <suite>.predictions.jsonl.

  What was not measured is said, with what would measure it.
  """
  state, said = parts_lib.verdict(record)
  predictions = (predictions_base or (), predictions_tuned or ())
  h = escape.html
  body = [
    f'<header><h1>{h(title)}</h1>',
    f'<p class="verdict {state}">{h(said)}</p></header>',
    *_scores(record),
    *_retention(record),
    *_harness(record),
    *_curve(record),
    *_confused(record),
    '<h2>Rows that flipped</h2>',
    _missing(record, 'flips') or evaluate_rows.flips(record, *predictions),
    '<h2>Sample predictions</h2>',
    _missing(record, 'samples') or evaluate_rows.samples(record['samples']),
    '<h2>Facts</h2>',
    _facts(record),
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="referrer" content="no-referrer">\n'
    f'<title>{h(title)}</title>\n<style>{evaluate_style.CSS}</style></head>\n'
    '<body><main>\n' + '\n'.join(body) + '\n</main></body></html>\n'
  )


def _missing(record, *names):
  found = [parts_lib.missing(record, name) for name in names]
  return ''.join(
    f'<p class="soft">– {escape.html(said)}</p>' for said in found if said
  )


def _scores(record):
  rows = parts_lib.metrics(record)
  single = _missing(record, 'base', 'tuned')
  yield '<h2>Base and tuned</h2>' + (single or _missing(record, 'comparison'))
  head = ('', 'base', 'tuned', 'tuned − base', 'p', 'won', 'tied', 'lost', 'n')
  body = []
  for title, row in parts_lib.kinds(rows):
    if title:
      said = escape.html(_KINDS.get(title, title))
      body.append(
        f'<tr><th class="kind" colspan="{len(head)}">{said}</th></tr>'
      )
    body.append(_score(row))
  yield _table(head, body)


def _score(row):
  own = row.difference
  cells = [_cell(row.base), _cell(row.tuned)]
  if own:
    p = parts_lib.chance(own['p']).removeprefix('p ').removeprefix('= ')
    cells += [_difference(row.name, own), f'<td>{escape.html(p)}</td>']
    cells += [_count(own.get(k)) for k in ('wins', 'ties', 'losses')]
  else:
    cells += [_difference(row.name, None)] * 5
  return _row(row.name, [*cells, _count(row.n)])


def _row(name, cells, classes=''):
  given = f' class="{classes}"' if classes else ''
  return f'<tr{given}><th>{_broken(name)}</th>{"".join(cells)}</tr>'


def _broken(name):
  """A name that may be broken where its parts meet."""
  html = escape.html(name)
  return html.replace('_', '_<wbr>').replace('.', '.<wbr>')


def _cell(found):
  if not found:
    return f'<td class="soft">{parts_lib.NAN}</td>'
  return (
    f'<td>{parts_lib.number(found["value"])}'
    f'<small>{parts_lib.interval(found)}</small></td>'
  )


def _difference(name, own):
  if not own:
    return f'<td class="soft">{parts_lib.NAN}</td>'
  tone = parts_lib.side(name, own)
  value = parts_lib.number(own['difference'], True)
  between = parts_lib.interval(own, True)
  return f'<td><b class="{tone}">{value}</b><small>{between}</small></td>'


def _count(n):
  return f'<td>{parts_lib.NAN if n is None else f"{n:,}"}</td>'


def _table(head, body):
  heads = ''.join(f'<th>{escape.html(name)}</th>' for name in head)
  return (
    f'<div class="box"><table><thead><tr>{heads}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody></table></div>'
  )


def _retention(record):
  yield '<h2>General ability, before and after</h2>'
  if said := _missing(record, 'retention'):
    yield said
  else:
    body = [
      _row(
        row.name,
        [
          _cell(row.base),
          _cell(row.tuned),
          _difference(row.name, row.difference),
          _count(row.n),
        ],
      )
      for row in parts_lib.retention(record)
    ]
    yield _table(('', 'base', 'tuned', 'tuned − base', 'n'), body)
  if reads := parts_lib.reads(record):
    state, said = reads
    yield f'<p class="legend {state}">{escape.html(said)}.</p>'


def _harness(record):
  body = [
    _row(row.name, [_cell(row.base), _cell(row.tuned), _count(row.n)])
    for row in parts_lib.harness(record)
  ]
  if body:
    yield '<h2>Tasks of lm-eval</h2>'
    yield _table(('', 'base', 'tuned', 'n'), body)


def _curve(record):
  yield '<h2>Task against forgetting</h2>' + _missing(record, 'checkpoints')
  points = record.get('checkpoints') or []
  alphas = record.get('alphas') or []
  bound = record.get('max_nats_increase')
  if not points and not alphas:
    return
  metric = str(points[0]['metric'] if points else parts_lib.main_metric(record))
  drawn = evaluate_plot.curve(points, alphas, bound, metric)
  if drawn:
    yield f'<div class="box figure">{drawn}</div>'
    yield _drawn(points, alphas, record.get('split'))
  if more := evaluate_plot.undrawn([*points, *alphas]):
    yield (
      f'<p class="soft">– {parts_lib.count(more, "point")} not drawn: general '
      'text was not measured there</p>'
    )
  yield _missing(record, 'alphas')
  rows = [
    _row(
      f'step {point["step"]:,}',
      [*_place(point), f'<td>{parts_lib.standing(point)}</td>'],
      evaluate_plot.TONES[parts_lib.standing(point)],
    )
    for point in points
  ]
  rows += [
    _row(f'alpha {point["alpha"]:.3g}', [*_place(point), '<td></td>'])
    for point in alphas
  ]
  table = _table(('', metric, 'general nats', ''), rows)
  is_open = '' if drawn else ' open'
  yield f'<details{is_open}><summary>the numbers</summary>{table}</details>'


def _drawn(points, alphas, split):
  said = ['● checkpoints by step, on the dev split'] if points else []
  standings = [parts_lib.standing(point) for point in points]
  if 'chosen' in standings:
    said.append('ringed: chosen')
  if 'outside the bound' in standings:
    said.append('grey: outside the bound')
  if alphas:
    said.append(
      f'□ alpha: this much of the way from base to tuned, on the {split} split'
    )
  line = escape.html('; '.join(said))
  return f'<p class="legend">{line}. Bars: 95 % intervals.</p>'


def _place(point):
  nats = parts_lib.number(point.get('nats_increase'), True)
  return [_cell(point), f'<td>{nats}</td>']


def _confused(record):
  if tables := evaluate_labels.tables(record):
    yield '<h2>Confused labels</h2>'
    yield evaluate_heat.pairs(tables)
    yield evaluate_heat.matrices(tables)


def _facts(record):
  rows = [
    f'<tr><th>{escape.html(name)}</th>'
    f'<td class="fact">{escape.html(value)}</td></tr>'
    for name, value in parts_lib.facts(record)
  ]
  return f'<div class="box"><table>{"".join(rows)}</table></div>'
