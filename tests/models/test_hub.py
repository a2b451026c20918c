"""A Hugging Face directory in and out, bit for bit, on one and many devices."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import support
from absl import logging as absl_logging

from tuner import mesh as mesh_lib
from tuner.models import families, hub, load, rope, save, tensors, weights

BF16 = np.dtype(ml_dtypes.bfloat16)
LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
BIASED = dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope='module')
def biased(tmp_path_factory):
  """Every kind of weight there is: biases, and a head of its own."""
  path = tmp_path_factory.mktemp('biased')
  support.write_model(path, **BIASED)
  return path


def tensors_of(path):
  """Every tensor of a directory by name."""
  found = {}
  for file in sorted(path.glob('*.safetensors')):
    found |= safetensors.numpy.load_file(file)
  return found


def random_tensors(path, dtype):
  """Random bits (finite) in the shapes of a directory's tensors."""
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(x.shape).astype(dtype)
    for name, x in sorted(tensors_of(path).items())
  }


def assert_same_bits(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype, name
    assert found[name].shape == x.shape, name
    assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shard_bytes', [None, 10_000])
def test_load_then_write_is_the_identity(
  biased, tmp_path, monkeypatch, dtype, shard_bytes
):
  """HF -> ours -> HF, one file or many, float32 and bfloat16."""
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir(), target.mkdir()
  shutil.copy(biased / 'config.json', source)
  expected = random_tensors(biased, BF16 if dtype == 'bfloat16' else dtype)
  safetensors.numpy.save_file(expected, source / 'model.safetensors')
  model = hub.declare(source)
  values = hub.load(source, model, dtype=dtype)
  if shard_bytes:
    monkeypatch.setattr(save, 'SHARD_BYTES', shard_bytes)
  hub.write(target, model, values.__getitem__, dtype)
  assert_same_bits(tensors_of(target), expected)
  files = hub.weight_files(target)
  assert (len(files) > 3) == bool(shard_bytes)
  if shard_bytes:
    check_index(target, files, expected)
    shutil.copy(biased / 'config.json', target)
    again = hub.load(target, model, dtype=dtype)
    assert_same_bits(host(again), host(values))


def check_index(path, files, expected):
  """The index names each tensor's file, and every file is full or single."""
  index = json.loads((path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(
    x.nbytes for x in expected.values()
  )
  total = len(files)
  assert [file.name for file in files] == [
    f'model-{i:05d}-of-{total:05d}.safetensors' for i in range(1, total + 1)
  ]
  for file in files:
    held = safetensors.numpy.load_file(file)
    assert all(index['weight_map'][name] == file.name for name in held)
    size = sum(x.nbytes for x in held.values())
    assert size <= save.SHARD_BYTES or len(held) == 1


def host(values):
  return {path: np.asarray(x) for path, x in values.items()}


def test_float16_is_read(biased, tmp_path):
  shutil.copy(biased / 'config.json', tmp_path)
  expected = random_tensors(biased, np.float16)
  safetensors.numpy.save_file(expected, tmp_path / 'model.safetensors')
  model = hub.declare(tmp_path)
  values = hub.load(tmp_path, model)
  np.testing.assert_array_equal(
    values['embed'],
    expected['model.embed_tokens.weight'].astype(np.float32),
  )


def on_mesh(path, mesh):
  """(declared model, its weights loaded onto a mesh)."""
  model = hub.declare(path)

  def sharding(row):
    shape = weights.shape(row.dims, model.config.sizes)
    return mesh_lib.sharding(mesh, row.dims, shape, row.path)

  return model, hub.load(path, model, sharding)


@pytest.mark.parametrize(
  'data, fsdp, tensor',
  [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (1, 4, 2)],
)
def test_on_a_mesh_equals_one_device(biased, data, fsdp, tensor):
  """Bit for bit; each device holds its part of each weight and no more."""
  mesh = mesh_lib.make(data, fsdp, tensor, data * fsdp * tensor)
  model, values = on_mesh(biased, mesh)
  assert_same_bits(host(values), host(hub.load(biased, model)))
  rows = weights.rows(model)
  divided = {'D': fsdp, 'N': tensor, 'K': tensor, 'F': tensor, 'V': tensor}
  for path, x in values.items():
    parts = np.prod([divided.get(d, 1) for d in rows[path].dims])
    sizes = {shard.data.size for shard in x.addressable_shards}
    assert sizes == {x.size // parts}, path
    assert len(x.addressable_shards) == mesh.size


def test_what_does_not_divide_is_replicated_and_said(biased, monkeypatch):
  """Two key heads over four devices: K stays whole, N, F and V divide."""
  lines = []
  monkeypatch.setattr(
    absl_logging, 'warning', lambda text, *args: lines.append(text % args)
  )
  model, values = on_mesh(biased, mesh_lib.make(1, 2, 4))
  assert_same_bits(host(values), host(hub.load(biased, model)))
  expected = ['k', 'k_bias', 'v', 'v_bias']
  assert sorted(lines) == [
    f'blocks.0.attention.{name}: K = 2 does not divide by tensor = 4; '
    'replicated.'
    for name in expected
  ]
  sizes = {
    name: values[f'blocks.0.attention.{name}'].addressable_shards[0].data.shape
    for name in ('k', 'q')
  }
  assert sizes == {'k': (2, 16, 2, 8), 'q': (2, 16, 1, 8)}


def test_only_the_parts_asked_for_are_read(biased, monkeypatch):
  """A host that holds half of D reads half of each tensor along D."""
  model = hub.declare(biased)
  rows, sizes = weights.rows(model), model.config.sizes
  row = rows['blocks.0.mlp.gate']
  reader = load.Reader(tensors.Tensors(biased), row, sizes, np.dtype('float32'))
  spans = ((1, 2), (8, 24), (12, 24))
  index = tuple(slice(*span) for span in spans)
  whole = np.asarray(hub.load(biased, model)['blocks.0.mlp.gate'])
  read = []
  monkeypatch.setattr(
    tensors.Tensors, 'slice_of', counted(tensors.Tensors, read)
  )
  np.testing.assert_array_equal(reader.read(spans), whole[index])
  assert read == [
    ('model.layers.1.mlp.gate_proj.weight', (slice(12, 24), slice(8, 24)))
  ]


def counted(kind, read):
  """slice_of, whose reads are written down."""
  own = kind.slice_of

  def slice_of(self, name):
    class Slice:
      def __getitem__(_, index):
        read.append((name, index))
        return own(self, name)[index]

    return Slice()

  return slice_of


class TestErrors:
  """Each broken directory is refused, word by word."""

  @pytest.fixture
  def path(self, tiny_dir, tmp_path):
    for name in ('config.json', 'model.safetensors'):
      shutil.copy(tiny_dir / name, tmp_path)
    return tmp_path

  def refused(self, path):
    with pytest.raises(ValueError) as error:
      hub.load(path, hub.declare(path))
    return str(error.value).replace(str(path), 'DIR')

  def change(self, path, **tensors):
    """Rewrites the tensors; None takes one away."""
    held = tensors_of(path) | tensors
    held = {name: x for name, x in held.items() if x is not None}
    safetensors.numpy.save_file(held, path / 'model.safetensors')

  @pytest.mark.parametrize(
    'name, tensor, problem',
    [
      ('model.norm.weight', None, 'model.norm.weight is missing (dims D)'),
      (
        'model.layers.1.self_attn.q_proj.weight',
        None,
        'model.layers.1.self_attn.q_proj.weight is missing (dims LDNH)',
      ),
      (
        'model.layers.2.mlp.up_proj.weight',
        np.zeros((48, 32), np.float32),
        'model.layers.2.mlp.up_proj.weight is there, and no weight wants it',
      ),
      (
        'model.layers.0.mlp.up_proj.weight',
        np.zeros((32, 48), np.float32),
        'model.layers.0.mlp.up_proj.weight has shape (32, 48); config.json '
        'implies (48, 32) = FD',
      ),
      (
        'model.layers.0.self_attn.o_proj.weight',
        np.zeros((32, 16), np.float32),
        'model.layers.0.self_attn.o_proj.weight has shape (32, 16); '
        'config.json implies (32, 32) = D(NH)',
      ),
      (
        'model.norm.weight',
        np.zeros(32, np.int64),
        'model.norm.weight has dtype I64; read are F32, BF16, F16',
      ),
    ],
  )
  def test_tensors_that_do_not_fit(self, path, name, tensor, problem):
    self.change(path, **{name: tensor})
    assert self.refused(path) == (
      f'DIR: 1 tensors do not fit config.json:\n  {problem}'
    )

  def test_all_problems_are_told_at_once(self, path):
    (path / 'config.json').write_text(
      json.dumps({**support.LLAMA, 'intermediate_size': 40})
    )
    assert self.refused(path).startswith(
      'DIR: 6 tensors do not fit config.json:\n  '
      'model.layers.0.mlp.down_proj.weight has shape (32, 48)'
    )

  def test_a_head_that_is_not_there(self, path):
    config = {**support.LLAMA, 'tie_word_embeddings': False}
    (path / 'config.json').write_text(json.dumps(config))
    assert self.refused(path) == (
      'DIR: 1 tensors do not fit config.json:\n  lm_head.weight is missing '
      '(dims DV); tied? Then config.json must say tie_word_embeddings: true'
    )

  def test_experts_are_named(self, path):
    """Each tensor of each expert that is missing, by its own name."""
    config = {**support.LLAMA, 'model_type': 'mixtral', 'num_local_experts': 3}
    (path / 'config.json').write_text(json.dumps(config))
    found = self.refused(path).splitlines()
    for layer in range(2):
      name = f'model.layers.{layer}.block_sparse_moe.experts.2.w1.weight'
      assert f'  {name} is missing (dims LEDI)' in found

  def test_a_tied_head_that_differs(self, path):
    embed = tensors_of(path)['model.embed_tokens.weight']
    self.change(path, **{'lm_head.weight': embed})
    hub.load(path, hub.declare(path))
    self.change(path, **{'lm_head.weight': embed + 1})
    assert self.refused(path) == (
      'DIR: config.json ties the head to the embedding, and lm_head.weight '
      'differs from model.embed_tokens.weight.'
    )

  def test_buffers_of_old_exporters_are_passed_over(self, path):
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    self.change(path, **{name: np.zeros(4, np.float32)})
    hub.load(path, hub.declare(path))

  @pytest.mark.parametrize(
    'changes, message',
    [
      (
        dict(model_type='gpt2'),
        "config.json: model_type: 'gpt2' is not supported; supported: "
        f'{", ".join(families.known())}.',
      ),
      (
        dict(model_type=None),
        'config.json: model_type: None is not supported; supported: '
        f'{", ".join(families.known())}.',
      ),
      (
        dict(model_type='evil', auto_map={'AutoModel': 'evil.Model'}),
        "config.json: model_type: 'evil' is not supported; supported: "
        f'{", ".join(families.known())}. The code that its auto_map names is '
        'not run.',
      ),
      (
        dict(rope_parameters={'rope_type': 'axial'}),
        "config.json: rope type 'axial' is not supported; supported: "
        f'{", ".join(rope.KINDS)}.',
      ),
      (
        dict(rope_parameters=None, rope_scaling={'type': 'xpos', 'factor': 2}),
        "config.json: rope type 'xpos' is not supported; supported: "
        f'{", ".join(rope.KINDS)}.',
      ),
      (
        dict(hidden_act='gelu'),
        "config.json: hidden_act: 'gelu'; this family knows 'silu'.",
      ),
      (
        dict(rope_theta=500000.0),
        'config.json: rope_theta is 500000.0 and rope_parameters.rope_theta is '
        '10000.0; they must agree.',
      ),
      (
        dict(rope_scaling={'rope_type': 'linear', 'factor': 2.0}),
        "config.json: rope_scaling is {'rope_type': 'linear', 'factor': 2.0} "
        "and rope_parameters is {'rope_type': 'default', 'rope_theta': "
        '10000.0}; they must agree.',
      ),
      (
        dict(rms_norm_eps=None, hidden_size=None),
        'config.json: hidden_size, rms_norm_eps missing.',
      ),
    ],
  )
  def test_configs(self, path, changes, message):
    config = {**support.LLAMA, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (path / 'config.json').write_text(json.dumps(config))
    assert self.refused(path) == message

  @pytest.mark.parametrize(
    'text, message',
    [
      (None, 'DIR/config.json is missing: DIR is not a model directory.'),
      (
        '<html>',
        'DIR/config.json is not JSON: it is an HTML page, as a failed download '
        'leaves; fetch it again',
      ),
      (
        LFS,
        'DIR/config.json is not JSON: it is a pointer of Git LFS, and the file '
        'itself was not fetched; run `git lfs pull` there',
      ),
      (
        '{',
        'DIR/config.json is not JSON: Expecting property name enclosed in '
        'double quotes: line 1 column 2 (char 1)',
      ),
      ('[]', 'DIR/config.json is not a JSON object.'),
    ],
  )
  def test_no_config(self, path, text, message):
    (path / 'config.json').unlink()
    if text is not None:
      (path / 'config.json').write_text(text)
    assert self.refused(path) == message

  @pytest.mark.parametrize(
    'file, problem',
    [
      (
        '../other.safetensors',
        "'../other.safetensors' is not a plain file name.",
      ),
      ('/etc/passwd', "'/etc/passwd' is not a plain file name."),
      (7, '7 is not a plain file name.'),
      ('absent.safetensors', 'absent.safetensors is not in DIR.'),
      ('..', '.. is not in DIR.'),
    ],
  )
  def test_index(self, path, file, problem):
    index = {'weight_map': {'model.norm.weight': file}}
    file = path / 'model.safetensors.index.json'
    file.write_text(json.dumps(index))
    assert self.refused(path) == (
      f'DIR/model.safetensors.index.json: model.norm.weight: {problem}'
    )

  @pytest.mark.parametrize(
    'text, message',
    [
      (
        '<!DOCTYPE html>',
        'is not JSON: it is an HTML page, as a failed download leaves; fetch '
        'it again',
      ),
      ('{}', 'has no weight_map.'),
      ('{"weight_map": []}', 'has no weight_map.'),
      ('[1]', 'is not a JSON object.'),
    ],
  )
  def test_broken_index(self, path, text, message):
    (path / 'model.safetensors.index.json').write_text(text)
    assert self.refused(path) == f'DIR/model.safetensors.index.json {message}'

  def test_an_index_that_names_the_wrong_file(self, path):
    held = tensors_of(path)
    norm = {'model.norm.weight': held.pop('model.norm.weight')}
    safetensors.numpy.save_file(norm, path / 'b.safetensors')
    safetensors.numpy.save_file(held, path / 'a.safetensors')
    names = {**held, **norm}
    index = {'weight_map': dict.fromkeys(names, 'a.safetensors')}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert self.refused(path) == (
      'DIR/a.safetensors: model.norm.weight is not in it, and the index says '
      'so.'
    )

  def test_a_resized_vocabulary(self, path):
    embed = tensors_of(path)['model.embed_tokens.weight']
    longer = np.concatenate([embed, embed[:64]])
    self.change(path, **{'model.embed_tokens.weight': longer})
    assert self.refused(path) == (
      'DIR: 1 tensors do not fit config.json:\n  model.embed_tokens.weight has '
      'shape (384, 32); config.json implies (320, 32) = VD; is the vocabulary '
      'resized? Then config.json must say vocab_size: 384'
    )

  def test_an_adapter(self, path):
    (path / 'config.json').unlink()
    (path / 'adapter_config.json').write_text('{}')
    assert self.refused(path) == (
      'DIR is an adapter of `peft`, not a model: config.model.path takes the '
      'base that it was trained on; then go on from it with config.adapt = '
      "dict(name='peft', path='DIR')."
    )

  @pytest.mark.parametrize(
    'said, name',
    [
      (dict(quant_method='gptq', bits=4), "'gptq'"),
      (dict(quant_method='awq'), "'awq'"),
      (dict(quant_method='fp8'), "'fp8'"),
      (dict(quant_method='bitsandbytes'), "'bitsandbytes'"),
      (dict(load_in_8bit=True), "{'load_in_8bit': True}"),
      ('int4', "'int4'"),
    ],
  )
  def test_quantised(self, path, said, name):
    config = {**support.LLAMA, 'quantization_config': said}
    (path / 'config.json').write_text(json.dumps(config))
    assert self.refused(path).startswith(
      f'DIR/config.json: quantization_config: {name}: weights that are already '
      'quantised are not read'
    )

  def test_only_pickles(self, path):
    (path / 'model.safetensors').rename(path / 'pytorch_model.bin')
    assert self.refused(path) == (
      'DIR holds neither model.safetensors nor an index; only safetensors are '
      'read.'
    )

  @pytest.mark.parametrize('kept', [-100, 100, 4, 0])
  def test_truncated(self, path, kept):
    """In the data, in the header, in the header's length, to nothing."""
    file = path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:kept])
    assert self.refused(path).startswith(
      'DIR/model.safetensors: not a readable safetensors file: '
    )

  def test_an_lfs_pointer(self, path):
    (path / 'model.safetensors').write_text(LFS)
    assert self.refused(path) == (
      'DIR/model.safetensors: not a readable safetensors file: it is a pointer '
      'of Git LFS, and the file itself was not fetched; run `git lfs pull` '
      'there'
    )


def test_directory_is_neither_a_path_nor_an_id(tmp_path):
  missing = str(tmp_path / 'no' / 'model')
  with pytest.raises(ValueError) as error:
    hub.directory(missing)
  assert str(error.value) == (
    f'config.model.path: {missing} is not a directory, and {missing!r} is not '
    'a hub id like "org/name".'
  )
  assert hub.directory(str(tmp_path)) == tmp_path


def test_the_hash_follows_the_bytes(tiny_dir, tmp_path):
  """One flipped bit of a weight changes it; other files do not."""
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(tiny_dir / name, tmp_path)
  assert hub.weights_hash(tmp_path) == hub.weights_hash(tiny_dir)
  file = tmp_path / 'model.safetensors'
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  assert hub.weights_hash(tmp_path) != hub.weights_hash(tiny_dir)


class TestHash:
  """What is hashed once is found again, for as long as the file is the same."""

  @pytest.fixture
  def path(self, tiny_dir, tmp_path):
    path = tmp_path / 'model'
    path.mkdir()
    shutil.copy(tiny_dir / 'model.safetensors', path)
    os.utime(path / 'model.safetensors', (1e9, 1e9))
    hub._digest.cache_clear()
    return path

  @pytest.fixture
  def hashed(self, monkeypatch):
    """The files that were read to be hashed."""
    found, own = [], hub._digest

    def digest(file, *version):
      found.append(file.name)
      own.cache_clear()
      return own(file, *version)

    monkeypatch.setattr(hub, '_digest', digest)
    return found

  def test_it_is_kept(self, path, hashed, tmp_path):
    cache_dir = tmp_path / 'cache' / 'weights'
    expected = hub.weights_hash(path)
    for times in (2, 2, 2):
      assert hub.weights_hash(path, cache_dir) == expected
      assert hashed == ['model.safetensors'] * times
    assert len(list(cache_dir.iterdir())) == 1

  def test_not_for_another_file(self, path, hashed, tmp_path):
    first = hub.weights_hash(path, tmp_path / 'cache')
    file = path / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, (1e9, 1e9))  # The same size and time; ctime differs.
    assert hub.weights_hash(path, tmp_path / 'cache') != first
    assert len(hashed) == 2

  def test_not_of_a_file_in_motion(self, path, tmp_path):
    os.utime(path / 'model.safetensors')
    hub.weights_hash(path, tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()

  def test_a_damaged_entry_is_not_believed(self, path, tmp_path):
    expected = hub.weights_hash(path, tmp_path / 'cache')
    (entry,) = (tmp_path / 'cache').iterdir()
    entry.write_text('half')
    assert hub.weights_hash(path, tmp_path / 'cache') == expected

  def test_a_cache_that_cannot_be_written_is_none(self, path, tmp_path):
    (tmp_path / 'cache').write_text('a file')
    assert hub.weights_hash(path, tmp_path / 'cache') == hub.weights_hash(path)


class TestIdentity:
  def test_of_a_snapshot(self, tiny_dir, tmp_path):
    place = tmp_path / 'models--org--name' / 'snapshots' / 'abc123'
    place.mkdir(parents=True)
    shutil.copy(tiny_dir / 'model.safetensors', place)
    found = hub.identity(place, 'org/name')
    expected = hub.weights_hash(tiny_dir)
    assert found == dict(path='org/name', revision='abc123', weights=expected)
    local = hub.identity(tiny_dir, 'there')
    assert local == dict(path='there', revision=None, weights=expected)
    hub.check_identity(found, local, 'run')

  def test_another_base_is_told_by_all_its_names(self):
    then = dict(path='org/name', revision='abc', weights='0' * 64)
    now = dict(path='/models/other', revision=None, weights='1' * 64)
    with pytest.raises(ValueError) as error:
      hub.check_identity(then, now, '/runs/mine/run.json')
    assert str(error.value) == (
      '/runs/mine/run.json: another base.\n'
      '  it was made from org/name at revision abc, weights sha256 '
      f'{"0" * 64}\n'
      '  here is          /models/other at revision None, weights sha256 '
      f'{"1" * 64}\n'
      'Set config.model.path and config.model.revision to the former.'
    )


def test_values_are_on_the_first_device_by_default(tiny_dir):
  values = hub.load(tiny_dir, hub.declare(tiny_dir))
  assert {d for x in values.values() for d in x.devices()} == {jax.devices()[0]}
