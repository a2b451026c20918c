"""Rows of an evaluation in HTML: what was asked, wanted and answered."""

from collections.abc import Mapping, Sequence

from tuner.report import escape, evaluate_flips, evaluate_marks

MOST = 50  # rows of each metric and side
CHARACTERS = 800  # of each text
SAMPLES = 12
_DIFFED = 2000  # characters of a text that are compared
_OPEN = 4  # rows of each side that need no click


def flips(
  record: Mapping, base: Sequence[Mapping], tuned: Sequence[Mapping]
) -> str:
  """Rows that flipped, and buttons that show those of one metric and side.

  The buttons are radio buttons before the rows; a rule of CSS for each hides
  the rows that are not its own, so that no script is needed.
  """
  rows, groups = evaluate_flips.flips(record, base, tuned, MOST)
  picks = [group for group in groups if group.total]
  if not picks:
    return _left(groups)
  places = {(g.metric, g.side): f'f{i}' for i, g in enumerate(picks, 1)}
  sides = [bool(row.lost) for row in rows]
  shown = [
    _flip(row, places, sides[:i].count(sides[i]) < _OPEN)
    for i, row in enumerate(rows)
  ]
  buttons = [_button(i) for i in range(len(picks) + 1)]
  labels = ''.join(_label(i, group) for i, group in enumerate([None, *picks]))
  rules = [_FOCUS.format(i=i) for i in range(len(picks) + 1)]
  rules += [_PICK.format(i=i) for i in range(1, len(picks) + 1)]
  notes = [_note(i, group) for i, group in enumerate(picks, 1)]
  body = [*buttons, f'<div class="chips">{labels}</div>', _left(groups)]
  return (
    f'{_LEGEND}<style>{"".join(rules)}</style>\n<div>'
    + '\n'.join([*body, *notes, *shown])
    + '</div>'
  )


_LEGEND = (
  '<p class="legend">Won: tuned scores higher than base. '
  '<mark>Marked</mark>: differs from the wanted answer; '
  '<mark class="gap"></mark>: something of it is missing here. '
  '<code>↵</code> is a newline.</p>'
)
_FOCUS = """
#f{i}:checked ~ .chips label[for=f{i}] {{ border-color: var(--text);
  box-shadow: inset 0 0 0 1px var(--text); }}
#f{i}:focus-visible ~ .chips label[for=f{i}] {{ outline: 2px solid var(--bar);
  }}"""
_PICK = """
#f{i}:checked ~ .row:not(.f{i}) {{ display: none; }}
#f{i}:checked ~ .n{i} {{ display: block; }}"""


def _button(i):
  checked = '' if i else ' checked'
  return f'<input class="pick" type="radio" name="flip" id="f{i}"{checked}>'


def _label(i, group):
  said = 'all shown'
  if group is not None:
    tone = 'bad' if group.side == 'lost' else 'good'
    counted = f'<b class="{tone}">{group.side} {group.total:,}</b>'
    said = f'{escape.html(group.metric)} {counted}'
  return f'<label for="f{i}">{said}</label>'


def _note(i, group):
  if group.shown == group.total:
    return ''
  return (
    f'<p class="soft note n{i}">{group.shown:,} of {group.total:,} rows are '
    'shown; all answers are in eval/*.predictions.jsonl.</p>'
  )


def _left(groups):
  """Which sides have no rows at all, which their buttons cannot say."""
  none = [f'{g.side} by {g.metric}' for g in groups if not g.total]
  if not none:
    return ''
  return f'<p class="soft">No row was {escape.html(", ".join(none))}.</p>'


def _flip(row, places, is_open):
  classes = ['row']
  said = []
  for side, names in (('lost', row.lost), ('won', row.won)):
    classes += [places[name, side] for name in names]
    if names:
      tone = 'bad' if side == 'lost' else 'good'
      which = escape.html(', '.join(names))
      said.append(f'<b class="{tone}">{side}</b> {which}')
  title = f'{escape.html(row.where)} · {" · ".join(said)}'
  known = row.tuned or row.base
  if known is None:
    body = '<p class="soft">Its prediction is not among those given.</p>'
  else:
    title += f'<span class="peek"> · {_excerpt(known)}</span>'
    outputs = [side and side['output'] for side in (row.base, row.tuned)]
    body = _texts(known, *outputs)
  return _details(' '.join(classes), title, body, is_open)


def samples(samples: Sequence[Mapping]) -> str:
  """Some of the samples, evenly spaced."""
  kept = list(evaluate_flips.evenly(samples, SAMPLES))
  shown = [
    _details(
      'row',
      _excerpt(sample),
      _texts(sample, sample.get('base'), sample.get('tuned')),
      i < _OPEN,
    )
    for i, sample in enumerate(kept)
  ]
  if (more := len(samples) - len(kept)) > 0:
    shown.append(f'<p class="soft">{more:,} more samples in the record.</p>')
  return '\n'.join(shown)


def _excerpt(sample):
  last, _ = evaluate_flips.asked(sample['prompt'])
  return escape.html(escape.cut(escape.visible(last[:200]), 90))


def _details(classes, title, body, is_open):
  return (
    f'<details class="{classes}"{" open" if is_open else ""}>'
    f'<summary>{title}</summary>{body}</details>'
  )


def _texts(known, base, tuned):
  last, before = evaluate_flips.asked(known['prompt'])
  note = f'<span class="more">({escape.html(before)})</span>' if before else ''
  wanted = known['reference']
  said = [
    ('prompt', f'<pre>{text(last)} {note}</pre>'),
    ('wanted', f'<pre>{text(wanted)}</pre>'),
  ]
  for name, output in (('base', base), ('tuned', tuned)):
    if output is not None:
      tone = ' <b class="good">=</b>' if output == wanted else ''
      said.append((name + tone, f'<pre>{text(output, wanted)}</pre>'))
  rows = ''.join(f'<dt>{name}</dt><dd>{shown}</dd>' for name, shown in said)
  return f'<dl>{rows}</dl>'


def text(said: str, wanted: str | None = None) -> str:
  """HTML of a text; what differs from `wanted` marked, what is cut counted."""
  if not said:
    return '<span class="more">∅ nothing</span>'
  shown, more = evaluate_flips.shorten(said, CHARACTERS)
  pieces = [(shown, False)]
  if wanted is not None:
    found = evaluate_marks.differences(said[:_DIFFED], wanted[:_DIFFED])
    pieces = evaluate_marks.first(found, len(shown))
  html = ''.join(_piece(*piece) for piece in pieces)
  return html + (f' <span class="more">{more}</span>' if more else '')


def _piece(said, differs):
  shown = f'{escape.NEWLINE}\n'.join(map(escape.html, said.split('\n')))
  if not differs:
    return shown
  if not said:
    return (
      '<mark class="gap" title="words of the wanted answer are missing"></mark>'
    )
  return f'<mark>{shown}</mark>'
