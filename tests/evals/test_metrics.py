"""Metrics: what each counts as right, and that none raises on model text."""

import json
import pathlib
import time

import hypothesis
import pytest
import rouge_score.rouge_scorer
import sacrebleu
from hypothesis import strategies as st

from tuner import named
from tuner.data import rows
from tuner.evals import generative, metrics
from tuner.evals.metrics import bounded, calls, terms

SCHEMA = {'type': 'object', 'properties': {'a': {'type': 'integer'}}}
DATABASE = """
CREATE TABLE t (a INTEGER, b TEXT);
INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'y');
"""
TOOL = {
  'type': 'function',
  'function': {
    'name': 'f',
    'parameters': {
      'type': 'object',
      'properties': {'x': {'type': 'integer'}, 's': {'type': 'string'}},
      'required': ['x'],
    },
  },
}
CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
ROW = rows.Row(
  messages=(
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
  ),
  tools=(TOOL,),
  carried={
    'answers': ['New York City', 'NYC'],
    'schema': SCHEMA,
    'schema_sql': DATABASE,
  },
)
# Every metric of one answer, with a reference that it can score.
REFERENCES = {
  'exact': 'yes',
  'exact_normalised': 'The answer.',
  'contains': 'yes',
  'accepted': 'New York',
  'regex': 'zip 12345',
  'regex_found': 'zip 12345',
  'numeric': 'so 3 + 4 = 7\n#### 7',
  'token_f1': 'the cat sat',
  'length_ratio': 'the cat sat',
  'label': 'card arrival',
  'rouge_1': 'the cat sat down',
  'rouge_2': 'the cat sat down',
  'rouge_l': 'the cat sat down',
  'bleu': 'the cat sat down',
  'chrf': 'the cat sat down',
  'json_valid': '{"a": 1}',
  'json_equal': '{"a": 1}',
  'json_schema': '{"a": 1}',
  'field_f1': '{"a": 1}',
  'function_call': '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>',
  'sql': 'SELECT a, b FROM t',
  'term_recall': 'the myocardial infarction',
}
ARGUMENTS = {name: {'pattern': r'\d{5}'} for name in ('regex', 'regex_found')}
NAMES = ('exact', 'contains', 'json_valid', 'json_equal', 'field_f1')
ALL = generative.find(
  [{'name': name, **ARGUMENTS.get(name, {})} for name in REFERENCES]
)


def score(name, prediction, reference, row=ROW, **own):
  metric = ALL[name]
  if own:
    (metric,) = generative.find([{'name': name, **own}]).values()
  return metric(prediction, reference, row)


def test_every_metric_is_tested():
  public = named._public(metrics, generative.TAKES)
  assert set(public) == set(REFERENCES)
  for name, function in public.items():
    assert 'facts' in vars(function), f'{name} does not say its kind'
    assert function.__doc__


@pytest.mark.parametrize('name', REFERENCES)
def test_a_reference_that_can_be_scored_is_right(name):
  assert score(name, REFERENCES[name], REFERENCES[name]) == pytest.approx(1)
  ALL[name].check(REFERENCES[name], ROW)


HOSTILE = {
  'nothing': '',
  'controls': '\x00\x1b[31m\x7f\u202e\ufeff',
  'surrogates': 'yes \ud800\udfff',
  'deep': '[' * 100_000,
  'deep and closed': '[' * 5000 + ']' * 5000,
  'deep call': 'f(x=' * 3000 + '1' + ')' * 3000,
  'a megabyte': 'a b' * 350_000,
  'a long word': 'a' * 1_000_000,
  'digits': '#### ' + '9' * 1_000_000,
  'backslashes': r'f(s="\d\q")',
  'a tag that never ends': '<tool_call>' * 20_000,
  'a row that never ends': (
    'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) '
    'SELECT count(*) FROM c'
  ),
}


