"""SQL, judged by what it returns from a database that the row describes."""

import functools
from collections.abc import Iterable

from tuner.data import rows
from tuner.evals.metrics import bounded, declare
from tuner.evals.metrics import text as text_lib


@declare.metric('content')
def sql(
  prediction: str,
  reference: str,
  row: rows.Row,
  schema: str | None = None,
  column: str = 'schema_sql',
) -> float:
  """1 where both queries return the same rows from the row's own database.

  Execution accuracy (Zhong et al. 2017), on SQLite. Rows are compared as a
  multiset, and in order where the reference has an ORDER BY of its own, outside
  of parentheses; names of columns do not count, 1 is 1.0.

  schema: statements that make and fill the database; None: those in the carried
  `column`. Raises ValueError where these or the reference do not run.
  """
  if schema is None:
    schema = text_lib.carried(row, column)
  if not isinstance(schema, str):
    raise ValueError(f'schema: {schema!r:.80}; wanted statements of SQL')
  _check(schema, reference)
  ordered = _is_ordered(reference)
  return float(
    bounded.is_same_result(schema, reference, _bare(prediction), ordered)
  )


@functools.lru_cache(maxsize=256)
def _check(schema: str, reference: str) -> None:
  """Raises ValueError where they do not run."""
  if not bounded.is_same_result(schema, reference, reference, False):
    raise ValueError(f'the reference takes too long: {reference[:80]!r}')


def _bare(query: str) -> str:
  """The query without the fence of Markdown that models put around it."""
  text = query.strip()
  if text.startswith('```') and text.endswith('```') and len(text) > 6:
    text = text[3:-3].removeprefix('sql').removeprefix('sqlite').strip()
  return text


def _is_ordered(query: str) -> bool:
  """Whether ORDER BY stands outside of parentheses and strings."""
  words = list(_outer_words(query))
  return any(pair == ('order', 'by') for pair in zip(words, words[1:]))


def _outer_words(query: str) -> Iterable[str]:
  depth, word, quote = 0, '', ''
  for letter in query + ' ':
    if quote:
      quote = '' if letter == quote else quote
      continue
    if letter.isalnum() or letter == '_':
      word += letter
      continue
    if word and not depth:
      yield word.lower()
    word = ''
    quote = letter if letter in '\'"`' else ''
    depth += {'(': 1, ')': -1}.get(letter, 0)
