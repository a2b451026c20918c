"""Fetches function-calling rows out of a Python package.

`python scripts/fetch_bfcl.py [--cache=DIR]` leaves bfcl.jsonl in the cache
(~/.cache/tuner, or $TUNER_CACHE): the simple, live-simple and irrelevance
questions of the Berkeley Function Calling Leaderboard v4, out of the wheel of
bfcl-eval (Apache-2.0), as messages with tools.

The benchmark accepts several values for an argument: column `accepted` has them
all, for the metric function_call. The answer here takes the first, and leaves
out arguments whose first is "", which stands for omitted.
Types of parameters are spelled as JSON Schema spells them ('dict' is 'object').
To an irrelevance question no function fits, and the answer says so.

Beside it stand bfcl.train.jsonl, bfcl.dev.jsonl and bfcl.test.jsonl: the 400
questions of simple_python, split by the name of their function (its letters
after the last dot), so that no function asked for in one file is asked for in
another.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import sys
import zipfile

import fetch_quickstart as fetch

WHEEL = fetch.Archive(
  'bfcl-eval==2026.3.23',
  'bfcl_eval-2026.3.23-py3-none-any.whl',
  '3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a',
)
SIDES = {'test': 0.25, 'dev': 0.10, 'train': 0.65}  # of the functions
PARTS = ('simple_python', 'live_simple', 'irrelevance')
NO_CALL = 'None of the functions can answer this.'
TYPES = {
  'dict': 'object',
  'float': 'number',
  'tuple': 'array',
  'any': 'string',
}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
  parser.add_argument('--cache', default=default, help='default: %(default)s')
  cache = pathlib.Path(parser.parse_args(argv).cache).expanduser().resolve()
  product = fetch.Product('bfcl.jsonl', WHEEL, make_rows)
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with fetch.locked(cache):
      fetch.ensure(cache, product)
      counts = write_split(cache / product.name)
  except (ValueError, RuntimeError, OSError) as e:
    sys.exit(f'fetch_bfcl: {e}')
  print(f'data   {cache / product.name}')
  print(f'split  {cache}/bfcl.SIDE.jsonl: {counts}')


def make_rows(wheel, out):
  """Writes one JSON object a line: {"messages", "tools", "id", "accepted"}."""
  counts = dict.fromkeys(PARTS, 0)
  with zipfile.ZipFile(wheel) as z, open(out, 'w', encoding='utf-8') as file:
    for part in PARTS:
      name = f'BFCL_v4_{part}.json'
      questions = read_lines(z, f'bfcl_eval/data/{name}')
      answers = {}
      if part != 'irrelevance':
        path = f'bfcl_eval/data/possible_answer/{name}'
        answers = {a['id']: a['ground_truth'] for a in read_lines(z, path)}
      for question in questions:
        row = make_row(question, answers.get(question['id'], []))
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
        counts[part] += 1
  return ', '.join(f'{n} {part}' for part, n in counts.items())


def write_split(path):
  """Writes the simple_python rows of `path` beside it, a file for each side."""
  lines = {side: [] for side in SIDES}
  for line in path.read_text(encoding='utf-8').split('\n')[:-1]:
    row = json.loads(line)
    if 'accepted' not in row:
      raise ValueError(
        f'{path}: rows without "accepted", of an earlier version of this '
        'script; remove the file and run again'
      )
    if row['id'].startswith('simple_python_'):
      lines[side(row['tools'][0]['function']['name'])].append(line + '\n')
  for name, chosen in lines.items():
    part = path.with_name(f'bfcl.{name}.jsonl.part')
    part.write_text(''.join(chosen), encoding='utf-8')
    part.rename(path.with_name(f'bfcl.{name}.jsonl'))
  return ', '.join(f'{len(chosen)} {name}' for name, chosen in lines.items())


def side(function):
  """The side of a function's questions, by a hash of its name's letters."""
  letters = re.sub('[^a-z]', '', function.rpartition('.')[2].lower())
  place = int.from_bytes(hashlib.sha256(letters.encode()).digest()[:4]) / 2**32
  for name, fraction in SIDES.items():
    if place < fraction:
      return name
    place -= fraction
  return name


def read_lines(archive, name):
  return [json.loads(line) for line in archive.read(name).splitlines()]


def make_row(question, truth):
  """A question with its functions, answered by the calls of `truth`."""
  (turns,) = question['question']
  calls = [
    {'type': 'function', 'function': {'name': name, 'arguments': chosen(given)}}
    for call in truth
    for name, given in call.items()
  ]
  answer = {'role': 'assistant', 'content': '' if calls else NO_CALL}
  if calls:
    answer['tool_calls'] = calls
  tools = [
    {'type': 'function', 'function': schema(function)}
    for function in question['function']
  ]
  return {
    'messages': [*turns, answer],
    'tools': tools,
    'id': question['id'],
    'accepted': truth,
  }


def chosen(accepted):
  """{argument: the first accepted value}, without those to be omitted."""
  values = {key: first(value) for key, value in accepted.items()}
  return {key: value for key, value in values.items() if value != ''}


def first(accepted):
  """The first of the accepted values, also inside of an object."""
  value = accepted[0] if isinstance(accepted, list) and accepted else accepted
  return chosen(value) if isinstance(value, dict) else value


def schema(value):
  """A function's description with JSON Schema's names of types."""
  if isinstance(value, dict):
    return {
      key: TYPES.get(inner, inner) if key == 'type' and isinstance(inner, str)
      else schema(inner)
      for key, inner in value.items()
    }  # fmt: skip
  return [schema(v) for v in value] if isinstance(value, list) else value


if __name__ == '__main__':
  main()
