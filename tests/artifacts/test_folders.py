"""A directory is the old one or the new one, whenever a writer is killed."""

import pathlib
import random
import subprocess
import sys
import time

import pytest

from tuner.artifacts import folders

ROOT = pathlib.Path(__file__).parents[2]


def write(path, text, names='abc'):
  with folders.Folder(path) as folder:
    for name in names:
      (folder.scratch / name).write_text(text)
    folder.keep()


def read(path):
  return {file.name: file.read_text() for file in path.iterdir()}


@pytest.fixture(params=['exchange', 'two renames'])
def way(request, monkeypatch):
  if request.param == 'two renames':
    monkeypatch.setattr(folders, '_exchange', lambda *_: False)


@pytest.mark.usefixtures('way')
def test_the_new_replaces_the_old(tmp_path):
  write(tmp_path / 'x', 'old', 'abcd')
  write(tmp_path / 'x', 'new')
  assert read(tmp_path / 'x') == dict.fromkeys('abc', 'new')
  assert [p.name for p in tmp_path.iterdir()] == ['x']


@pytest.mark.usefixtures('way')
def test_an_exception_leaves_the_old(tmp_path):
  write(tmp_path / 'x', 'old')
  with pytest.raises(OSError, match='full'):
    with folders.Folder(tmp_path / 'x') as folder:
      (folder.scratch / 'a').write_text('half')
      raise OSError('full')
  assert read(tmp_path / 'x') == dict.fromkeys('abc', 'old')
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_a_rejected_one_lies_beside(tmp_path):
  write(tmp_path / 'x', 'old')
  with folders.Folder(tmp_path / 'x') as folder:
    (folder.scratch / 'a').write_text('wrong')
    folder.reject()
  assert read(tmp_path / 'x') == dict.fromkeys('abc', 'old')
  assert read(tmp_path / 'x.rejected') == {'a': 'wrong'}
  write(tmp_path / 'x', 'new')
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_leftovers_are_removed_and_a_half_rename_mended(tmp_path):
  write(tmp_path / 'x', 'old')
  (tmp_path / 'x').rename(tmp_path / '.x.old')
  (tmp_path / '.x.tmp').mkdir()
  (tmp_path / '.x.tmp' / 'half').write_text('?')
  with folders.Folder(tmp_path / 'x') as folder:
    assert read(tmp_path / 'x') == dict.fromkeys('abc', 'old')
    assert list(folder.scratch.iterdir()) == []
  assert [p.name for p in tmp_path.iterdir()] == ['x']


WRITER = """
import itertools, pathlib, sys
from tuner.artifacts import folders
path = pathlib.Path(sys.argv[1])
for i in itertools.count(int(sys.argv[2])):
  with folders.Folder(path) as folder:
    for name in 'abcdefgh':
      (folder.scratch / name).write_text(f'{i} ' * 2000)
    folder.keep()
  print(i, flush=True)
"""


def test_killed_at_any_moment(tmp_path):
  """SIGKILL: one generation, whole, and no older than the last one said."""
  path, start = tmp_path / 'x', 0
  moments = random.Random(0)
  for _ in range(6):
    writer = subprocess.Popen(
      [sys.executable, '-c', WRITER, path, str(start)],
      stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    said = int(writer.stdout.readline())
    time.sleep(moments.random() * 0.05)
    writer.kill()
    said = int((writer.communicate()[0].split() or [said])[-1])
    found = read(path)
    assert found.keys() == set('abcdefgh')
    assert len(set(found.values())) == 1
    kept = int(found['a'].split()[0])
    assert kept in (said, said + 1)
    start = kept + 1
  write(path, 'last')
  assert [p.name for p in tmp_path.iterdir()] == ['x']
