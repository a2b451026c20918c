"""A directory, a GGUF file of it, a directory again: nothing has changed.

And between the two, what llama.cpp wants: names, types, permuted rows.
"""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from tuner.llamacpp import architectures, changes, read, write
from tuner.models import families

CASES = sorted(
  json.loads(
    (
      __import__('pathlib').Path(__file__).parent / 'golden/models.json'
    ).read_text()
  )
)
# Of no consequence for what a model computes, or said in another place.
UNSAID = (
  'architectures dtype torch_dtype transformers_version pretraining_tp '
  'rope_theta rope_scaling rope_local_base_freq attention_dropout '
  'initializer_range use_cache _sliding_window_pattern _name_or_path '
  'output_router_logits router_aux_loss_coef router_jitter_noise '
  'max_window_layers embd_pdrop resid_pdrop sliding_window_pattern '
  'rope_parameters partial_rotary_factor'
).split()


def load(folder):
  weights = {}
  for file in sorted(folder.glob('*.safetensors')):
    weights |= safetensors.numpy.load_file(file)
  return weights


def assert_equal(found, wanted):
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def declared(folder):
  """The model that a directory's config.json declares."""
  config = json.loads((folder / 'config.json').read_text())
  return families.decoder_of(config).config


@pytest.mark.parametrize('case', CASES)
def test_back_and_forth_is_the_identity(case, make, tmp_path):
  folder, weights = make(case)
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  assert_equal(load(tmp_path / 'back'), weights)


@pytest.mark.parametrize('case', CASES)
def test_forth_and_back_is_the_identity_byte_for_byte(case, make, tmp_path):
  folder, _ = make(case)
  write.write(folder, tmp_path / 'a.gguf', 'f32', name='x')
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  write.write(tmp_path / 'back', tmp_path / 'b.gguf', 'f32', name='x')
  assert (tmp_path / 'a.gguf').read_bytes() == (
    tmp_path / 'b.gguf'
  ).read_bytes()


@pytest.mark.parametrize('case', CASES)
def test_config_means_the_same(case, make, tmp_path):
  """As transformers reads it, which fills in what a config leaves out."""
  folder, _ = make(case)
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  before, after = (
    transformers.AutoConfig.from_pretrained(d).to_dict()
    for d in (folder, tmp_path / 'back')
  )
  assert declared(folder) == declared(tmp_path / 'back')
  if case == 'mistral':  # llama.cpp calls it llama, which computes the same.
    before |= {'model_type': 'llama', 'attention_bias': False}
    before |= {'mlp_bias': False}
  own = before['hidden_size'] // before['num_attention_heads']
  for config in (before, after):
    config['head_dim'] = config.get('head_dim') or own
    if not config.get('use_sliding_window', True):
      config['sliding_window'] = None
  keys = {key for key in (*before, *after) if key not in UNSAID}
  # None, False, 0 and [] are all written for "not so".
  odd = {
    k: (before.get(k), after.get(k))
    for k in keys
    if (before.get(k) or None) != (after.get(k) or None)
  }
  assert not odd


@pytest.mark.parametrize('case', CASES)
def test_names_and_keys_are_those_of_the_library(case, make, tmp_path):
  """The library's own table of an architecture's tensors knows all of them."""
  folder, _ = make(case)
  report = write.write(folder, tmp_path / 'a.gguf', 'f32')
  reader = gguf.GGUFReader(tmp_path / 'a.gguf')
  name = reader.fields['general.architecture'].contents()
  assert name == report['architecture']
  kinds = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
  known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[kinds[name]]}
  for tensor in reader.tensors:
    stem = tensor.name.rsplit('.', 1)[0]
    parts = stem.split('.')
    if parts[0] == 'blk':
      stem = '.'.join(['blk', '{bid}', *parts[2:]])
    assert stem in known, tensor.name


@pytest.mark.parametrize('dtype', ['f16', 'bf16', 'q8_0'])
@pytest.mark.parametrize('case', ['llama_biased', 'qwen2_moe', 'gpt_oss'])
def test_types_are_what_llama_cpp_wants(case, dtype, make, tmp_path):
  folder, _ = make(case)
  report = write.write(folder, tmp_path / 'a.gguf', dtype)
  counted = {}
  for tensor in gguf.GGUFReader(tmp_path / 'a.gguf').tensors:
    kind = tensor.tensor_type.name
    counted[kind] = counted.get(kind, 0) + 1
    is_router = 'ffn_gate_inp' in tensor.name
    if len(tensor.shape) < 2 or tensor.name.endswith('.bias') or is_router:
      assert kind == 'F32', tensor.name
    else:
      assert kind == dtype.upper(), tensor.name
  assert counted == report['types']


