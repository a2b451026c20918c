"""What data and models say, made harmless and visible.

Text that is shown may hold anything: escape sequences that move a terminal's
cursor, controls that reverse the reading order, markup, letters that nobody
sees. Everything of it passes through `visible`, and in HTML through `html`.
"""

import html as html_lib
import unicodedata

# Joiners that Persian, Indic scripts and emoji are written with.
_HARMLESS = '\u200c\u200d'
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp')
NEWLINE = '↵'


def visible(text):
  """`text` on one line; what would act on a terminal or not be seen is named.

  A newline is ↵, a tab ⇥, other ASCII controls their pictures (␛), and every
  other control, direction mark, surrogate or private character <U+202E>.
  """
  text = str(text)
  if text.isascii() and text.isprintable():
    return text
  return ''.join(map(_character, text))


def lines(text):
  """`text` line by line: nothing in it but the ends of lines acts."""
  return '\n'.join(map(visible, str(text).split('\n')))


def _character(c):
  if c == '\n':
    return NEWLINE
  if c == '\t':
    return '⇥'
  if c < ' ':
    return chr(0x2400 + ord(c))
  if c == '\x7f':
    return '␡'
  if unicodedata.category(c) in _HIDDEN and c not in _HARMLESS:
    return f'<U+{ord(c):04X}>'
  return c


def html(text):
  """`visible` text for HTML, in an element or in a quoted attribute."""
  return html_lib.escape(visible(text), quote=True)


def columns(text):
  """How many columns of a terminal `visible` text takes."""
  if text.isascii():
    return len(text)
  return sum(map(_columns, text))


def _columns(c):
  if unicodedata.category(c) in ('Mn', 'Me', 'Cf'):
    return 0
  return 2 if unicodedata.east_asian_width(c) in 'WF' else 1


def cut(text, width):
  """`visible` text in at most `width` columns, ending in … where it is cut."""
  if columns(text) <= width:
    return text
  kept, used = [], 1
  for c in text:
    used += _columns(c)
    if used > width:
      break
    kept.append(c)
  return ''.join(kept) + '…'


def pieces(text, width, room=None):
  """`visible` text in pieces of at most `width` columns, the first of `room`.

  Nothing is lost: joined they are the text. The first piece may be empty.
  """
  room = width if room is None else room
  found: list[str] = []
  start = used = 0
  for i, c in enumerate(text):
    size = _columns(c)
    if used + size > room and (i > start or (not found and room < width)):
      found.append(text[start:i])
      start, used, room = i, 0, width
    used += size
  return [*found, text[start:]]


def wrap(text, width):
  """Lines of `width` columns, broken between words."""
  found, line = [], ''
  for word in text.split(' '):
    for piece in pieces(word, width):
      longer = f'{line} {piece}' if line else piece
      if columns(longer) <= width:
        line = longer
      else:
        found.append(line)
        line = piece
  return [*found, line]
