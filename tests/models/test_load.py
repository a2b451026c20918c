"""Laws of reading and writing weights: any declaration, mesh, file and dtype.

The library `safetensors` is the other side: it reads what is written here, and
writes what is read.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import struct

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import support
from flax import nnx
from hypothesis import strategies as st

from tuner import mesh as mesh_lib
from tuner.models import hub, load, mxfp4, save, tensors, weights

ROOT = pathlib.Path(__file__).parents[2]
BF16 = np.dtype(ml_dtypes.bfloat16)
NUMPY = {'float32': np.float32, 'bfloat16': BF16, 'float16': np.float16}
MESHES = {
  'one': None,
  'data': dict(data=8),
  'fsdp': dict(data=1, fsdp=8),
  'both': dict(data=1, fsdp=2, tensor=4),
}
LETTERS = 'DNHCZ'  # D and N are divided on a mesh.
QUICK = hypothesis.settings(max_examples=20, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Config:
  letters: tuple[tuple[str, int], ...]
  tied: bool = False
  ignored: tuple[str, ...] = ()

  @property
  def sizes(self):
    return dict(self.letters)


class Part(nnx.Module):
  def __init__(self, params):
    for i, param in enumerate(params):
      setattr(self, f'w{i}', param)


class Model(nnx.Module):
  """Weights of their own, and some that are stacked over layers 1, 3, 5..."""

  def __init__(self, single, stacked, config):
    self.top = Part(single)
    layers = range(1, 2 * config.sizes['L'], 2)
    self.block = weights.stack(Part(stacked), 'layers.{L}.', layers)
    self.config = config


@st.composite
def declared(draw, name):
  """A weight of any dims and layout, over experts or not."""
  letters = draw(st.permutations(LETTERS))[: draw(st.integers(1, 4))]
  order = draw(st.permutations(letters))
  layout, rest = '', list(order)
  while rest:
    n = draw(st.integers(1, len(rest)))
    group, rest = ''.join(rest[:n]), rest[n:]
    layout += f'({group})' if n > 1 else group
  over = draw(st.sampled_from(['', 'E']))
  hf = name + ('.{E}' if over else '')
  return weights.weight(
    over + ''.join(letters), hf=hf, layout=layout, inputs=letters[0]
  )


@st.composite
def models(draw):
  sizes = {d: draw(st.sampled_from([1, 2, 3, 8])) for d in LETTERS}
  sizes |= {'L': draw(st.integers(1, 3)), 'E': draw(st.integers(1, 3))}
  single, stacked = (
    [draw(declared(f'{kind}{i}')) for i in range(draw(st.integers(1, 2)))]
    for kind in 'ab'
  )
  return Model(single, stacked, Config(tuple(sorted(sizes.items()))))


def random_values(model, dtype, seed=0):
  rng = np.random.default_rng(seed)
  return {
    path: rng.standard_normal(row.shape(model.config.sizes)).astype(dtype)
    for path, row in weights.rows(model).items()
  }


def sharding_on(mesh, model):
  if mesh is None:
    return None
  on = mesh_lib.make(**mesh)
  return lambda row: mesh_lib.sharding(
    on, row.dims, row.shape(model.config.sizes)
  )


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    y = np.asarray(found[path])
    assert (y.dtype, y.shape) == (x.dtype, x.shape), path
    assert y.tobytes() == np.ascontiguousarray(x).tobytes(), path


def oracle(row, value, sizes):
  """{name: tensor} of a weight, one element at a time."""
  letters = ''.join(row.groups)
  found = {}
  for index, name in row.names(sizes).items():
    out = np.empty([sizes[d] for d in letters], value.dtype)
    own = row.dims[len(row.stacked) :]
    for place in np.ndindex(*out.shape):
      at = dict(zip(letters, place, strict=True))
      out[place] = value[(*index, *(at[d] for d in own))]
    shape = [math.prod(sizes[d] for d in group) for group in row.groups]
    found[name] = out.reshape(shape)
  return found


@QUICK
@hypothesis.given(model=models(), dtype=st.sampled_from(sorted(NUMPY)))
def test_what_is_written_is_what_the_declaration_says(
  model, dtype, tmp_path_factory
):
  """By a reading of the layout that goes element by element."""
  path = tmp_path_factory.mktemp('written')
  values = random_values(model, NUMPY[dtype])
  hub.write(path, model, values.__getitem__, dtype)
  expected = {}
  for row in weights.rows(model).values():
    expected |= oracle(row, values[row.path], model.config.sizes)
  found = safetensors.numpy.load_file(path / 'model.safetensors')
  assert_same(found, expected)


@pytest.mark.parametrize('mesh', MESHES)
@QUICK
@hypothesis.given(
  model=models(),
  dtype=st.sampled_from(sorted(NUMPY)),
  shard_bytes=st.sampled_from([1, 200, 10**9]),
)
def test_load_of_write_is_the_identity(
  model, dtype, shard_bytes, mesh, tmp_path_factory
):
  """Bit for bit, from one file or many, on every mesh."""
  first, second = (tmp_path_factory.mktemp('identity') for _ in range(2))
  values = random_values(model, NUMPY[dtype])
  hub.write(first, model, values.__getitem__, dtype, shard_bytes)
  place = sharding_on(MESHES[mesh], model)
  found = hub.load(first, model, place, dtype)
  assert_same(found, values)
  host = {path: np.asarray(x) for path, x in found.items()}
  for path, row in weights.rows(model).items():
    if place is not None:
      assert found[path].sharding == place(row), path
  hub.write(second, model, host.__getitem__, dtype, shard_bytes)
  names = sorted(file.name for file in first.iterdir())
  assert names == sorted(file.name for file in second.iterdir())
  for name in names:
    assert (first / name).read_bytes() == (second / name).read_bytes()


@QUICK
@hypothesis.given(model=models(), data=st.data())
def test_a_part_is_the_part_of_the_whole(model, data, tmp_path_factory):
  path = tmp_path_factory.mktemp('part')
  values = random_values(model, np.float32)
  hub.write(path, model, values.__getitem__)
  held = tensors.Tensors(path)
  for row in weights.rows(model).values():
    whole = values[row.path]
    spans = []
    for size in whole.shape:
      a, b = sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))
      spans.append((a, b))
    reader = load.Reader(held, row, model.config.sizes, np.dtype('float32'))
    found = reader.read(tuple(spans))
    expected = whole[tuple(slice(*span) for span in spans)]
    assert_same({'': found}, {'': expected})


@QUICK
@hypothesis.given(
  shape=st.lists(st.sampled_from([1, 2, 5, 17, 40]), min_size=0, max_size=4),
  data=st.data(),
)
def test_copy_is_assignment(shape, data):
  """Whatever the order of the axes of either side, and whatever the casts."""
  kinds = st.sampled_from(sorted(NUMPY))
  source, wanted = (NUMPY[data.draw(kinds)] for _ in range(2))
  rng = np.random.default_rng(0)
  value = rng.standard_normal(shape).astype(source)
  if shape:
    turn = data.draw(st.permutations(range(len(shape))))
    value = value.transpose(turn)
    value = value[data.draw(st.sampled_from([slice(None), slice(1, None)]))]
  back = data.draw(st.permutations(range(value.ndim)))
  target = np.empty([value.shape[d] for d in back], wanted)
  target = target.transpose(np.argsort(back)) if shape else target
  tensors.copy(target, value)
  assert_same({'': target}, {'': value.astype(wanted)})


CASTS = [(a, b) for a in NUMPY for b in NUMPY if a != b]


@pytest.mark.parametrize('source, wanted', CASTS)
def test_casts_round_as_numpy_does(tmp_path, source, wanted):
  """What is on the disk is cast when it is read, and when it is written."""
  model = one_matrix()
  values = random_values(model, NUMPY[source])
  expected = {p: x.astype(NUMPY[wanted]) for p, x in values.items()}
  hub.write(tmp_path, model, values.__getitem__, source)
  assert_same(hub.load(tmp_path, model, dtype=wanted), expected)
  hub.write(tmp_path, model, values.__getitem__, wanted)
  assert_same(hub.load(tmp_path, model, dtype=wanted), expected)


def one_matrix():
  sizes = (('D', 8), ('F', 24), ('L', 2))
  single = [weights.weight('DF', hf='a', layout='FD')]
  stacked = [weights.weight('DF', hf='b', layout='FD')]
  return Model(single, stacked, Config(sizes))


def test_dtypes_may_be_mixed_on_the_disk(tmp_path):
  model, kinds = one_matrix(), [np.float32, BF16, np.float16]
  values = random_values(model, np.float16)
  values['block.w0'] = values['block.w0'].astype(BF16).astype(np.float16)
  named = {}
  for row in weights.rows(model).values():
    named |= dict(hub.hf_tensors(row, values[row.path], model.config.sizes))
  mixed = {
    name: x.astype(kind)
    for (name, x), kind in zip(sorted(named.items()), kinds, strict=True)
  }
  mixed['a'] = named['a'].astype(np.float32)
  safetensors.numpy.save_file(mixed, tmp_path / 'model.safetensors')
  found = hub.load(tmp_path, model, dtype='float32')
  assert_same(found, {p: x.astype(np.float32) for p, x in values.items()})


@pytest.mark.parametrize(
  'source, wanted, value, limit',
  [
    ('float32', 'float16', -70000.0, '65504'),
    ('bfloat16', 'float16', 1e30, '65504'),
    ('float32', 'bfloat16', 3.4e38, '3.38953e+38'),
  ],
)
def test_an_overflow_names_the_tensor(tmp_path, source, wanted, value, limit):
  model = one_matrix()
  values = random_values(model, NUMPY[source])
  values['block.w0'][1, 3, 5] = value
  size = abs(float(np.asarray(value).astype(NUMPY[source])))
  message = (
    f'layers.3.b: the value {size:g} does not fit {wanted}, which ends at '
    f'{limit}; choose bfloat16 or float32.'
  )
  with pytest.raises(ValueError) as error:
    hub.write(tmp_path, model, values.__getitem__, wanted)
  assert str(error.value) == message
  hub.write(tmp_path, model, values.__getitem__, source)
  with pytest.raises(ValueError) as error:
    hub.load(tmp_path, model, dtype=wanted)
  assert str(error.value) == f'{tmp_path}: {message}'
  hub.load(tmp_path, model, dtype='float32')


@pytest.mark.parametrize('wanted', ['float32', 'bfloat16', 'float16'])
def test_what_is_infinite_stays_so(wanted):
  source = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
  found = tensors.cast(source, NUMPY[wanted], 'x')
  np.testing.assert_array_equal(found.astype(np.float32), source)


def test_a_value_of_another_shape_is_not_written(tmp_path):
  model = one_matrix()
  values = random_values(model, np.float32)
  values['top.w0'] = values['top.w0'][:4]
  with pytest.raises(ValueError) as error:
    hub.write(tmp_path, model, values.__getitem__)
  assert str(error.value) == (
    'top.w0 has shape (4, 24); its dims DF are (8, 24).'
  )


def test_virtual_tensors_stand_for_stored_ones(tmp_path):
  """Made on reading, a row at a time; what they are made of is no extra."""
  model = one_matrix()
  values = random_values(model, np.float32)
  hub.write(tmp_path, model, values.__getitem__)

  read = []

  class Twice:
    def get_shape(self):
      return [24, 8]

    def get_dtype(self):
      return 'F32'

    def __getitem__(self, index):
      read.append(index[0])
      return 2 * held.slice_of('a_raw')[index]

  data = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  data['a_raw'] = data.pop('a')
  safetensors.numpy.save_file(data, tmp_path / 'model.safetensors')
  held = tensors.Tensors(tmp_path)
  held.replace({'a': Twice()}, ['a_raw'])
  rows = weights.rows(model)
  load.check(held, rows, model.config.sizes)
  reader = load.Reader(
    held, rows['top.w0'], model.config.sizes, np.dtype('float32')
  )
  found = reader.read(((2, 8), (0, 24)))
  np.testing.assert_array_equal(found, 2 * values['top.w0'][2:8])
  assert read == [slice(i, i + 1) for i in range(24)]
  forgotten = []
  held.slice_of('a_raw').file.forget = lambda tensor: forgotten.append(tensor)
  held.forget(reader.names.values())
  assert forgotten == [held.slice_of('a_raw')]


GPT_OSS = {
  'model_type': 'gpt_oss',
  'num_hidden_layers': 2,
  'hidden_size': 64,
  'intermediate_size': 32,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'num_local_experts': 3,
  'num_experts_per_tok': 2,
  'vocab_size': 32,
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 64,
  'rope_theta': 1e4,
  'quantization_config': {'quant_method': 'mxfp4'},
}


def test_experts_of_four_bits_are_read(tmp_path):
  """On a mesh, too: the tensors that the blocks stand for."""
  (tmp_path / 'config.json').write_text(json.dumps(GPT_OSS))
  model, rng = hub.declare(tmp_path), np.random.default_rng(0)
  expected = random_values(model, BF16)
  hub.write(tmp_path, model, expected.__getitem__, 'bfloat16')
  file = tmp_path / 'model.safetensors'
  data = safetensors.numpy.load_file(file)
  for name in [n for n in data if n.endswith(('gate_up_proj', 'down_proj'))]:
    experts, inputs, outputs = data.pop(name).shape
    shape = (experts, outputs, inputs // mxfp4.SIZE)
    blocks = rng.integers(0, 256, (*shape, mxfp4.SIZE // 2), np.uint8)
    scales = rng.integers(120, 130, shape, np.uint8)
    data[name + mxfp4.BLOCKS], data[name + mxfp4.SCALES] = blocks, scales
    found = mxfp4.dequantise(blocks, scales).swapaxes(1, 2)
    if 'gate_up' in name:  # [E, D, (I C)] is EDCI
      found = found.reshape(experts, inputs, -1, 2).swapaxes(2, 3)
    for path, row in weights.rows(model).items():
      for index, own in row.names(model.config.sizes).items():
        if own == name:
          expected[path][index] = found
  safetensors.numpy.save_file(data, file)
  assert_same(hub.load(tmp_path, model, dtype='bfloat16'), expected)
  place = sharding_on(MESHES['both'], model)
  assert_same(hub.load(tmp_path, model, place, 'bfloat16'), expected)


class TestHeaders:
  """A header is believed no further than its file reaches."""

  def refused(self, tmp_path, header, data=b'\0' * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    n = len(text) if length is None else length
    file = tmp_path / 'model.safetensors'
    file.write_bytes(struct.pack('<Q', n) + text + data)
    with pytest.raises(ValueError) as error:
      tensors.Tensors(tmp_path)
    start = f'{file}: not a readable safetensors file: '
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)

  def entry(self, dtype='F32', shape=(2,), at=(0, 8)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(at))

  def test_a_good_one(self, tmp_path):
    with pytest.raises(pytest.fail.Exception):
      self.refused(tmp_path, {'a': self.entry()})

  @pytest.mark.parametrize(
    'entry, reason',
    [
      (
        dict(shape=(3,)),
        'header: a: F32 [3] in bytes 0 to 8; wanted: 12 bytes',
      ),
      (
        dict(shape=(-2, -1)),
        'header: a: F32 [-2, -1] in bytes 0 to 8; wanted: 8 bytes',
      ),
      (
        dict(dtype='F64'),
        'header: a: F64 [2] in bytes 0 to 8; wanted: 16 bytes',
      ),
      (dict(at=(-8, 0)), 'header: a begins at byte 62, not 70'),
      (dict(at=(8, 16)), 'header: a begins at byte 78, not 70'),
      (dict(at=(0,)), 'header: a: not enough values to unpack'),
      (dict(shape=('x',)), 'header: a: invalid literal for int()'),
    ],
  )
  def test_lies(self, tmp_path, entry, reason):
    found = self.refused(tmp_path, {'a': self.entry(**entry)})
    assert found.startswith(reason)

  def test_beyond_the_file(self, tmp_path):
    found = self.refused(tmp_path, {'a': self.entry()}, b'\0' * 7)
    assert found == 'its header speaks of 77 bytes; there are 76'
    found = self.refused(tmp_path, {'a': self.entry()}, b'\0' * 9)
    assert found == 'its header speaks of 77 bytes; there are 78'

  def test_overlapping(self, tmp_path):
    header = {'a': self.entry(), 'b': self.entry(shape=[1], at=(4, 8))}
    found = self.refused(tmp_path, header)
    assert found.startswith('header: b begins at byte ')

  @pytest.mark.parametrize(
    'header, length, reason',
    [
      (b'{}', 2**62, 'its header of 4,611,686,018,427,387,904 bytes is not'),
      (b'{}', 11, 'its header of 11 bytes is not in its 18'),
      (b'{]', None, 'its header is not JSON: '),
      (b'\xff\xff', None, 'its header is not JSON: '),
      (b'[]', None, 'its header is not a JSON object'),
      (b'{"a": 1}', None, "header: a: 'int' object is not subscriptable"),
    ],
  )
  def test_no_header(self, tmp_path, header, length, reason):
    assert self.refused(tmp_path, header, length=length).startswith(reason)

  @pytest.mark.parametrize(
    'data, reason',
    [
      (b'', 'it has 0 bytes'),
      (b'<!DOCTYPE html><html>', 'it is an HTML page, as a failed download'),
      (b'\n <html><head>', 'it is an HTML page, as a failed download'),
      (b'PK\x03\x04aaaaaaaa', 'it is a pickle or a zip; only safetensors are'),
      (b'\x80\x02}q\x00X\x05\x01\x00', 'it is a pickle or a zip; only'),
      (b'GGUF\x03\0\0\0\0\0', 'it is a GGUF file; give it as config.model.'),
    ],
  )
  def test_another_file(self, tmp_path, data, reason):
    file = tmp_path / 'model.safetensors'
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
      tensors.Tensors(tmp_path)
    start = f'{file}: not a readable safetensors file: {reason}'
    assert str(error.value).startswith(start)

  def test_a_length_that_looks_like_another_file(self, tmp_path):
    """A header of 0x280 bytes begins as a pickle does."""
    text = json.dumps({'a': self.entry()}).encode().ljust(0x280)
    data = struct.pack('<Q', 0x280) + text + bytes(8)
    (tmp_path / 'model.safetensors').write_bytes(data)
    assert 'a' in tensors.Tensors(tmp_path)

  def test_float8_is_refused_by_name(self, tmp_path):
    model = one_matrix()
    values = random_values(model, np.float32)
    hub.write(tmp_path, model, values.__getitem__)
    data = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
    data['a'] = data['a'].astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(data, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError) as error:
      hub.load(tmp_path, model)
    assert str(error.value) == (
      f'{tmp_path}: 1 tensors do not fit config.json:\n  a has dtype F8_E4M3; '
      'read are F32, BF16, F16'
    )


def bench():
  """scripts/bench_load.py as a module."""
  file = ROOT / 'scripts' / 'bench_load.py'
  spec = importlib.util.spec_from_file_location('bench_load', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


MARGIN_BYTES = 64 * 10**6


def test_memory_is_bounded(tmp_path):
  """Loading holds less than the largest group beyond what devices hold.

  200 MB in four files, in fresh processes; reading files whole does not pass.
  """
  script = bench()
  size = script.write_checkpoint(tmp_path, 2e8, 'bfloat16', script.SMALL)
  assert 1.5e8 < size < 2.5e8

  def beyond(way, mesh, dtype='bfloat16'):
    found = script.in_child(
      path=str(tmp_path), mesh=mesh, way=way, threads=2, dtype=dtype
    )
    width = 2 if dtype == 'float32' else 1
    assert found['devices'] >= width * size
    assert found['group'] < 0.25 * width * size
    return found['beyond'] - found['group'] - MARGIN_BYTES

  assert beyond('tuner', '1', 'float32') < 0
  assert beyond('tuner', 'fsdp=2,tensor=4') < 0
  assert beyond('naive', 'fsdp=8') > 0


def test_parts_wait_for_devices_within_bounds(monkeypatch):
  """Room is made by waiting for the oldest part, and only when it must be."""
  waited = []
  monkeypatch.setattr(load, 'AHEAD_BYTES', 100)
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  waiting, float32 = load._Waiting(), np.dtype('float32')
  for i, count in enumerate([10, 10, 5, 30, 1]):
    waiting.make_room(count, float32)
    waiting.add([i], 4 * count)
    held = sum(size for _, size in waiting._parts)
    assert held <= max(100, 4 * count)
  assert waited == [[0], [1], [2], [3]]


def test_a_replicated_weight_is_read_once(tmp_path, monkeypatch):
  support.write_model(tmp_path)
  model, reads = hub.declare(tmp_path), []
  own = tensors.Tensors.slice_of
  expected = sorted(safetensors.numpy.load_file(tmp_path / 'model.safetensors'))
  with monkeypatch.context() as patch:
    patch.setattr(load, 'check', lambda *_: None)
    patch.setattr(
      tensors.Tensors,
      'slice_of',
      lambda self, name: reads.append(name) or own(self, name),
    )
    hub.load(tmp_path, model, sharding_on(dict(data=8), model))
  assert sorted(reads) == expected


def test_a_file_ends_where_it_says(tmp_path):
  """Files are of at most shard_bytes, and each is full: no next one fits."""
  model = one_matrix()
  values = random_values(model, np.float32)
  size = 24 * 8 * 4
  for most, files in ((size, 3), (2 * size, 2), (2 * size - 1, 3), (1, 3)):
    for file in tmp_path.iterdir():
      file.unlink()
    hub.write(tmp_path, model, values.__getitem__, shard_bytes=most)
    found = hub.weight_files(tmp_path)
    assert [f.name for f in found] == [
      f'model-{i:05d}-of-{files:05d}.safetensors' for i in range(1, files + 1)
    ]


def test_writing_brings_a_layer_at_a_time(monkeypatch, tmp_path):
  """Of an array on devices no more comes to the host at once."""
  model = one_matrix()
  expected = random_values(model, np.float32)
  hub.write(tmp_path, model, expected.__getitem__)
  values = hub.load(tmp_path, model, sharding_on(MESHES['both'], model))
  shapes, own = [], save._on_host

  def on_host(value, index, order):
    out = own(value, index, order)
    shapes.append(out.shape)
    return out

  monkeypatch.setattr(save, '_on_host', on_host)
  hub.write(tmp_path, model, values.__getitem__)
  assert shapes == [(8, 24)] * 3
  assert_same(hub.load(tmp_path, model), expected)