@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('text', HOSTILE.values(), ids=HOSTILE)
def test_no_prediction_raises_or_holds_up(name, text):
  started = time.process_time()
  found = score(name, text, REFERENCES[name])
  assert time.process_time() - started < 5
  assert 0 <= found and (found <= 1 or name == 'length_ratio')


@pytest.mark.parametrize(
  'name', [n for n in REFERENCES if n not in ('sql', 'json_schema')]
)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(text=st.text())
def test_any_text_scores_from_0_to_1(name, text):
  found = score(name, text, REFERENCES[name])
  assert 0 <= found and (found <= 1 or name == 'length_ratio')


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
  for name in NAMES:
    assert score(name, text, text) == 1.0, name


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
    ('exact_normalised', 'an  Answer', 'The answer.', 1),
    ('exact_normalised', 'answers', 'The answer.', 0),
    ('accepted', 'the nyc', 'New York', 1),
    ('accepted', 'new york', 'New York', 1),
    ('accepted', 'York', 'New York', 0),
    ('regex', '54321, no 12345', '12345', 0),
    ('regex', 'it is 12345.', '12345', 1),
    ('regex_found', 'it is 54321.', '12345', 1),
    ('regex_found', 'it is 5432', '12345', 0),
    ('numeric', '1 and 2, so $1,234.50', '#### 1234.5', 1),
    ('numeric', 'x #### 7 eggs of 9', '#### 7', 1),
    ('numeric', '50%', '50', 1),
    ('numeric', '-3', '3', 0),
    ('numeric', '7.', '7', 1),
    ('numeric', 'seven', '7', 0),
    ('token_f1', 'a cat sat', 'the cat sat down', 0.8),
    ('token_f1', 'cat cat', 'cat dog', 0.5),
    ('token_f1', 'the', 'an', 1),
    ('token_f1', 'cat', 'the', 0),
    ('label', ' Card\nArrival', 'card arrival', 1),
    ('label', 'card', 'card arrival', 0),
    ('length_ratio', 'abcd', 'ab', 2),
    ('term_recall', 'infarction, it is', 'the myocardial infarction', 0.5),
    ('term_recall', 'x', 'it is what it is', 1),
    ('json_schema', '{"a": 2}', '{}', 1),
    ('json_schema', '{"a": "2"}', '{}', 0),
    ('json_schema', 'no', '{}', 0),
    (
      'sql',
      'select a, b from t where a > 0 order by b desc',
      'SELECT a, b FROM t',
      1,
    ),
    ('sql', '```sql\nSELECT a, b FROM t;\n```', 'SELECT a, b FROM t', 1),
    ('sql', 'SELECT b FROM t', 'SELECT DISTINCT b FROM t', 0),
    ('sql', 'SELECT a FROM t ORDER BY a', 'SELECT a FROM t ORDER BY a DESC', 0),
    (
      'sql',
      'SELECT a FROM t',
      'SELECT a FROM (SELECT a FROM t ORDER BY a DESC)',
      1,
    ),
    ('sql', 'SELECT 1.0', 'SELECT 1', 1),
    ('sql', 'SELECT a, b FROM t; DELETE FROM t', 'SELECT a, b FROM t', 0),
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
  assert found == pytest.approx(wanted) and type(found) is float


@pytest.mark.parametrize(
  ('metric', 'reference', 'message'),
  [
    ('json_equal', 'Paris', "the reference is no valid JSON: 'Paris'"),
    ('field_f1', '{"a": NaN}', 'the reference is no valid JSON'),
    ('field_f1', '[1]', "the reference is no JSON object: '\\[1\\]'"),
    ('regex', 'none', r"'\\\\d\{5\}' finds nothing in 'none'"),
    ('numeric', 'seven', "the reference has no number: 'seven'"),
    ('rouge_2', 'one', "too few words for rouge2: 'one'"),
    ('bleu', ' ', 'the reference is empty'),
    ('chrf', '', 'the reference is empty'),
    ('length_ratio', '', 'the reference is empty'),
    ('sql', 'SELECT z FROM t', 'the reference does not run: no such column: z'),
    ('sql', 'DROP TABLE t', 'the reference does not run: not authorized'),
    ('function_call', 'f(x=2)', 'the reference is not what is accepted'),
  ],
)
def test_references_that_cannot_be_scored_are_refused(
  metric, reference, message
):
  with pytest.raises(ValueError, match=message):
    score(metric, '{}', reference)


