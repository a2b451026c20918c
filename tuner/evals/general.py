"""What general ability is measured on: texts, prompts, a quiz.

Each comes from the user's file, from the cache that scripts/fetch_retention.py
fills, or, of prompts, from the few that are packaged. What is taken of them is
a prefix that holds as many of one kind as of another, so that less is a fair
sample of more.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuner import dataset, sections
from tuner.data import files, messages, records, template
from tuner.data import rows as rows_lib

PACKAGED = pathlib.Path(__file__).with_name('neutral.jsonl')
FETCH = 'run scripts/fetch_retention.py'
TEXT_TOKENS = 256  # of a text, at most: n matters more than length
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Text:
  """ids: of the text, from its first TEXT_TOKENS; is_cut: there were more."""

  ids: tuple[int, ...]
  kind: str
  is_cut: bool


@dataclasses.dataclass(frozen=True)
class Prompt:
  """ids that generation starts from; where: file:line."""

  ids: tuple[int, ...]
  where: str


@dataclasses.dataclass(frozen=True)
class Material:
  """All that there is to measure on.

  missing: a line for each part that is not there, and what to do about it.
  """

  texts: list[Text]
  prompts: list[Prompt]
  quiz: list[Record]
  missing: list[str]


def load(
  config: sections.Retention, tokenizer: Any, positions: int
) -> Material:
  """The material for a model of so many positions.

  Raises ValueError with all that is wrong with the rows, by file:line, and for
  a file that the config names and that is not there.
  """
  faults, missing = rows_lib.Faults(), []

  def rows(name, made, fallback=None):
    given = getattr(config, name)
    path = pathlib.Path(given).expanduser() if given else _fetched(name)
    if not given and not path.is_file():
      if fallback is None:
        what = {'texts': 'general text'}.get(name, name)
        missing.append(
          f'{what} not measured: {FETCH} or set config.retention.{name}'
        )
        return []
      path = fallback
    return list(_read(path, made, faults))

  encode = encoder(tokenizer)
  limit = min(TEXT_TOKENS, positions)
  found = Material(
    _evenly(rows('texts', lambda row, _: _text(row, encode, limit)), _kind),
    [
      prompt
      for prompt, _ in _evenly(
        rows('prompts', lambda row, at: _prompt(row, at, tokenizer), PACKAGED),
        lambda made: made[1],
      )
    ],
    rows('quiz', lambda row, _: _question(row)),
    missing,
  )
  faults.raise_any('cannot measure general ability on this')
  return found


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
  """text -> ids, with the tokens that the tokenizer begins a text with."""
  backend = template.backend(tokenizer)
  return lambda text: backend.encode(text, add_special_tokens=True).ids


def _fetched(name: str) -> pathlib.Path:
  return dataset.cache_dir() / 'retention' / f'{name}.jsonl'


def _read(path: pathlib.Path, made: Callable, faults: rows_lib.Faults):
  """made(record, place) of every row; what it refuses goes to the faults."""
  line = column = 0
  try:
    for line, column, payload in files.items(str(path)):
      try:
        record = records.parse(payload)
        yield made(record, rows_lib.place(str(path), line, column))
      except rows_lib.Refused as refused:
        faults.add(rows_lib.place(str(path), line, column), str(refused))
  except rows_lib.Refused as refused:  # Of the file, whatever its rows are.
    faults.add(rows_lib.place(str(path), refused.line), str(refused))


def _text(record: Record, encode, limit: int) -> Text:
  ids = encode(_string(record, 'text'))
  if len(ids) < 2:
    raise rows_lib.Refused(
      'text', f'{len(ids)} token; wanted: two or more, as the first is given'
    )
  return Text(tuple(ids[:limit]), _named_kind(record), len(ids) > limit)


def _prompt(record: Record, where: str, tokenizer) -> tuple[Prompt, str]:
  turn = {'role': 'user', 'content': _string(record, 'prompt')}
  row = rows_lib.Row(messages=(turn,), where=where, n_prompt=1)
  ids = template.prompt_ids(row, tokenizer)
  return Prompt(tuple(ids), where), _named_kind(record)


def _question(record: Record) -> Record:
  question = _string(record, 'question')
  choices, answer = (_field(record, name) for name in ('choices', 'answer'))
  if not isinstance(choices, list) or len(choices) < 2:
    raise rows_lib.Refused(
      'choices', f'found {choices!r}; wanted: a list of two texts or more'
    )
  for i, choice in enumerate(choices):
    messages.text(choice, f'choices[{i}]')
  if type(answer) is not int or not 0 <= answer < len(choices):
    raise rows_lib.Refused(
      'answer',
      f'found {answer!r}; wanted: the index of the right choice, 0 to '
      f'{len(choices) - 1}',
    )
  return {'question': question, 'choices': choices, 'answer': answer}


def _field(record: Record, name: str) -> Any:
  if name not in record:
    there = ', '.join(map(records.show, record)) or 'nothing'
    raise rows_lib.Refused(name, f'not there, beside {there}')
  return record[name]


def _string(record: Record, name: str) -> str:
  return messages.text(_field(record, name), name)


def _named_kind(record: Record) -> str:
  return messages.text(record['kind'], 'kind') if 'kind' in record else ''


def _kind(text: Text) -> str:
  return text.kind


def _evenly(rows: Sequence[Any], kind_of: Callable[[Any], str]) -> list[Any]:
  """The rows with the first of each kind first, then the second of each."""
  seen: Mapping[str, Any] = collections.Counter()
  turns = []
  for row in rows:
    turns.append(seen[kind_of(row)])
    seen[kind_of(row)] += 1  # type: ignore[index]
  order = sorted(range(len(rows)), key=turns.__getitem__)
  return [rows[i] for i in order]
