"""A benchmark's question becomes messages with tools."""

import importlib.util
import json
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'


def load():
  sys.path.insert(0, str(SCRIPTS))
  try:
    spec = importlib.util.spec_from_file_location(
      'fetch_bfcl', SCRIPTS / 'fetch_bfcl.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
  finally:
    sys.path.remove(str(SCRIPTS))


QUESTION = {
  'id': 'a',
  'question': [[{'role': 'user', 'content': 'Area?'}]],
  'function': [
    {
      'name': 'f',
      'description': 'Area.',
      'parameters': {
        'type': 'dict',
        'properties': {'type': {'type': 'float'}, 'x': {'type': 'tuple'}},
      },
    }
  ],
}


def test_first_accepted_values_and_json_schema_types():
  truth = [{'f': {'x': [[1, 2], 3], 'type': ['', 1.5], 'y': [{'z': ['', 1]}]}}]
  row = load().make_row(QUESTION, truth)
  (tool,) = row['tools']
  assert tool['function']['parameters'] == {
    'type': 'object',
    'properties': {'type': {'type': 'number'}, 'x': {'type': 'array'}},
  }
  (call,) = row['messages'][-1]['tool_calls']
  assert call['function'] == {
    'name': 'f',
    'arguments': {'x': [1, 2], 'y': {}},
  }
  assert row['accepted'] == truth


def test_no_function_fits():
  row = load().make_row(QUESTION, [])
  assert row['messages'][-1] == {
    'role': 'assistant',
    'content': 'None of the functions can answer this.',
  }


def named(i, function, part='simple_python'):
  question = QUESTION | {
    'function': [QUESTION['function'][0] | {'name': function}]
  }
  row = load().make_row(question, [{function: {}}])
  return row | {'id': f'{part}_{i}'}


def test_a_function_is_on_one_side_whatever_its_rows_are(tmp_path):
  module = load()
  names = [f'{a}.{b}{c}_of' for a in 'xy' for b in 'abcdefghij' for c in 'klmn']
  rows = [named(i, name) for i, name in enumerate(names)]
  rows.append(named(0, 'aa', 'live_simple'))
  path = tmp_path / 'bfcl.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  counts = module.write_split(path)
  sides = {
    side: [
      json.loads(line)
      for line in (tmp_path / f'bfcl.{side}.jsonl').read_text().splitlines()
    ]
    for side in ('train', 'dev', 'test')
  }
  for side, chosen in sides.items():
    assert chosen and f'{len(chosen)} {side}' in counts
  together = [row for chosen in sides.values() for row in chosen]
  assert sorted(row['id'] for row in together) == sorted(
    row['id'] for row in rows[:-1]
  )
  # x.ak_of and y.ak_of are one function by its letters after the last dot.
  asked = [
    {row['tools'][0]['function']['name'][2:] for row in chosen}
    for chosen in sides.values()
  ]
  assert sum(map(len, asked)) == len(set.union(*asked))
  assert module.side('Math.GCD') == module.side('g_c_d2')


def test_rows_without_what_is_accepted_are_told_of(tmp_path):
  row = named(0, 'f')
  del row['accepted']
  path = tmp_path / 'bfcl.jsonl'
  path.write_text(json.dumps(row) + '\n')
  with pytest.raises(ValueError, match='remove the file and run again'):
    load().write_split(path)


def test_shares_of_the_sides_are_as_said():
  module = load()
  sides = [module.side(f'{a}{b}') for a in LETTERS for b in LETTERS]
  assert abs(sides.count('test') / len(sides) - 0.25) < 0.06
  assert abs(sides.count('dev') / len(sides) - 0.10) < 0.06


LETTERS = 'abcdefghijklmnopqrstuvwxyz'
