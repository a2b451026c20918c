"""Files become the same table, however it is read."""

import errno
import json
import os
import sys
import time

import hypothesis
import numpy as np
import pytest
import zstandard
from hypothesis import strategies as st

from tuner.data import files, rows, split, store, table

TEXT = st.text(min_size=1, max_size=8).filter(
  lambda t: t.strip() and '\0' not in t and t.isprintable()
)


GOOD = '{"prompt": "a", "completion": "b"}\n'


def make_file(path, prompts):
  lines = [json.dumps({'prompt': p, 'completion': f'to {p}'}) for p in prompts]
  path.write_text('\n'.join(lines))
  return str(path)


def old(path):
  """Makes the file one that is at rest."""
  os.utime(path, (time.time() - 60,) * 2)


def dumped(found):
  return [(found.data(i), found.where(i)) for i in range(len(found))]


@pytest.mark.parametrize('workers', [0, 2])
def test_in_order_and_complete(workers, tmp_path, monkeypatch):
  """Every row and fault once, in the order of the files, by any workers."""
  monkeypatch.setattr(table, 'CHUNK', 7)
  first = make_file(tmp_path / 'a.jsonl', [f'a{i}' for i in range(50)])
  second = make_file(tmp_path / 'b.jsonl', [f'b{i}' for i in range(30)])
  with open(first, 'a') as file:
    file.write('\n[]\n{"prompt": "z"}\n')
  found = table.read_all([table.Spec((first, second))], workers=workers)
  assert [row.prompt[0]['content'] for row in found] == (
    [f'a{i}' for i in range(50)] + [f'b{i}' for i in range(30)]
  )
  assert found.where(0) == f'{first}:1' and found.where(79) == f'{second}:30'
  assert [where for where, _ in found.faults.found] == [
    f'{first}:51',
    f'{first}:52',
  ]
  counts = [(f['rows'], f['faults'], f['forms']) for f in found.files]
  assert counts == [(50, 2, {'prompt': 50}), (30, 0, {'prompt': 30})]


def test_cached_until_the_file_changes(tmp_path, monkeypatch):
  path = make_file(tmp_path / 'a.jsonl', ['a', 'b'])
  spec, cache_dir = table.Spec((path,)), tmp_path / 'cache'
  old(path)
  first = dumped(table.read_all([spec], cache_dir))
  with monkeypatch.context() as patch:
    patch.setattr(table, '_chunks', None)  # Nothing may be read again.
    assert dumped(table.read_all([spec], cache_dir)) == first
  make_file(tmp_path / 'a.jsonl', ['a', 'c'])  # of the same size
  assert dumped(table.read_all([spec], cache_dir)) != first


def test_a_young_file_is_not_cached(tmp_path):
  """It could change again within the resolution of its times."""
  path = make_file(tmp_path / 'a.jsonl', ['a', 'b'])
  table.read_all([table.Spec((path,))], tmp_path / 'cache')
  assert not (tmp_path / 'cache').exists()


def test_faults_are_cached_too(tmp_path):
  path = make_file(tmp_path / 'a.jsonl', ['a', ''])
  old(path)
  found = [
    table.read_all([table.Spec((path,))], tmp_path / 'cache').faults.found
    for _ in range(2)
  ]
  assert (
    found[0]
    == found[1]
    == [(f'{path}:2', 'prompt: found an empty string; wanted: text')]
  )


def unreadable(monkeypatch, path, code):
  """The file's bytes cannot be had, as the system says; returns a mender."""
  real = open

  def fail(name, *arguments):
    if name == path:
      raise OSError(code, os.strerror(code))
    return real(name, *arguments)

  monkeypatch.setattr(files, 'open', fail, raising=False)
  return lambda: monkeypatch.delattr(files, 'open')


