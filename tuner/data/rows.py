"""Rows of supervised chat data, read from JSON Lines.

A line is one object in one of three forms: {"messages": [...]},
{"prompt", "completion"} or {"input", "output"}. Every form becomes a Row of
messages, so nothing behind this file knows how the data was written. A row is
read or refused, never mended: what is wrong is named as
`file:line: field: what was found; wanted: what is allowed`, and all of it is
collected before anything is raised.
"""

import collections
import dataclasses
import json
import math
import os
import re
import stat

LINE_BYTES = 16 * 2**20  # A longer line is not JSON Lines, or not text.
DIGITS = 400  # Longer numbers are a mistake, and slow to parse.
SHOWN = 20

FORMS = (('messages',), ('prompt', 'completion'), ('input', 'output'))
# Columns that other programs train on. Passing over one that is filled would
# change what is learned without a word.
MEANINGFUL = {
  'messages': ('functions', 'tools', 'weight'),
  'prompt': ('functions', 'history', 'input', 'instruction', 'system', 'tools'),
  'input': ('functions', 'history', 'instruction', 'system', 'tools'),
}
MEANINGFUL_IN_MESSAGE = frozenset(
  'function_call name reasoning reasoning_content thinking tool_call_id '
  'tool_calls train weight'.split()
)
_UNWRITABLE = re.compile('[\0\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class Row:
  """One conversation. It ends with an assistant turn; `where` is file:line.

  `extra` names the columns that were not read.
  """

  messages: tuple[dict, ...]
  where: str
  extra: tuple[str, ...] = ()

  @property
  def prompt(self):
    """The messages before the final assistant turn."""
    return self.messages[:-1]

  @property
  def reference(self):
    """The content of the final assistant turn."""
    return self.messages[-1]['content']


class Refused(ValueError):
  """One fault of one row: `field` and what is wrong with it."""

  def __init__(self, field, text):
    super().__init__(f'{field}: {text}')


class Faults:
  """The faults of one pass; the first 20 are kept, the others counted."""

  def __init__(self):
    self.shown = []
    self.count = 0

  def add(self, where, text):
    self.count += 1
    if len(self.shown) < SHOWN:
      self.shown.append(f'{where}: {text}')

  def raise_any(self, title):
    """Raises one ValueError with everything found, if anything was."""
    if not self.count:
      return
    more = self.count - len(self.shown)
    lines = [f'{title}: {self.count} error{"s" * (self.count > 1)}']
    lines += self.shown + [f'... and {more} more'] * (more > 0)
    raise ValueError('\n'.join(lines))


def read(paths, system=None):
  """The rows of one file or of several, in order.

  `system` is put in front of every row without a system message of its own.
  Raises one ValueError that lists what is wrong in all the files.
  """
  paths = _paths(paths)
  if system is not None:
    try:
      system = {'role': 'system', 'content': _text('system', system)}
    except Refused as error:
      raise ValueError(str(error)) from None
  rows: list[Row] = []
  faults = Faults()
  for path in paths:
    if paths.count(path) > 1:
      faults.add(path, 'file: given twice; wanted: each file once')
      continue
    _read_file(path, system, rows, faults)
  faults.raise_any('cannot train on this data')
  return rows


def extra_columns(rows):
  """Counter of the columns that were there and not read, by name."""
  return collections.Counter(name for row in rows for name in row.extra)


def _paths(paths):
  if isinstance(paths, (str, os.PathLike)):
    paths = [paths]
  paths = [os.path.expanduser(os.fspath(path)) for path in paths]
  if not paths or not all(paths):
    raise ValueError(f'paths: found {paths}; wanted: one JSONL file or more')
  return paths


def _read_file(path, system, rows, faults):
  """Appends the file's rows to `rows` and what is wrong to `faults`."""
  try:
    before = os.stat(path)
    if stat.S_ISDIR(before.st_mode):
      raise Refused('file', 'a directory; wanted: a JSONL file')
    if not stat.S_ISREG(before.st_mode):  # Opening a FIFO would wait for ever.
      raise Refused('file', 'not a regular file; wanted: a JSONL file')
    start = len(rows), faults.count
    with open(path, 'rb') as file:
      _read_lines(path, file, system, rows, faults)
      after = os.fstat(file.fileno())
    if _version(before) != _version(after):
      raise Refused('file', 'changed while it was read; wanted: a file at rest')
    if start == (len(rows), faults.count):
      found = 'only blank lines' if before.st_size else 'empty'
      raise Refused('file', f'{found}; wanted: one JSON object a line')
  except Refused as refused:
    faults.add(path, str(refused))
  except OSError as error:
    reason = error.strerror or str(error)
    faults.add(path, f'file: {reason}; wanted: a JSONL file')


def _version(status):
  return status.st_ino, status.st_size, status.st_mtime_ns


def _read_lines(path, file, system, rows, faults):
  number = 0
  while line := file.readline(LINE_BYTES + 1):
    number += 1
    where = f'{path}:{number}'
    if len(line) > LINE_BYTES and not line.endswith(b'\n'):
      found = f'longer than {LINE_BYTES:,} bytes'
      faults.add(
        where,
        f'line: {found}, nothing after it was read; '
        'wanted: one JSON object a line',
      )
      return
    if number == 1 and line.startswith(b'\x1f\x8b'):
      raise Refused('file', 'compressed by gzip; wanted: plain text')
    if number == 1:
      line = line.removeprefix(b'\xef\xbb\xbf')
    if not line.strip():
      continue
    try:
      rows.append(_row(line, where, system))
    except Refused as refused:
      faults.add(where, str(refused))


def _row(line, where, system):
  record = _record(line)
  form = _form(record)
  extra = set(record).difference(form)
  for name in MEANINGFUL[form[0]]:
    if name in extra and record[name] not in (None, '', [], {}):
      raise Refused(
        name,
        f'found {_kind(record[name])}, which is not read and would change '
        f'what is learned; wanted: {" and ".join(form)} alone',
      )
  if form == ('messages',):
    messages = _conversation(record['messages'], extra)
  else:
    messages = tuple(
      {'role': role, 'content': _text(field, record[field])}
      for role, field in zip(('user', 'assistant'), form, strict=True)
    )
  if system and messages[0]['role'] != 'system':
    messages = (system, *messages)
  return Row(messages, where, tuple(sorted(extra)))


def _record(line):
  """The line's object. Stricter than JSON: no duplicate keys, no NaN."""
  if b'\0' in line:
    raise Refused(
      'line', f'a NUL byte at byte {line.index(0) + 1}; wanted: none'
    )
  try:
    record = json.loads(
      line.decode('utf-8').rstrip('\r\n'),
      object_pairs_hook=_object,
      parse_constant=_constant,
      parse_float=_float,
      parse_int=_int,
    )
  except UnicodeDecodeError as error:
    found = f'0x{line[error.start]:02x} at byte {error.start + 1}'
    raise Refused('line', f'{found} is not UTF-8; wanted: UTF-8') from None
  except json.JSONDecodeError as error:
    reason = error.msg.removesuffix(' at')
    found = f'not JSON ({reason} at column {error.colno})'
    raise Refused('line', f'{found}; wanted: one JSON object a line') from None
  except RecursionError:
    raise Refused('line', 'nested too deep; wanted: a flat object') from None
  if not isinstance(record, dict):
    raise Refused('line', f'found {_kind(record)}; wanted: an object')
  return record


def _object(pairs):
  record = dict(pairs)
  if len(record) < len(pairs):
    counts = collections.Counter(key for key, _ in pairs)
    key, count = counts.most_common(1)[0]
    raise Refused(_show(key), f'there {count} times; wanted: each key once')
  return record


def _constant(text):
  raise Refused('line', f'the number {text}; wanted: finite numbers')


def _float(text):
  if not math.isfinite(value := float(text)):
    raise Refused('line', f'the number {_show(text)}; wanted: finite numbers')
  return value


def _int(text):
  if len(text) > DIGITS:
    raise Refused(
      'line', f'a number of {len(text)} digits; wanted: at most {DIGITS}'
    )
  return int(text)


def _form(record):
  """The one form whose columns are all there."""
  whole = [form for form in FORMS if all(name in record for name in form)]
  if len(whole) == 1:
    return whole[0]
  if len(whole) > 1:
    found = ' and '.join('+'.join(form) for form in whole)
    raise Refused('line', f'found {found}; wanted: one form a row')
  for form in FORMS:
    for name, other in zip(form, form[::-1], strict=True):
      if other in record:
        raise Refused(name, f'missing beside {other}; wanted: a string')
  found = ', '.join(_show(key) for key in sorted(record)[:8]) or 'no columns'
  wanted = 'messages, prompt and completion, or input and output'
  raise Refused('line', f'found {found}; wanted: {wanted}')


def _conversation(messages, extra):
  """The messages, checked; names of keys not read are added to `extra`."""
  if not isinstance(messages, list):
    raise Refused('messages', f'found {_kind(messages)}; wanted: a list')
  if not messages:
    raise Refused('messages', 'empty; wanted: a user and an assistant turn')
  kept = [_message(i, message, extra) for i, message in enumerate(messages)]
  has_system = kept[0]['role'] == 'system'
  for i, message in enumerate(kept[has_system:]):
    wanted = ('user', 'assistant')[i % 2]
    if message['role'] != wanted:
      raise Refused(
        f'messages[{i + has_system}].role',
        f"found '{message['role']}'; wanted: '{wanted}' "
        '(system first, then user and assistant in turn)',
      )
  if kept[-1]['role'] != 'assistant':
    count = sum(message['role'] == 'assistant' for message in kept)
    found = 'no assistant turn' if not count else 'ends with a user turn'
    raise Refused('messages', f'{found}; wanted: an assistant turn at the end')
  return tuple(kept)


def _message(i, message, extra):
  field = f'messages[{i}]'
  if not isinstance(message, dict):
    raise Refused(field, f'found {_kind(message)}; wanted: an object')
  for key in ('role', 'content'):
    if key not in message:
      raise Refused(f'{field}.{key}', 'missing; wanted: a string')
  role = message['role']
  if role in ('tool', 'function'):
    raise Refused(
      f'{field}.role', f"found '{role}', tool turns are not read; {_ROLES}"
    )
  if role not in ('system', 'user', 'assistant'):
    found = _show(role) if isinstance(role, str) else _kind(role)
    raise Refused(f'{field}.role', f'found {found}; {_ROLES}')
  for key, value in message.items():
    if key in ('role', 'content'):
      continue
    if key in MEANINGFUL_IN_MESSAGE and value is not None:
      raise Refused(
        f'{field}.{key}',
        f'found {_kind(value)}, which is not read and would change what is '
        'learned; wanted: role and content alone',
      )
    extra.add(f'messages[].{key}')
  content = _text(f'{field}.content', message['content'])
  return {'role': role, 'content': content}


_ROLES = "wanted: 'system', 'user' or 'assistant'"


def _text(field, value):
  """The string `value`, with something in it that UTF-8 can hold."""
  if not isinstance(value, str):
    raise Refused(field, f'found {_kind(value)}; wanted: a string')
  if not value.strip():
    found = 'only whitespace' if value else 'an empty string'
    raise Refused(field, f'found {found}; wanted: text')
  if bad := _UNWRITABLE.search(value):
    name = 'a NUL character' if bad[0] == '\0' else 'a lone surrogate'
    found = f'{name} (U+{ord(bad[0]):04X}) at character {bad.start() + 1}'
    raise Refused(field, f'found {found}; wanted: text')
  return value


def _kind(value):
  if value is None or isinstance(value, bool):
    return {None: 'null', True: 'true', False: 'false'}[value]
  names: dict[type, str] = {
    str: 'a string',
    list: 'a list',
    dict: 'an object',
  }
  return names.get(type(value), 'a number')


def _show(text):
  """The text in quotes, printable and short."""
  return ascii(text if len(text) <= 40 else text[:37] + '...')