@pytest.mark.parametrize(
  ('own', 'row', 'message'),
  [
    (
      {'name': 'accepted'},
      rows.Row(carried={'b': 1}),
      r"carries no column 'answers', but b; wanted: config.data.carry=\('ans",
    ),
    (
      {'name': 'accepted'},
      rows.Row(carried={'answers': 'x'}),
      'wanted strings',
    ),
    ({'name': 'regex', 'pattern': '('}, ROW, r"pattern: '\(': missing \)"),
    ({'name': 'label', 'labels': ('a', 'b')}, ROW, "'yes' is none of the 2"),
    ({'name': 'json_schema', 'schema': {'type': 'objekt'}}, ROW, 'no JSON Sc'),
    ({'name': 'json_schema', 'schema': 'no JSON'}, ROW, 'no JSON Schema'),
    ({'name': 'json_schema'}, rows.Row(), "config.data.carry=.'schema'"),
    ({'name': 'sql', 'schema': 'ATTACH "x" AS y'}, ROW, 'schema does not run'),
    ({'name': 'sql'}, rows.Row(), "carries no column 'schema_sql', but none"),
  ],
)
def test_what_a_metric_lacks_is_said(own, row, message):
  (metric,) = generative.find([own]).values()
  with pytest.raises(ValueError, match=message):
    metric.check('yes', row)


def test_groups_of_a_pattern_are_what_is_compared():
  own = {'pattern': r'(\d+) (?:apples|eggs)'}
  assert score('regex', '3 eggs', '3 apples', **own) == 1
  last = {**own, 'match': 'last'}
  assert score('regex', '1 eggs, 3 eggs', '3 apples', **last) == 1
  assert score('regex', '1 eggs, 3 eggs', '3 apples', **own) == 0


def test_a_process_that_cannot_run_is_no_score_of_0(monkeypatch):
  monkeypatch.setattr(bounded, '_process', None)
  monkeypatch.setattr(bounded, '_ROOT', 'nowhere')
  monkeypatch.setattr(bounded, '_MAIN', 'import nothing_like_that')
  with pytest.raises(
    RuntimeError, match=r'ended with 1: Trace(.|\n)*nothing_like'
  ):
    score('regex_found', '12345', 'x')


def test_a_pattern_without_end_finds_nothing():
  own = {'pattern': '(a+)+$'}
  assert score('regex', 'a' * 40 + 'b', 'aa', **own) == 0
  assert score('regex', 'aa', 'aa', **own) == 1  # and what follows is scored


@pytest.mark.parametrize(
  'schema',
  [
    {'$ref': '#'},
    {'properties': {'a': {'pattern': '(x+)+$'}}},
    {'$ref': '#/$defs/0', '$defs': {
      str(i): {'allOf': [{'$ref': f'#/$defs/{i + 1}'}] * 2} for i in range(40)
    } | {'40': {'required': ['a']}}},
  ],
)  # fmt: skip
def test_a_schema_without_end_is_fitted_by_nothing(schema):
  text = json.dumps({'a': 'x' * 40 + 'y'})
  assert score('json_schema', text, '{}', schema=schema) == 0


@pytest.mark.parametrize('at', ['http://127.0.0.1:9/x.json', 'file:///etc/x'])
def test_no_schema_is_fetched(at):
  with pytest.raises(ValueError, match='refers to what is not in it'):
    score('json_schema', '{}', '{}', schema={'$ref': at})


TEXTS = [
  ('the cat sat', 'the cat sat on the mat'),
  ('Cats are running quickly', 'a cat runs quick'),
  ('', 'some words here'),
  ('on the mat the cat sat down today', 'the cat sat on the mat today'),
]