def test_rows_that_blocks_do_not_divide_are_float16(make, tmp_path):
  """down_proj's rows have the mlp's width, here 40."""
  folder, weights = make('llama')
  for name in list(weights):
    if 'mlp' in name:
      side = 0 if 'down' not in name else 1
      weights[name] = np.take(weights[name], range(40), axis=side)
  safetensors.numpy.save_file(weights, folder / 'model.safetensors')
  config = json.loads((folder / 'config.json').read_text())
  config['intermediate_size'] = 40
  (folder / 'config.json').write_text(json.dumps(config))
  report = write.write(folder, tmp_path / 'a.gguf', 'q8_0')
  assert report['types']['F16'] == 2
  kinds = {
    t.name: t.tensor_type.name
    for t in gguf.GGUFReader(tmp_path / 'a.gguf').tensors
  }
  assert kinds['blk.0.ffn_down.weight'] == 'F16'
  assert kinds['blk.0.ffn_up.weight'] == 'Q8_0'


@pytest.mark.parametrize('dtype', ['f16', 'bf16'])
def test_half_precision_is_kept(dtype, make, tmp_path):
  kind = {'f16': np.float16, 'bf16': ml_dtypes.bfloat16}[dtype]
  folder, weights = make('llama', kind)
  write.write(folder, tmp_path / 'a.gguf', dtype)
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  found = load(tmp_path / 'back')
  for name, array in weights.items():
    own = np.float32 if 'norm' in name else kind
    assert found[name].dtype == own, name
    np.testing.assert_array_equal(
      found[name].astype(np.float32), array.astype(np.float32), err_msg=name
    )
  config = json.loads((tmp_path / 'back/config.json').read_text())
  assert config['dtype'] == config['torch_dtype'] == np.dtype(kind).name


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_dtype_by_choice(dtype, make, tmp_path):
  folder, weights = make('qwen2')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back', dtype)
  kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
  wanted = {name: array.astype(kind) for name, array in weights.items()}
  assert_equal(load(tmp_path / 'back'), wanted)


def test_q8_0_is_within_half_a_step(make, tmp_path):
  """A block of 32 has 255 steps over twice its largest value."""
  folder, weights = make('mixtral')
  write.write(folder, tmp_path / 'a.gguf', 'q8_0')
  read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  for name, found in load(tmp_path / 'back').items():
    array = weights[name]
    if array.ndim < 2 or 'gate.weight' in name:
      np.testing.assert_array_equal(found, array, err_msg=name)
      continue
    blocks = np.abs(array.reshape(-1, 32))
    # Half a step, and the rounding of the step itself to float16.
    bound = blocks.max(-1, keepdims=True) / 127 * (0.5 + 127 * 2**-11)
    error = np.abs(found - array).reshape(-1, 32)
    assert (error <= bound).all(), name
    assert error.max() > 0, name


QUANTISED = [
  kind.name
  for kind in gguf.GGMLQuantizationType
  if kind.name in 'Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K IQ4_NL MXFP4'.split()
]


@pytest.mark.parametrize('kind', QUANTISED)
def test_every_type_is_read_as_the_library_dequantises_it(
  kind, make, tmp_path, monkeypatch
):
  """Random blocks; of the largest, 256 values, and of experts, stacked."""
  kind = gguf.GGMLQuantizationType[kind]
  folder, weights = make('mixtral')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  reader = gguf.GGUFReader(tmp_path / 'a.gguf')
  rng = np.random.default_rng(0)
  _, size = gguf.GGML_QUANT_SIZES[kind]
  block = gguf.GGML_QUANT_SIZES[kind][0]
  made = {}
  writer = copy_of(reader, tmp_path / 'q.gguf')
  for tensor in reader.tensors:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if 'ffn_down_exps' in tensor.name:
      # Finite scales: float16 without the largest exponents.
      shape = (*shape[:-1], 256)
      n_bytes = 256 // block * size
      data = rng.integers(0, 0x3C, (*shape[:-1], n_bytes)).astype(np.uint8)
      made[tensor.name] = gguf.quants.dequantize(data, kind)
      writer.add_tensor(tensor.name, data, raw_dtype=kind)
    else:
      writer.add_tensor(tensor.name, np.asarray(tensor.data))
  finish(writer)
  read.convert(tmp_path / 'q.gguf', tmp_path / 'back')
  found = load(tmp_path / 'back')
  for name, array in made.items():
    layer = name.split('.')[1]
    for expert in range(4):
      own = f'model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight'
      np.testing.assert_array_equal(found[own], array[expert], err_msg=own)
  assert len(made) == 2


