"""Scores of an answer as text: equal, contained, extracted, alike in words."""

import collections
import re
import string
from typing import Literal

from tuner.data import rows
from tuner.evals.metrics import bounded, declare


@declare.metric('content')
def exact(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the texts are equal, white space at their ends aside."""
  del row
  return float(prediction.strip() == reference.strip())


@declare.metric('content')
def contains(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the reference stands somewhere in the prediction.

  White space at the reference's ends is left out. An empty reference is
  contained in an empty prediction only.
  """
  del row
  wanted = reference.strip()
  if not wanted:
    return float(not prediction.strip())
  return float(wanted in prediction)


@declare.metric('content')
def exact_normalised(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the texts are equal as SQuAD compares them.

  That is without case, punctuation, the words a, an and the, and with white
  space folded (Rajpurkar et al. 2016, official evaluation script).
  """
  del row
  return float(_normalised(prediction) == _normalised(reference))


@declare.metric('content')
def accepted(
  prediction: str, reference: str, row: rows.Row, column: str = 'answers'
) -> float:
  """1 where the prediction is one of the row's answers, as exact_normalised.

  column: of the answers, a list of strings, carried by config.data.carry; the
  reference is one more of them. Raises ValueError where it is not there.
  """
  others = carried(row, column)
  if not isinstance(others, list) or not all(
    isinstance(other, str) for other in others
  ):
    raise ValueError(f'column {column!r}: {others!r:.80}; wanted strings')
  found = _normalised(prediction)
  return float(any(found == _normalised(o) for o in [reference, *others]))


@declare.metric('content')
def regex(
  prediction: str,
  reference: str,
  row: rows.Row,
  pattern: str,
  match: Literal['first', 'last'] = 'first',
) -> float:
  """1 where the pattern finds the same text in both.

  That is its groups where it has some, of the first match or of the last; 0
  where it finds nothing in the prediction, or not within a second of work.
  Raises ValueError for no pattern, and a reference in which it finds nothing.
  """
  del row
  wanted = _extracted(pattern, reference, match)
  if wanted is None:
    raise ValueError(f'{pattern!r} finds nothing in {reference[:80]!r}')
  return float(_extracted(pattern, prediction, match) == wanted)


@declare.metric('format')
def regex_found(
  prediction: str, reference: str, row: rows.Row, pattern: str
) -> float:
  """1 where the pattern finds something in the prediction, whatever it is."""
  del reference, row
  return float(_extracted(pattern, prediction, 'first') is not None)


@declare.metric('content')
def numeric(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where both end in the same number, as GSM8K is scored.

  Cobbe et al. 2021: the number behind the last '####', or else the last number
  of the text. Commas, $ and % are left out; 12 is 12.0. Raises ValueError for a
  reference without a number.
  """
  del row
  wanted = _number(reference)
  if wanted is None:
    raise ValueError(f'the reference has no number: {reference[-80:]!r}')
  return float(_number(prediction) == wanted)


@declare.metric('content')
def token_f1(prediction: str, reference: str, row: rows.Row) -> float:
  """F1 of the words that both have, as SQuAD compares them.

  Words are those of exact_normalised, each as often as it stands (Rajpurkar et
  al. 2016). Where one has none, 1 if the other has none either.
  """
  del row
  found, wanted = (
    _normalised(prediction).split(),
    _normalised(reference).split(),
  )
  if not found or not wanted:
    return float(found == wanted)
  shared = collections.Counter(found) & collections.Counter(wanted)
  return 2 * shared.total() / (len(found) + len(wanted))


@declare.metric('format', bounds=(0.0, float('inf')))
def length_ratio(prediction: str, reference: str, row: rows.Row) -> float:
  """Characters of the prediction over those of the reference; 1 is as long.

  The one metric without an upper bound. Raises ValueError for an empty
  reference.
  """
  del row
  if not reference:
    raise ValueError('the reference is empty')
  return len(prediction) / len(reference)


def carried(row: rows.Row, column: str):
  """The row's value of a carried column. Raises ValueError."""
  if column not in row.carried:
    there = ', '.join(sorted(row.carried)) or 'none'
    raise ValueError(
      f'the row carries no column {column!r}, but {there}; wanted: '
      f'config.data.carry=({column!r},) and a file that has it'
    )
  return row.carried[column]


_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')
# Bounded: of a number of a million digits float() takes long.
_NUMBERS = re.compile(r'-?\d[\d,]{0,400}(?:\.\d{1,400})?|-?\.\d{1,400}')


def _normalised(text: str) -> str:
  plain = text.lower().translate(_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', plain).split())


def _number(text: str) -> float | None:
  _, mark, marked = text.rpartition('####')
  plain = (marked if mark else text).replace('$', '').replace('%', '')
  found = _NUMBERS.findall(plain)
  if not found:
    return None
  # Beside the mark there is one number, before any words.
  return float((found[0] if mark else found[-1]).replace(',', ''))


def _extracted(pattern, text, match) -> list[str | None] | None:
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f'pattern: {pattern!r}: {error}') from None
  found = bounded.groups(pattern, text)
  if not found:
    return None
  whole, *groups = found[0 if match == 'first' else -1]
  return groups or [whole]
