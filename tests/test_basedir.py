"""A base is a directory, a hub id or a GGUF file, which is converted once."""

import os

import pytest

from tuner import basedir
from tuner.llamacpp import read
from tuner.models import hub


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
  monkeypatch.setenv('TUNER_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def converted(monkeypatch):
  """The files that were converted, into directories that say so."""
  found = []

  def convert(file, out):
    found.append(file.name)
    out.mkdir(parents=True)
    (out / 'config.json').write_text('{}')

  monkeypatch.setattr(read, 'convert', convert)
  monkeypatch.setattr(read, 'float32_bytes', lambda file: 1)
  return found


@pytest.fixture
def file(tmp_path):
  file = tmp_path / 'model.gguf'
  file.write_bytes(b'GGUF' + bytes(100))
  return file


def test_a_file_is_converted_once(cache_dir, converted, file):
  first = basedir.find(str(file))
  assert first.parent == cache_dir / 'gguf'
  assert first.name.startswith('model-')
  assert basedir.find(str(file)) == first
  assert converted == ['model.gguf']


@pytest.mark.parametrize('what', ['bytes', 'size', 'time', 'name'])
def test_another_file_is_converted_again(cache_dir, converted, file, what):
  os.utime(file, (1e9, 1e9))
  first = basedir.find(str(file))
  if what == 'bytes':
    file.write_bytes(b'GGUF' + bytes(99) + b'\1')
  if what == 'size':
    file.write_bytes(b'GGUF' + bytes(101))
  if what == 'name':
    file = file.rename(file.with_name('other.gguf'))
  os.utime(file, (1e9 + (what == 'time'),) * 2)
  assert basedir.find(str(file)) != first
  assert len(converted) == 2


def test_another_process_may_be_quicker(cache_dir, monkeypatch, file):
  def convert(_, out):
    out.mkdir(parents=True)
    raise FileExistsError(out)

  monkeypatch.setattr(read, 'convert', convert)
  monkeypatch.setattr(read, 'float32_bytes', lambda file: 1)
  assert basedir.find(str(file)).is_dir()


def test_room_is_looked_for_first(cache_dir, converted, monkeypatch, file):
  monkeypatch.setattr(read, 'float32_bytes', lambda file: 10**18)
  with pytest.raises(RuntimeError, match='disk full: needs'):
    basedir.find(str(file))
  assert not converted


def test_float32_is_counted_from_shapes(tmp_path):
  import gguf
  import numpy as np

  writer = gguf.GGUFWriter(tmp_path / 'a.gguf', 'llama')
  writer.add_tensor('x', np.zeros((3, 5), np.float16))
  writer.add_tensor('y', np.zeros(7, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert read.float32_bytes(tmp_path / 'a.gguf') == 4 * (15 + 7)


@pytest.mark.parametrize(
  ('data', 'said'),
  [(b'', 'is empty'), (b'version https://', "begins with b'version '")],
)
def test_a_name_alone_makes_no_gguf(tmp_path, data, said):
  file = tmp_path / 'model.gguf'
  file.write_bytes(data)
  with pytest.raises(ValueError, match=said) as error:
    basedir.find(str(file))
  assert str(file) in str(error.value)


def test_a_failed_conversion_is_told(cache_dir, file):
  """The file holds nothing that can be read."""
  with pytest.raises(ValueError, match='model.gguf'):
    basedir.find(str(file))
  assert not list((cache_dir / 'gguf').glob('*'))


def test_a_file_has_no_revision(cache_dir, converted, file):
  with pytest.raises(ValueError) as error:
    basedir.find(str(file), 'main')
  assert str(error.value) == (
    f"config.model.revision: 'main'; {file} is a file, which has none."
  )


def test_a_directory_is_itself(tiny_dir):
  assert basedir.find(str(tiny_dir)) == tiny_dir


def test_another_file_is_refused(tmp_path):
  file = tmp_path / 'model.bin'
  file.write_bytes(b'\x80\x02')
  with pytest.raises(ValueError, match='is a file, not a directory'):
    basedir.find(str(file))


def test_the_hash_is_kept(cache_dir, tiny_dir):
  os.utime(tiny_dir / 'model.safetensors', (1e9, 1e9))
  expected = hub.weights_hash(tiny_dir)
  assert basedir.weights_hash(tiny_dir) == expected
  assert list((cache_dir / 'weights').iterdir())
  identity = basedir.identity(tiny_dir, 'x', 'abc')
  assert identity == dict(path='x', revision='abc', weights=expected)
