"""What `check` found, on a terminal. Both pages read the one record below.

record = {
  'config': str, 'model': str, 'seconds': float,
  'errors': {'count', 'shown': ['file:line: field: reason', ...],
             'alike': [[how many, the first of them], ...]},
  'warnings': [str, ...],
  'files': [{'path', 'source': str | None, 'forms': {form: rows}, 'rows',
             'bytes', 'faults': int}, ...],
  'rows': {'train', 'dev', 'test'},
  'sources': {name: {'rows', 'share': of the tokens of an epoch, 'passes':
              how often each row is seen}},
  'loss': {'trained', 'total', 'what': 'assistant turns and their ...'},
  'lengths': {'n', 'p50', 'p95', 'max',
              'histogram': [[low, high, count], ...]}  # both inclusive
  'packing': {'layout': its name, 'rows': of the batches of one epoch,
              'tokens': of each, 'fill': in [0, 1] | None, 'steps_per_epoch',
              'examples_per_step', 'tokens_per_step', 'trained_per_step',
              'total_steps'},
  'thorough': whether rows were compared text by text, 'data': fingerprint,
  'leaks': {'exact', 'normalised', 'near': held-out rows, 'of': None or
            [training, held-out] rows that were compared text by text,
            'shown': [{'kind', 'held': where, 'train': where, 'similarity'}]},
  'conflicts': {'groups', 'rows', 'shown': [[where, ...], ...]},
  'duplicates': {'exact', 'normalised', 'near':
                 {'groups', 'rows', 'shown': [[where, ...], ...],
                  'of': how many rows were compared, if not all}},
  'overlap': {benchmark: {'rows', 'shown': [{'where', 'item', 'shared'}]}},
  'outliers': {
    'longest', 'shortest': [{'where', 'tokens'}, ...],
    'empty', 'refusals', 'repetitive':
      {'count', 'shown': [{'where', 'value', 'why'}, ...]},
    'of': how many answers were read, if not all,
    'languages': {'en': share of a sample, ...},
    'loss': {'lowest', 'highest': [{'where', 'loss'}, ...]}},
  'estimate': {'memory': '3.1 GB a device', 'time': '12 min', ...},
  'examples': [{'where', 'kind', 'tokens':
                [[text, trained 0/1, special 0/1], ...]}, ...],
}

It is plain JSON; `where` is 'file:line'. Any part but config, model, seconds
and examples may be null, and so may each count of leaks and duplicates, each
entry of outliers: that is shown as 'not looked at', never as zero. Of packing
all but 'layout' and 'tokens' may be null and is left out. Nothing in it is
escaped; the pages do that.
"""

from tuner.report import check_parts, escape
from tuner.report import tokens as tokens_lib

MAX_LINES = 40
INDENT = 11  # columns of a part's name
_RESET = '\x1b[0m'
_COLOURS = {
  'bad': '\x1b[1;31m',
  'look': '\x1b[1;33m',
  'good': '\x1b[32m',
  'plain': '\x1b[1m',
  'absent': '\x1b[2m',
  'dim': '\x1b[2m',
  'title': '\x1b[1m',
}
_MARKS = {'bad': '✗', 'look': '!', 'good': '✓', 'plain': ' ', 'absent': '-'}
# Lines, items, and lines of an item, that a part may take of the one screen
# where others need it.
_LEAN = {
  'errors': (1, 1, 3),
  'leaks': (2, 1, 1),
  'conflicts': (1, 1, 1),
  'warnings': (1, 1, 1),
  'trained': (2, 0, 0),
  'lengths': (1, 0, 0),
  'packing': (2, 0, 0),
  'outliers': (2, 0, 0),
}
_AMPLE = {
  'errors': (2, 4, 3),
  'leaks': (2, 3, 1),
  'conflicts': (2, 2, 1),
  'warnings': (2, 3, 2),
}
_EXAMPLE_LINES = 7
# Before each line of an example, which could else pass for one of ours.
_GUTTER = '│ '
_BARS = ' ▁▂▃▄▅▆▇█'


def screen(record, width=80, color=True):
  """The whole check on one screen: at most 40 lines of `width` columns.

  What is wrong comes first. What was looked for and not found shares a line.
  """
  lines = _summary(record, width, color, _AMPLE, (2, 0, 0))
  if len(lines) + 1 + _EXAMPLE_LINES > MAX_LINES:
    lines = _summary(record, width, color, _LEAN, (1, 0, 0))
  if record['examples']:
    most = MAX_LINES - len(lines) - 1
    lines += ['', *_excerpt(record['examples'][0], width, color, most)]
  return '\n'.join(lines) + '\n'


def _summary(record, width, color, rooms, other):
  """The screen without the example; `rooms` by name."""
  paint = _painter(color)
  lines = _head(record, width, paint)
  short: dict[str, list[str]] = {'good': [], 'absent': []}
  for part in check_parts.parts(record):
    if part.state in short and part.name != 'errors':
      short[part.state].append(part.name)
      continue
    if part.brief:
      part = part._replace(items=part.brief)
    lines += _part(part, width, paint, *rooms.get(part.name, other))
    if part.name == 'lengths':
      lines += _histogram(record['lengths'], width)
  for state, said in (
    ('good', 'nothing found'),
    ('absent', check_parts.ABSENT),
  ):
    if names := ', '.join(short[state]):
      part = check_parts.Part('', state, f'{said}: {names}')
      lines += _part(part, width, paint, 1, 0)
  return lines


