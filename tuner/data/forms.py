"""A record in any of the forms that people write -> a Row.

Forms are recognised by their columns, record by record, so one file may mix
them. A column that other programs train on and the form does not read is
refused when it is filled; all others are named in `Row.extra`.
"""

import typing

from tuner import named
from tuner.data import builders, judged, records, shapes
from tuner.data import rows as rows_lib

Refused = rows_lib.Refused
FORMS = shapes.FORMS
# What may stand before a pair, a label or an answer.
_BASES = ('prompt', 'conversations', 'messages', 'instruction')
_COMMON = frozenset(('system', 'tools', 'functions', 'weight'))
_MEDIA = frozenset('audio audios image images video videos'.split())
# Columns that other programs train on. Passing over one that is filled would
# change what is learned without a word. Of 'text': the names of what is
# mostly to be learned, so that a table of texts and labels is not taken for
# plain text (naming the form says that it is).
_INPUTS = frozenset(('history', 'input', 'instruction'))
_MEANINGFUL = {
  'prompt': _INPUTS,
  'input': _INPUTS,
  'ideal': _INPUTS,
  'question': _INPUTS | {'choices', 'context', 'options'},
  'reward': _INPUTS | {'context'},
  'preference': _INPUTS,
  'label': _INPUTS,
  'text': _INPUTS | (_COMMON - {'weight'}),
}
_TARGETS = frozenset(
  'answer category class completion label output prompt question response '
  'summary target'.split()
)
COLUMNS = frozenset(
  (
    *(
      name for names in (shapes.STRONG | shapes.WEAK).values() for name in names
    ),
    *(name for names in shapes.PAIRS for name in names),
    *(*shapes.ANSWERS, *shapes.LABELS, *_BASES, *_COMMON, 'history'),
  )
)
# What a column of a file cannot be called without meaning something.
RESERVED = COLUMNS.union(_MEDIA, _TARGETS, *_MEANINGFUL.values())


class Plan(typing.NamedTuple):
  """How records with the same columns are read."""

  form: str
  build: typing.Callable
  extra: tuple[str, ...]  # columns that are not read
  watched: tuple[str, ...]  # those of them that must be empty
  columns: tuple[str, ...]  # that made the form


def reader(form=None, columns=None, keep=False):
  """read(record, where) -> (Row, name of the form it is in).

  form: one of FORMS, instead of recognising it. columns: our name -> that of
  the file, {'prompt': 'text'}. keep: columns that are not read go into
  `Row.carried`, and so do whole lists of which a key was not read, under
  'source_<name>'; or the names of the file's columns that go there, read or
  not, which then are no `extra`. Raises ValueError; read() raises Refused.
  """
  _check_arguments(form, columns)
  wanted = () if isinstance(keep, bool) else tuple(keep)
  names = dict(columns or {})
  plans: dict[tuple, Plan] = {}

  def read(record, where):
    carried = {name: record[name] for name in wanted if name in record}
    if names:
      record = _renamed(record, names)
    key = tuple(record)
    plan = plans.get(key)
    if plan is None:
      plan = make_plan(record, form, names)
      if not shapes.depends_on_values(record) and len(plans) < 10_000:
        plans[key] = plan
    for name in plan.watched:
      if record[name] not in (None, '', [], {}):
        raise _meaningful(plan, name, record[name])
    inner: set[str] = set()
    fields = plan.build(record, names, inner)
    extra = plan.extra
    if inner:
      extra = tuple(sorted({*extra, *inner}))
    if keep is True:
      carried = _carried(record, plan.extra, inner)
    elif carried:
      for name, value in carried.items():
        records.check_writable(value, name)
      extra = tuple(name for name in extra if name not in carried)
    fields['carried'] = carried
    return rows_lib.Row(where=where, extra=extra, **fields), plan.form

  return read


def _check_arguments(form, columns):
  if form is not None and form not in shapes.FORMS:
    hint = named.nearest(str(form), shapes.FORMS) or '.'
    raise ValueError(
      f'form: {form!r} is none{hint} Forms: {", ".join(shapes.FORMS)}'
    )
  for name, own in (columns or {}).items():
    if name not in COLUMNS:
      hint = named.nearest(str(name), COLUMNS) or '.'
      raise ValueError(
        f'columns: {name!r} is no column of a form{hint} Columns: '
        f'{", ".join(sorted(COLUMNS))}'
      )
    if not isinstance(own, str) or not own:
      raise ValueError(f'columns.{name}: {own!r}, wanted a column of the file')