def copy_of(reader, path, skip=(), **changed):
  """A writer with the metadata of another file, some of it changed."""
  name = reader.fields['general.architecture'].contents()
  writer = gguf.GGUFWriter(path, name)
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key in ('general.architecture', *skip):
      continue
    kind, inner = field.types[0], field.types[-1]
    value = changed.pop(key, field.contents())
    array = kind == gguf.GGUFValueType.ARRAY
    writer.add_key_value(key, value, kind, inner if array else None)
  for key, value in changed.items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  return writer


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_shards_are_of_a_size_and_indexed(make, tmp_path):
  folder, weights = make('qwen3_moe')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  most = 60_000
  names = read.convert(tmp_path / 'a.gguf', tmp_path / 'back', shard_bytes=most)
  files = [n for n in names if n.endswith('.safetensors')]
  assert len(files) > 2
  index = json.loads(
    (tmp_path / 'back/model.safetensors.index.json').read_text()
  )
  assert index['weight_map'].keys() == weights.keys()
  assert set(index['weight_map'].values()) == set(files)
  held = [load_one(tmp_path / 'back' / f) for f in files]
  assert max(sum(a.nbytes for a in h.values()) for h in held) <= most
  assert_equal(load(tmp_path / 'back'), weights)
  # And shards are read again.
  write.write(
    tmp_path / 'back', tmp_path / 'b.gguf', 'f32', name='hf_qwen3_moe'
  )
  assert (tmp_path / 'a.gguf').read_bytes() == (
    tmp_path / 'b.gguf'
  ).read_bytes()


def load_one(file):
  return safetensors.numpy.load_file(file)


@pytest.mark.parametrize('heads', [1, 3, 9])
def test_permuted_rows_turn_neighbouring_pairs_as_halves(heads):
  """Scores under llama.cpp's rope equal those under Hugging Face's."""
  H, D = 16, 24
  rng = np.random.default_rng(heads)
  x, (q, k) = rng.normal(size=(5, D)), rng.normal(size=(2, heads * H, D))
  neighbours = np.arange(H).reshape(-1, 2).T
  for head in range(heads):
    own = slice(head * H, head * H + H)
    halves = np.arange(H).reshape(2, -1)
    ours = [turned(x @ w[own].T, halves) for w in (q, k)]
    theirs = [
      turned(x @ changes.permute(w, heads)[own].T, neighbours) for w in (q, k)
    ]
    np.testing.assert_allclose(ours[0] @ ours[1].T, theirs[0] @ theirs[1].T)
  back = changes.unpermute(changes.permute(q, heads), heads)
  np.testing.assert_array_equal(back, q)


def turned(x_TH, pairs):
  """Rotates the dims of each pair; pairs: [2, H / 2] indices into H."""
  T, H = x_TH.shape
  angle = np.outer(np.arange(T), 10.0 ** -np.linspace(0, 4, H // 2))
  a, b = x_TH[:, pairs[0]], x_TH[:, pairs[1]]
  out = np.empty_like(x_TH)
  out[:, pairs[0]] = a * np.cos(angle) - b * np.sin(angle)
  out[:, pairs[1]] = a * np.sin(angle) + b * np.cos(angle)
  return out


def test_gemmas_norms_come_back_but_for_what_the_sum_loses():
  norm = np.random.default_rng(0).normal(size=10000).astype(np.float32)
  (stored,) = changes.ONE_MORE.to_gguf(norm, (1, 1))
  back = changes.ONE_MORE.to_hf([stored], (1, 1))
  assert np.abs(back - norm).max() <= 2**-22
  (again,) = changes.ONE_MORE.to_gguf(back, (1, 1))
  np.testing.assert_array_equal(again, stored)
  half = norm.astype(ml_dtypes.bfloat16)
  (stored,) = changes.ONE_MORE.to_gguf(half, (1, 1))
  back = changes.ONE_MORE.to_hf([stored], (1, 1))
  np.testing.assert_array_equal(back, half.astype(np.float32))


def test_permuted_architectures_are_those_whose_rope_pairs_neighbours():
  """llama_model_rope_type of llama.cpp has these under NORM."""
  found = {
    a.name
    for a in architectures.ALL
    if any(r.change in (changes.ROPE_Q, changes.ROPE_K) for r in a.rules)
  }
  assert found == {'llama', 'granite', 'smollm3'}