@pytest.mark.parametrize('code', [errno.EACCES, errno.EIO])
def test_a_fault_of_the_machine_is_told_and_not_cached(
  code, tmp_path, monkeypatch
):
  paths = [make_file(tmp_path / f'{n}.jsonl', [n]) for n in 'ab']
  for path in paths:
    old(path)
  spec, cache_dir = table.Spec(tuple(paths)), tmp_path / 'cache'
  mend = unreadable(monkeypatch, paths[1], code)
  found = table.read_all([spec], cache_dir)
  ((where, text),) = found.faults.found
  assert where == paths[1] and text.startswith(f'file: {os.strerror(code)}; ')
  assert len(found) == 1
  mend()
  found = table.read_all([spec], cache_dir)
  assert not len(found.faults) and len(found) == 2


def test_a_library_that_is_missing_is_not_cached(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl.zst'
  path.write_bytes(
    zstandard.ZstdCompressor().compress(b'{"prompt": "a", "completion": "b"}')
  )
  old(path)
  spec, cache_dir = table.Spec((str(path),)), tmp_path / 'cache'
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'zstandard', None)
    with pytest.raises(RuntimeError, match='`pip install zstandard`'):
      table.read_all([spec], cache_dir)
  found = table.read_all([spec], cache_dir)
  assert len(found) == 1 and not len(found.faults)


WALKED = {
  'in the first file': ([''], None, 'file: empty'),
  'in a later file': ([GOOD * 3, ''], None, 'file: empty'),
  'of a line': ([GOOD * 3, GOOD + '[]'], 2, 'line: found a list'),
  'of what is no line': ([GOOD + '\n\n' + 'x' * 99], 4, 'line: longer than'),
}


@pytest.mark.parametrize('name', WALKED)
def test_walking_stops_at_the_place_of_a_fault(name, tmp_path, monkeypatch):
  """At the place that reading all names, too."""
  monkeypatch.setattr(files, 'LINE_BYTES', 60)
  texts, line, text = WALKED[name]
  paths = [str(tmp_path / f'{i}.jsonl') for i in range(len(texts))]
  for path, content in zip(paths, texts, strict=True):
    with open(path, 'w') as file:
      file.write(content)
  spec = table.Spec(tuple(paths))
  with pytest.raises(ValueError) as error:
    list(table.walk(spec))
  where = paths[-1] + (f':{line}' if line else '')
  assert str(error.value).split('\n')[1].startswith(f'{where}: {text}')
  assert table.read_all([spec]).faults.found[0][0] == where


def test_walking_gives_the_rows_and_places_of_reading(tmp_path):
  path = tmp_path / 'a.json'
  row = GOOD.strip()
  path.write_text(f'[{row}, {row},\n{row}]')
  spec = table.Spec((str(path),))
  assert list(table.walk(spec)) == list(table.read_all([spec]))
  path.write_text(f'[{row}, []]')
  ((where, _),) = table.read_all([spec]).faults.found
  assert where == f'{path}:1:{len(row) + 4}'
  with pytest.raises(ValueError, match=f'\n{where}: line: found a list'):
    list(table.walk(spec))


def test_system_goes_before_rows_without(tmp_path):
  path = make_file(tmp_path / 'a.jsonl', ['a'])
  (row,) = table.read(path, system='Be')
  assert row.messages[0] == {'role': 'system', 'content': 'Be'}
  assert split.position(row) == split.position(table.read(path)[0])


def test_parts_and_views(tmp_path):
  """A view's rows, places and parts are those of the whole."""
  specs = [
    table.Spec((make_file(tmp_path / f'{name}.jsonl', prompts),), name=name)
    for name, prompts in (('a', 'rstuv'), ('b', 'xyz'))
  ]
  whole = table.read_all(specs)
  view = whole.take(np.array([6, 1, 0])).take(np.array([True, False, True]))
  assert [row.prompt[0]['content'] for row in view] == ['y', 'r']
  assert [view.where(0), view.where(1)] == [whole.where(6), whole.where(0)]
  assert view.part_of.tolist() == [1, 0]
  assert view.column('line').tolist() == [2, 1]
  assert view.digest != whole.digest != whole.take(np.arange(8)[::-1]).digest
  assert whole[-1] == whole[7]
  with pytest.raises(IndexError):
    whole[8]


