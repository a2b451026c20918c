"""Lines of a terminal: headings, tables, texts whose differences are marked."""

import re

from tuner.report import escape, evaluate_flips, evaluate_marks
from tuner.report import evaluate_parts as parts_lib

CHARACTERS = 130  # of each text of a row
_DIFFED = 2000  # characters of a text that are compared
_RESET = '\x1b[0m'
_COLOURS = {
  'good': '\x1b[1;32m',
  'bad': '\x1b[1;31m',
  'look': '\x1b[1;33m',
  'title': '\x1b[1m',
  'dim': '\x1b[2m',
  'mark': '\x1b[31m',
}
_GUTTER = '│ '
_OPEN, _CLOSE = '⟦', '⟧'
_WORDS = re.compile(r' *[^ ]+ ?| +')
_NAMES = 8  # columns of 'prompt', 'wanted', 'base', 'tuned'


class Screen:
  """Lines of a width, in colour or not; all that is put there is escaped."""

  def __init__(self, columns, colour):
    self.columns, self.colour, self.lines = columns, colour, []

  def paint(self, style, text):
    if not (self.colour and style and text):
      return text
    return f'{_COLOURS[style]}{text}{_RESET}'

  def heading(self, text):
    text = escape.cut(text, self.columns - 2)
    rule = '─' * (self.columns - escape.columns(text) - 1)
    self.lines += [
      '',
      self.paint('title', text) + ' ' + self.paint('dim', rule),
    ]

  def words(self, text, style=None):
    """Wrapped between words; only the first line starts at the left.

    So that no name of the data can pass for a line of ours.
    """
    first, *rest = escape.wrap(escape.visible(text), self.columns - 2)
    self.lines.append(self.paint(style, first))
    self.lines += ['  ' + self.paint(style, line) for line in rest]

  def missing(self, record, *names):
    """Says what of these parts is not there; whether any is."""
    found = [
      said for name in names if (said := parts_lib.missing(record, name))
    ]
    for said in found:
      self.words(f'- {said}', style='dim')
    return bool(found)

  def table(self, head, rows, title=''):
    """Names to the left, numbers to the right: rows of (name, style, *cells).

    A name that is too long stands above its numbers, and numbers that are too
    wide stand below one another. A row of a name alone is the title of those
    below it.
    """
    cells = [head, *(row[2:] for row in rows)]
    widths = [
      max(escape.columns(c[i]) for c in cells if c) for i in range(len(head))
    ]
    room = self.columns - sum(widths) - 2 * len(widths)
    if room < 0:
      self._stacked(head, rows)
      return
    names = [escape.visible(row[0]) for row in rows]
    fitting = [escape.columns(name) for name in (title, *names)]
    width = max((n for n in fitting if n <= room), default=0)
    title = escape.cut(title, width)
    self.lines.append(self.paint('dim', self._row(title, width, head, widths)))
    for name, (_, style, *own) in zip(names, rows, strict=True):
      if not own:
        self.lines.append(self.paint('dim', name))
        continue
      if escape.columns(name) > width:
        pieces = escape.pieces(name.strip(), self.columns - 2)
        self.lines += ['  ' + piece for piece in pieces]
        name = ''
      self.lines.append(self._row(name, width, own, widths, style))

  def _stacked(self, head, rows):
    for name, style, *cells in rows:
      self.words(name, style=None if cells else 'dim')
      for title, cell in zip(head, cells, strict=False):
        lines = escape.wrap(f'{title} {cell}'.strip(), self.columns - 4)
        self.lines += ['    ' + self.paint(style, line) for line in lines]
        style = None

  def _row(self, name, width, cells, widths, style=None):
    line = name + ' ' * (width - escape.columns(name))
    first, *rest = [
      ' ' * (w - escape.columns(cell)) + cell
      for cell, w in zip(cells, widths, strict=True)
    ]
    after = ''.join(f'  {cell}' for cell in rest)
    return f'{line}  {self.paint(style, first)}{after}'.rstrip()

  def aside(self, text):
    """Words of ours where a text would stand."""
    self.lines.append(self.paint('dim', _GUTTER + text))

  def text(self, name, text, wanted=None):
    """A text of a row beside its name; what differs from `wanted` in marks."""
    shown, more = evaluate_flips.shorten(text, CHARACTERS)
    pieces = [(shown, False)]
    if wanted is not None:
      found = evaluate_marks.differences(text[:_DIFFED], wanted[:_DIFFED])
      pieces = evaluate_marks.first(found, len(shown))
    room = self.columns - len(_GUTTER) - _NAMES
    lines = _flow([*_marked(pieces), (f' {more}' if more else '', 'dim')], room)
    for i, line in enumerate(lines):
      painted = ''.join(self.paint(style, part) for part, style in line)
      label = (name if i == 0 else '').ljust(_NAMES)
      self.lines.append(self.paint('dim', _GUTTER + label) + painted)


def _marked(pieces):
  """(text, style) of pieces with marks around those that differ."""
  for text, is_other in pieces:
    text = escape.visible(text)
    for mark in (_OPEN, _CLOSE):  # They are taken.
      text = text.replace(mark, f'<U+{ord(mark):04X}>')
    yield (f'{_OPEN}{text}{_CLOSE}', 'mark') if is_other else (text, None)


def _flow(parts, width):
  """Lines of (text, style) of `width` columns, broken at spaces if it can."""
  found: list[list[tuple]] = [[]]
  room = width
  for text, style in parts:
    for word in _WORDS.findall(text):
      bare = word.rstrip(' ')
      if room < escape.columns(bare) <= width:
        found.append([])
        room = width
      if escape.columns(word) > room >= escape.columns(bare) > 0:
        word = bare
      for k, piece in enumerate(escape.pieces(word, width, room)):
        if k:
          found.append([])
          room = width
        found[-1].append((piece, style))
        room -= escape.columns(piece)
  return found
