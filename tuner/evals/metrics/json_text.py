"""Scores of an answer that is to be JSON."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from tuner.data import rows
from tuner.evals.metrics import bounded, declare


@declare.metric('format')
def json_valid(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the prediction is one JSON value (RFC 8259) and nothing else.

  Not valid: NaN, Infinity, a number too large for a double, text before or
  after. A key twice in an object is valid, as every common parser takes it;
  `json_equal` and `field_f1` score it 0. The reference is not looked at.
  """
  del reference, row
  return float(_parsed(prediction, dict) is not _INVALID)


@declare.metric('content')
def json_equal(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where both are the same JSON value, the order of keys aside.

  Numbers are equal by value (1 is 1.0), and never equal to true or false.

  Raises:
    ValueError: the reference is not valid JSON.
  """
  del row
  return float(_parsed(prediction) == _wanted(reference))


@declare.metric('content')
def field_f1(prediction: str, reference: str, row: rows.Row) -> float:
  """F1 of the prediction's fields: 2 shared / (predicted + wanted).

  A field is a key and its whole value, as `json_equal` compares them. 0 where
  the prediction is no JSON object; 1 where both objects are empty.

  Raises:
    ValueError: the reference is not a valid JSON object.
  """
  del row
  wanted = _wanted(reference)
  if not isinstance(wanted, dict):
    raise ValueError(f'the reference is no JSON object: {reference[:80]!r}')
  found = _parsed(prediction)
  if not isinstance(found, dict):
    return 0.0
  if not found and not wanted:
    return 1.0
  shared = sum(key in found and found[key] == wanted[key] for key in wanted)
  return 2 * shared / (len(found) + len(wanted))


@declare.metric('format', needs=('jsonschema',))
def json_schema(
  prediction: str,
  reference: str,
  row: rows.Row,
  schema: str | Mapping | None = None,
) -> float:
  """1 where the prediction is JSON that fits a JSON Schema, draft 4 to 2020-12.

  schema: as an object or as JSON; None: that of the row, in the carried column
  'schema'. What it refers to elsewhere is not fetched; 0, too, where it takes
  more than a second of work. Raises ValueError for what is no schema.
  """
  del reference
  if schema is None:
    if 'schema' not in row.carried:
      raise ValueError(
        'no schema: wanted the argument `schema`, or config.data.carry='
        "('schema',) and a file that has this column"
      )
    schema = row.carried['schema']
  text = schema if isinstance(schema, str) else json.dumps(schema)
  # An empty object says whether the schema is one, whatever was predicted.
  bounded.is_valid(text, '{}')
  if _parsed(prediction, dict) is _INVALID:
    return 0.0
  try:
    return float(bool(bounded.is_valid(text, prediction)))
  except ValueError:  # A reference in the schema that `{}` did not come to.
    return 0.0


_INVALID = object()


def _wanted(reference: str) -> Any:
  value = _parsed(reference)
  if value is _INVALID:
    raise ValueError(f'the reference is no valid JSON: {reference[:80]!r}')
  return value


def _parsed(text: str, pairs: Callable | None = None) -> Any:
  """The JSON value, in a form in which == is equality of JSON values.

  pairs: makes an object of its pairs; by default a key twice is invalid.
  """
  try:
    return _comparable(
      json.loads(
        text,
        object_pairs_hook=pairs or _unique,
        parse_constant=_refuse,
        parse_float=_finite,
      )
    )
  except (ValueError, RecursionError):  # deep nesting, of a model that loops
    return _INVALID


def _comparable(value: Any) -> Any:
  if isinstance(value, bool):
    return (value,)  # equal to no number, and JSON has no tuples
  if isinstance(value, list):
    return [_comparable(v) for v in value]
  if isinstance(value, dict):
    return {k: _comparable(v) for k, v in value.items()}
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    raise ValueError('a key twice')
  return made


def _finite(number: str) -> float:
  value = float(number)
  if not math.isfinite(value):
    raise ValueError('too large for a double')
  return value


def _refuse(name: str) -> Any:
  raise ValueError(f'{name} is not JSON')