@pytest.mark.parametrize(('prediction', 'reference'), TEXTS)
def test_overlap_is_that_of_the_libraries(prediction, reference):
  kinds = {'rouge_1': 'rouge1', 'rouge_2': 'rouge2', 'rouge_l': 'rougeL'}
  scorer = rouge_score.rouge_scorer.RougeScorer(
    list(kinds.values()), use_stemmer=True
  )
  wanted = scorer.score(reference, prediction)
  for name, kind in kinds.items():
    assert score(name, prediction, reference) == wanted[kind].fmeasure
  bleu = sacrebleu.sentence_bleu(prediction, [reference]).score / 100
  assert score('bleu', prediction, reference) == pytest.approx(bleu)
  chrf = sacrebleu.sentence_chrf(prediction, [reference]).score / 100
  assert score('chrf', prediction, reference) == pytest.approx(chrf)


@pytest.mark.parametrize(
  'text',
  [
    '{"name": "f", "arguments": {"x": 1}}',
    '[{"name": "f", "parameters": {"x": 1}}]',
    '{"f": {"x": 1}}',
    '{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}',
    '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    '<tool_call>[{"name": "f", "arguments": {"x": 1}}]</tool_call>',
    '<think>f(x=2)?</think>\n<tool_call>{"f": {"x": 1}}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]',
    '```json\n{"name": "f", "arguments": {"x": 1}}\n```',
    'f(x=1)',
    '[f(x=1)]',
  ],
)
def test_calls_are_read_as_models_write_them(text):
  assert calls.read(text) == [{'name': 'f', 'arguments': {'x': 1}}]
  assert score('function_call', text, REFERENCES['function_call']) == 1


@pytest.mark.parametrize(
  'text', ['f(1)', 'x', '{"f": 1}', 'f(**y)', '[1]', '{}', 'f(x=1); g()', '']
)
def test_what_is_no_call(text):
  assert calls.read(text) == []
  no_call = rows.Row(messages=({'role': 'assistant', 'content': 'No.'},))
  assert score('function_call', text, 'No.', no_call) == 1
  assert score('function_call', 'f(x=1)', 'No.', no_call) == 0


def test_values_of_python_are_not_evaluated():
  text = "a.f(x=-1, y=[True, none, 'q'], z={'k': 2**9**9}, w=g(h=1), v=(1,))"
  assert calls.read(text) == [
    {
      'name': 'a.f',
      'arguments': {
        'x': -1,
        'y': [True, 'none', 'q'],
        'z': {'k': '2 ** 9 ** 9'},
        'w': {'g': {'h': 1}},
        'v': [1],
      },
    }
  ]


BFCL = pathlib.Path(__file__).parent / 'golden' / 'bfcl.jsonl'


def test_calls_are_judged_as_the_leaderboard_judges_them():
  """Verdicts of bfcl-eval 2026.3.23 (Apache-2.0) on right and wrong calls."""
  n, right = 0, 0
  for line in BFCL.read_text().splitlines():
    case = json.loads(line)
    tools = tuple({'type': 'function', 'function': t} for t in case['tools'])
    row = rows.Row(tools=tools, carried={'accepted': case['accepted']})
    answers = case['answers']
    reference = next(json.dumps(a) for a, is_right in answers if is_right)
    for answer, is_right in answers:
      found = score('function_call', json.dumps(answer), reference, row)
      assert found == is_right, (case['id'], answer)
      n, right = n + 1, right + is_right
  assert n > 150 and 0.3 < right / n < 0.7


def test_terms_are_neither_common_nor_everywhere():
  texts = [
    'the myocardial infarction report',
    'a myocardial scan report',
    'an infarction scan report',
    'once seen report',
  ]
  assert terms.found_in(texts) == ['infarction', 'myocardial', 'scan']
  own = {'terms': ('scan',)}
  assert score('term_recall', 'no', 'an infarction scan', **own) == 0
  assert score('term_recall', 'a SCAN', 'an infarction scan', **own) == 1