@hypothesis.given(st.lists(TEXT, min_size=1, max_size=5))
def test_rows_in_memory_are_the_rows(prompts):
  made = [
    rows.Row(
      (
        {'role': 'user', 'content': p},
        {'role': 'assistant', 'content': 'b', 'train': False},
      ),
      f'x:{i}',
      weight=i + 0.5,
      tools=({'type': 'function', 'function': {'name': 'f'}},),
    )
    for i, p in enumerate(prompts)
  ]
  assert list(store.from_rows(made)) == made


def test_the_digest_is_of_the_rows_alone(tmp_path):
  """Not of rows that are not among them, in files before or after."""
  specs = {
    name: table.Spec((make_file(tmp_path / f'{name}.jsonl', prompts),))
    for name, prompts in (('a', 'rstuv'), ('b', 'xyz'), ('c', 'z'))
  }
  alone = table.read_all([specs['b']]).take([0, 2])
  for names, first in (('bc', 0), ('ab', 5), ('cab', 6)):
    whole = table.read_all([specs[name] for name in names])
    assert whole.take([first, first + 2]).digest == alone.digest, names
    assert whole.take([first + 2, first]).digest != alone.digest
    assert whole.digest != alone.digest
  two = table.read_all([specs['b'], specs['c']])  # The last row twice.
  assert two.take([0, 2]).digest != two.take([0, 3]).digest
  assert two.take([0, 3]).digest != two.take([3, 0]).digest
  whole = table.read_all([specs[name] for name in 'abc'])
  assert whole.take([5, 8]).digest == two.take([0, 3]).digest
  assert whole.take([]).digest == two.take([]).digest


def test_all_places_at_once(tmp_path):
  (tmp_path / 'b.json').write_text(f'[{GOOD}, {GOOD},\n{GOOD}]')
  path = make_file(tmp_path / 'a.jsonl', 'rstuv')
  found = table.read_all(
    [table.Spec((path, str(tmp_path / 'b.json'))), table.Spec((path,))]
  )
  made = store.from_rows([found[0], found[6]])
  for whole in (found, made, store.Table([*made.parts, *found.parts])):
    n = len(whole)
    for view in (whole, whole.take(np.arange(n)[::-2]), whole.take([])):
      wheres = view.wheres()
      assert wheres == [view.where(i) for i in range(len(view))]
      assert all(type(where) is str for where in wheres)


def test_the_same_rows_have_the_same_digest(tmp_path):
  """Wherever they stand: the digest names tokens in a cache."""
  one = table.read(make_file(tmp_path / 'a.jsonl', 'xyz'))
  two = table.read(make_file(tmp_path / 'b.jsonl', 'xyz'))
  other = table.read(make_file(tmp_path / 'c.jsonl', 'xyw'))
  assert one.digest == two.digest != other.digest
  assert store.from_rows(list(one)).digest == one.digest


def test_carried_columns_are_kept_under_a_key_of_their_own(tmp_path):
  """What is read without them stays cached, and is as it was."""
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"prompt": "a", "completion": "b", "answers": ["b"]}\n')
  old(path)
  cache = tmp_path / 'cache'
  plain, carrying = (
    table.Spec((str(path),)),
    table.Spec((str(path),), carry=('answers',)),
  )
  for spec, carried, extra in [
    (plain, {}, {'answers': 1}),
    (carrying, {'answers': ['b']}, {}),
  ] * 2:
    found = table.read_all([spec], cache)
    assert found[0].carried == carried and found.extra == extra
  assert len(list(cache.iterdir())) == 2
  assert next(table.walk(carrying)).carried == {'answers': ['b']}