def detail(record, width=80, color=True):
  """Everything that the record holds, part by part."""
  paint = _painter(color)
  lines = _head(record, width, paint)
  for part in check_parts.parts(record):
    lines += _part(part, width, paint)
    if part.name == 'lengths' and part.state != 'absent':
      lines += _histogram(record['lengths'], width)
      lines += [
        f'{"":{INDENT}}  {low:>7,} to {high:>7,} tokens: {count:,}'
        for low, high, count in record['lengths']['histogram']
      ]
  for row in record['examples']:
    lines += ['', example(row, color, width).rstrip('\n')]
  return '\n'.join(lines) + '\n'


def example(example, color=True, width=80):
  """One row token by token, the trained ones marked; newlines are ↵.

  In colour trained tokens stand on green and special ones are inverse; without
  it what is trained stands between ⟦ and ⟧.
  """
  lines = tokens_lib.layout(example['tokens'], width - len(_GUTTER))
  shown = [*_wrap(_title(example), width), *_rendered(lines, color)]
  return '\n'.join(shown) + '\n'


def _head(record, width, paint):
  names = [record['config'], record['model']]
  title = ' · '.join(escape.visible(name) for name in names if name)
  seconds = f'{record["seconds"]:.1f} s' if record.get('seconds') else ''
  room = width - 7 - len(seconds)
  title = escape.cut(title, room)
  gap = ' ' * (width - 6 - escape.columns(title) - len(seconds))
  head = paint('title', 'check ') + title + gap + paint('dim', seconds)
  return [head, paint('dim', '─' * width)]


def _part(part, width, paint, most=None, items=None, each=None):
  """The lines of a part: `most` of its own, and `each` of `items` items."""
  room = width - INDENT - 2
  shown = part.items[:items]
  line = part.line
  if shown and len(shown) < len(part.items):
    line += f'; the first {len(shown)}:' if len(shown) > 1 else '; the first:'
  said = _wrap(escape.visible(line), room, most)
  name = paint(part.state, f'{_MARKS[part.state]} {part.name:<{INDENT}}')
  lines = [name + paint('dim' if part.state == 'absent' else '', said[0])]
  lines += [' ' * (INDENT + 2) + line for line in said[1:]]
  for item in shown:
    wrapped = _wrap(escape.visible(item), room, each)
    lines += [' ' * (INDENT + 2) + line for line in wrapped]
  return lines


def _histogram(lengths, width):
  """Two lines of bars, and a line with the ends of the axis."""
  bins = lengths['histogram']
  if not bins:
    return []
  wide = max(1, min(3, (width - INDENT - 2) // len(bins)))
  bins = bins[: (width - INDENT - 2) // wide]
  top = max(count for _, _, count in bins) or 1
  # Whatever is there shows, however few.
  heights = [max(count > 0, round(16 * count / top)) for _, _, count in bins]
  indent = ' ' * (INDENT + 2)
  upper = ''.join(_BARS[max(0, height - 8)] * wide for height in heights)
  lower = ''.join(_BARS[min(8, height)] * wide for height in heights)
  low, high = f'{bins[0][0]:,}', f'{bins[-1][1]:,} tokens'
  axis = low + high.rjust(len(bins) * wide - len(low))
  return [*(indent + line.rstrip() for line in (upper, lower)), indent + axis]


def _excerpt(example, width, color, most):
  """A title and `most` lines at most, among them the first trained one."""
  lines = tokens_lib.layout(example['tokens'], width - len(_GUTTER))
  trained = (i for i, line in enumerate(lines) if any(c.trained for c in line))
  first = next(trained, 0)
  start = max(0, min(first - 1, len(lines) - (most - 1)))
  kept = lines[start : start + most - 1]
  title = _title(example)
  if len(kept) < len(lines):
    title += f'; lines {start + 1} to {start + len(kept)} of {len(lines)}'
  return [escape.cut(title, width), *_rendered(kept, color)]


def _rendered(lines, color):
  gutter = _painter(color)('dim', _GUTTER)
  return [gutter + tokens_lib.render(line, color) for line in lines]


def _title(example):
  tokens = example['tokens']
  trained = sum(1 for _, is_trained, _ in tokens if is_trained)
  where = escape.visible(f'{example["where"]} ({example["kind"]})')
  return f'{where}: {trained:,} of {len(tokens):,} tokens trained'


def _painter(color):
  def paint(style, text):
    return f'{_COLOURS[style]}{text}{_RESET}' if color and style else text

  return paint


def _wrap(text, width, most=None):
  """Lines of `width` columns, broken between words; `most` of them, cut."""
  lines = escape.wrap(text, width)
  if most is not None and len(lines) > most:
    rest = ' '.join(lines[most - 1 :])
    lines = [*lines[: most - 1], escape.cut(rest, width)]
  return lines