def _renamed(record, names):
  """The record under our names; what stood there is moved out of the way."""
  taken = set(names.values())
  renamed = {ours: record[own] for ours, own in names.items() if own in record}
  for name, value in record.items():
    if name not in taken:
      renamed[free_name(name, renamed) if name in names else name] = value
  return renamed


def free_name(name, record):
  """'source_<name>', or more of that, which `record` has not."""
  while (name := f'source_{name}') in record:
    pass
  return name


def _carried(record, columns, inner):
  carried = {name: record[name] for name in columns}
  for path in sorted(inner):
    name = path.split('[')[0].split('.')[0]
    if name in record:
      carried.setdefault(f'source_{name}', record[name])
  return carried


def _meaningful(plan, name, value):
  if name in _MEDIA:
    return Refused(
      name,
      f'found {records.kind(value)}, but images, audio and video are not read; '
      'wanted: rows of text',
    )
  found = f'found {records.kind(value)}, which is not read and would change '
  text = f'{found}what is learned; wanted: {" and ".join(plan.columns)} alone'
  if plan.form == 'text' and name in _TARGETS:
    text += f" (or columns={{'prompt': 'text', 'completion': '{name}'}})"
  return Refused(name, text)


def make_plan(record, form, names):
  """The Plan for a record's columns. Raises Refused if they are no form."""
  records.parse(record)  # what the file's reader found wrong
  forced = form is not None
  form = form or shapes.recognise(record, names)
  build, read = _variant(form, record, names)
  extra = tuple(sorted(set(record).difference(read)))
  watched = _MEDIA | _MEANINGFUL.get(form, frozenset(('history',)))
  if form == 'text' and not forced:
    watched |= _TARGETS
  columns = tuple(
    names.get(name, name)
    for name in record
    if name in read and name not in _COMMON
  )
  return Plan(
    form, build, extra, tuple(n for n in extra if n in watched), columns
  )


def _variant(form, record, names):
  """(build, the columns that it reads) of a form for these columns."""
  simple = shapes.STRONG | shapes.WEAK
  if form in simple:
    need = simple[form]
    read = {*need, *_COMMON}
    if form == 'alpaca':
      read |= {'input', 'history'}
    if form == 'text':
      read = {'text', 'weight'}
    _require(record, need, form, names)
    return getattr(builders, form), read
  if form == 'preference':
    return _preference(record, names)
  if form == 'label':
    return _label(record, names)
  answer = shapes.answer(record)
  _require(record, [answer or 'answer'], form, names)
  base = _base(record, ('prompt', 'conversations', 'messages'), form, names)
  return judged.Reward(base, answer), {base, answer, *_COMMON}


def _preference(record, names):
  pair = next(
    (p for p in shapes.PAIRS if shapes.has(record, p)), shapes.PAIRS[0]
  )
  _require(record, pair, 'preference', names)
  if pair[0] == 'preferred_output':
    _require(record, ['input'], 'preference', names)
    return judged.Preference(pair, 'input'), {'input', *pair, *_COMMON}
  base = next((name for name in _BASES if name in record), None)
  read = {base, *pair, *_COMMON} - {None}
  if base == 'instruction':
    read |= {'input', 'history'}
  return judged.Preference(pair, base), read


def _label(record, names):
  label = next((name for name in shapes.LABELS if name in record), 'label')
  _require(record, [label], 'label', names)
  whole = [n for n, need in shapes.STRONG.items() if n != 'input' and
           shapes.has(record, need)]  # fmt: skip
  if not whole:
    _require(record, ('prompt', 'completion'), 'label', names)
  read = {*shapes.STRONG[whole[0]], label, *_COMMON}
  if whole[0] == 'alpaca':
    read |= {'input', 'history'}
  return judged.Label(whole[0], label), read


def _base(record, choices, form, names):
  base = next((name for name in choices if name in record), None)
  if base is None:
    _require(record, choices[:1], form, names)
  return base


def _require(record, need, form, names):
  for name in need:
    if name not in record:
      own = names.get(name, name)
      raise Refused(own, f"missing; wanted: this column in the form '{form}'")
