"""What verification found, for a terminal of 80 columns."""

import textwrap
from collections.abc import Sequence

from tuner.artifacts import trained as trained_lib
from tuner.artifacts import verify
from tuner.report import escape

HEAD = (
  'format', 'dtype', 'read by', 'weights', 'logits', 'KL nats', 'answers',
  'prompts',
)  # fmt: skip


def text(
  trained: trained_lib.Trained,
  wanted: verify.Reference,
  found: Sequence[verify.Check],
  notes: Sequence[str],
  seconds: float,
) -> str:
  """The table, then notes, then faults."""
  n = len(trained.prompts)
  own = trained.config.model.dtype
  rows = [HEAD, *(_row(one, n) for one in found)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
  lines = [
    f'\nread again and compared with the model in memory ({own}) on {n} '
    f'prompts and\ntheir greedy answers, {wanted.tokens} tokens '
    f'({seconds:.1f} s)\n'
  ]
  lines += [
    '  '
    + '  '.join(
      cell.ljust(w) if i < 3 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  lines += ['', *(f'  {line}' for line in _bounds(found, wanted, own))]
  for note in notes:
    told = textwrap.fill(escape.visible(note), 78, subsequent_indent='  ')
    lines += textwrap.indent(told, '  ').splitlines()
  for one in found:
    lines += [
      escape.visible(f'  WRONG: {one.format}, {one.reader}: {fault}')
      for fault in one.faults
    ]
  return '\n'.join(lines) + '\n'


def _row(one: verify.Check, n: int) -> tuple[str, ...]:
  def number(value):
    return '' if value is None else f'{value:.1e}'

  def share(count):
    return '' if count is None else f'{count}/{n}'

  kept = {None: '', 0: 'same'}.get(one.weights, f'{one.weights} differ')
  return (
    one.format, one.dtype, one.reader, kept, number(one.difference),
    number(one.kl), share(one.agree), share(one.prompts),
  )  # fmt: skip


def _bounds(found, wanted, own) -> list[str]:
  """What each dtype is held to, in words; nothing that was not measured."""
  if not wanted.logits:
    return []
  lines = []
  for dtype in dict.fromkeys(one.dtype for one in found):
    name, most = verify.bound(
      (own, verify.NAMES.get(dtype, dtype)), wanted.largest
    )
    what = {'difference': 'logits within', 'kl': 'KL nats at most'}[name]
    why = ''
    if name == 'difference':
      why = f' (the largest is {wanted.largest:.0f})'
    elif own != 'float32':
      why = f' (computing in {own})'
    lines.append(f'{dtype}: {what} {most:.2g}{why}')
  first = [i for one in found for i in one.first]
  if first:
    lines.append(
      f'answers that differ do so from token {min(first) + 1} on, at the '
      'earliest'
    )
  return lines
