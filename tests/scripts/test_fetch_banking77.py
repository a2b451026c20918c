"""BANKING77's files are evenly split, and hold no test row in training."""

import csv
import hashlib
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import fetch_banking77  # noqa: E402

TRAIN = [(f'{intent} {i}', intent) for intent in 'abc' for i in range(12)]
# A comma, quotes, a line break and a separator that str.splitlines cuts at.
TEST = [('a, "b"\nc\u2028d', 'a'), ('A   3', 'a'), ('x', 'b')]


def as_csv(path, rows):
  with open(path, 'w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows([('text', 'category'), *rows])


@pytest.fixture
def source(tmp_path, monkeypatch):
  folder = tmp_path / 'source'
  folder.mkdir()
  found = {}
  for name, rows in (('train.csv', TRAIN), ('test.csv', TEST)):
    as_csv(folder / name, rows)
    data = (folder / name).read_bytes()
    found[name] = hashlib.sha256(data).hexdigest()
  monkeypatch.setattr(fetch_banking77, 'SHA256', found)
  return folder


def made(cache, side):
  path = cache / 'banking77' / f'{side}.csv'
  return fetch_banking77.parse(path.read_bytes())


def test_each_intent_gives_as_many_rows_and_no_row_is_on_two_sides(
  source, tmp_path
):
  fetch_banking77.main(
    [f'--source={source}', f'--cache={tmp_path}', '--rows=5']
  )
  train, dev, test = (made(tmp_path, s) for s in ('train', 'dev', 'test'))
  assert test == TEST
  for intent in 'abc':
    assert sum(row[1] == intent for row in train) == 5
    assert sum(row[1] == intent for row in dev) == 2
  assert not set(train) & set(dev) and set(train) | set(dev) <= set(TRAIN)


def test_a_training_row_that_is_a_test_row_is_left_out(source, tmp_path):
  """'a 3' is test's 'A   3'; all others of the intent are there."""
  fetch_banking77.main(
    [f'--source={source}', f'--cache={tmp_path}', '--rows=99']
  )
  texts = {text for s in ('train', 'dev') for text, _ in made(tmp_path, s)}
  assert texts == {text for text, _ in TRAIN} - {'a 3'}


def test_other_bytes_than_those_published_are_refused(source, tmp_path):
  as_csv(source / 'test.csv', TEST[:1])
  with pytest.raises(SystemExit, match=r'test\.csv has sha256 .*; wanted'):
    fetch_banking77.main([f'--source={source}', f'--cache={tmp_path}'])
  assert not (tmp_path / 'banking77').exists()


def test_where_the_site_cannot_be_reached_it_says_what_to_do(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(fetch_banking77, 'SITE', 'http://127.0.0.1:9/')
  with pytest.raises(SystemExit, match='--source'):
    fetch_banking77.main([f'--cache={tmp_path}'])
