"""Metrics: what each counts as right, and that none raises on model text."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from tuner.data import rows
from tuner.evals import generative

ROW = rows.Row()
NAMES = ('exact', 'contains', 'json_valid', 'json_equal', 'field_f1')
ALL = generative.find(NAMES)


def score(name, prediction, reference):
  return ALL[name](prediction, reference, ROW)


JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=10,
)


@hypothesis.given(st.dictionaries(st.text(), JSON))
def test_a_reference_scores_one_against_itself(value):
  text = json.dumps(value)
  for name in ALL:
    assert score(name, text, text) == 1.0, name


@hypothesis.given(st.text())
def test_any_prediction_scores_from_0_to_1(text):
  for name in ALL:
    assert 0.0 <= score(name, text, '{"a": 1}') <= 1.0, name


@hypothesis.given(JSON, JSON)
def test_json_equal_is_equality_of_what_is_written(a, b):
  """Python's sorted, compact writing tells 1 from true, too."""
  write = lambda v: json.dumps(v, sort_keys=True).replace('.0', '')
  same = write(a) == write(b)
  if same:
    assert score('json_equal', json.dumps(a), json.dumps(b)) == 1.0
  elif score('json_equal', json.dumps(a), json.dumps(b)):
    assert a == b


@pytest.mark.parametrize(
  ('metric', 'prediction', 'reference', 'wanted'),
  [
    ('exact', ' yes\n', 'yes', 1),
    ('exact', 'Yes', 'yes', 0),
    ('exact', 'yes.', 'yes', 0),
    ('contains', 'so: Paris.', ' Paris ', 1),
    ('contains', 'paris', 'Paris', 0),
    ('contains', 'anything', '', 0),
    ('contains', ' ', '', 1),
    ('json_valid', ' {"a": [1, null]}\n', '', 1),
    ('json_valid', '"text"', '', 1),
    ('json_valid', '', '', 0),
    ('json_valid', '{"a": 1} and', '', 0),
    ('json_valid', '```json\n{}\n```', '', 0),
    ('json_valid', "{'a': 1}", '', 0),
    ('json_valid', '{"a": 1,}', '', 0),
    ('json_valid', '{"a": 1, "a": 1}', '', 1),
    ('json_valid', '[{"b": {"a": 1, "a": 2}}]', '', 1),
    ('json_valid', 'NaN', '', 0),
    ('json_valid', '[-Infinity]', '', 0),
    ('json_valid', '1e999', '', 0),
    ('json_valid', '9' * 5000, '', 0),
    ('json_valid', '[' * 100_000, '', 0),
    ('json_valid', '[' * 100_000 + ']' * 100_000, '', 0),
    ('json_valid', '\u00a0{}', '', 0),
    ('json_equal', '{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1),
    ('json_equal', '{"a": {"c": 1, "b": 2}}', '{"a": {"b": 2, "c": 1}}', 1),
    ('json_equal', '[1, 2]', '[2, 1]', 0),
    ('json_equal', '{"a": 1}', '{"a": 1.0}', 1),
    ('json_equal', '{"a": 1}', '{"a": true}', 0),
    ('json_equal', '{"a": [0]}', '{"a": [false]}', 0),
    ('json_equal', '{"a": "1"}', '{"a": 1}', 0),
    ('json_equal', '{"a": 1, "b": 2}', '{"a": 1}', 0),
    ('json_equal', 'no', '{"a": 1}', 0),
    ('json_equal', 'null', 'null', 1),
    ('field_f1', '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1),
    ('field_f1', '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
    ('field_f1', '{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 0.5),
    ('field_f1', '{"a": true}', '{"a": 1}', 0),
    ('field_f1', '{"x": 1}', '{"a": 1}', 0),
    ('field_f1', '[1]', '{"a": 1}', 0),
    ('field_f1', '{"a": 1', '{"a": 1}', 0),
    ('field_f1', '{"a": 1, "a": 1}', '{"a": 1}', 0),
    ('field_f1', '{}', '{}', 1),
    ('field_f1', '{}', '{"a": 1}', 0),
  ],
)
def test_examples(metric, prediction, reference, wanted):
  found = score(metric, prediction, reference)
  assert found == wanted and type(found) is float


@pytest.mark.parametrize(
  ('metric', 'reference', 'message'),
  [
    ('json_equal', 'Paris', "the reference is no valid JSON: 'Paris'"),
    ('field_f1', '{"a": NaN}', 'the reference is no valid JSON'),
    ('field_f1', '[1]', "the reference is no JSON object: '\\[1\\]'"),
  ],
)
def test_references_that_cannot_be_scored_are_refused(
  metric, reference, message
):
  with pytest.raises(ValueError, match=message):
    score(metric, '{}', reference)
