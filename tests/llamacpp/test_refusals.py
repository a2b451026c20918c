"""What is broken or not known is refused by name, and leaves nothing behind."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

from tuner.llamacpp import library, read, write


def change_config(folder, **changed):
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def change_weights(folder, remove=(), **added):
  path = folder / 'model.safetensors'
  weights = safetensors.numpy.load_file(path)
  for name in remove:
    del weights[name]
  safetensors.numpy.save_file({**weights, **added}, path)


@pytest.fixture
def whole(make, tmp_path):
  folder, _ = make('llama')
  write.write(folder, tmp_path / 'whole.gguf', 'f32')
  return tmp_path / 'whole.gguf'


def refuse(path, match):
  before = {p.name for p in path.parent.iterdir()}
  with pytest.raises(ValueError, match=match) as error:
    read.convert(path, path.parent / 'out')
  assert str(path) in str(error.value)
  assert {p.name for p in path.parent.iterdir()} == before


@pytest.mark.parametrize('share', [0.0, 0.0001, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_cut_file(whole, share):
  data = whole.read_bytes()
  whole.write_bytes(data[: int(len(data) * share)])
  seen = rf'cut off or damaged: it has {int(len(data) * share):,} bytes; wanted'
  refuse(whole, f'not a GGUF file: |{seen}: at least [0-9,]+')


def test_an_index_names_plain_files(make):
  folder, _ = make('llama')
  (folder / 'model.safetensors').rename(folder.parent / 'x.safetensors')
  index = {'weight_map': {'model.norm.weight': '../x.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  refuse_folder(folder, 'is not a plain file name')


def test_a_file_that_is_no_gguf(whole):
  whole.write_bytes(b'PK\x03\x04' + bytes(100))
  refuse(whole, r"not a GGUF file: it begins with b'PK")
  whole.unlink()
  refuse(whole, 'no such file')


def rewritten(path, tensors=None, skip=(), rename=None, **changed):
  """The file again, with other metadata; tensors(name, array) -> array."""
  reader = gguf.GGUFReader(path)
  name = changed.pop(
    'general.architecture', reader.fields['general.architecture'].contents()
  )
  out = path.with_name('changed.gguf')
  writer = gguf.GGUFWriter(out, name)
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key in ('general.architecture', *skip):
      continue
    kind, inner = field.types[0], field.types[-1]
    value = changed.pop(key, field.contents())
    is_array = kind == gguf.GGUFValueType.ARRAY
    writer.add_key_value(key, value, kind, inner if is_array else None)
  for key, value in changed.items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  for tensor in reader.tensors:
    array = np.asarray(tensor.data)
    array = tensors(tensor.name, array) if tensors else array
    if array is not None:
      own = (rename or {}).get(tensor.name, tensor.name)
      writer.add_tensor(own, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  path.unlink()
  return out


@pytest.mark.parametrize(
  ('changed', 'match'),
  [
    (
      {'general.architecture': 'rwkv7'},
      "'rwkv7' is not known; known are llama",
    ),
    ({'general.type': 'adapter'}, "general.type is 'adapter'"),
    ({'split.count': 2}, 'one of 2 parts'),
    ({'llama.attention.max_alibi_bias': 8.0}, 'not known: .*max_alibi_bias'),
    ({'llama.rope.scaling.type': 'longrope'}, "'longrope' is not known"),
    ({'llama.rope.dimension_count': 4}, 'rope.dimension_count is 4'),
    ({'llama.attention.value_length': 4}, 'value_length is 4, another key'),
    ({'llama.attention.causal': False}, 'not a decoder'),
    ({'tokenizer.ggml.pre': 'x'}, "pre-tokenizer 'x' is not known"),
    ({'tokenizer.ggml.model': 'bert'}, "model 'bert' is not known"),
    ({'tokenizer.ggml.precompiled_charsmap': 'x'}, 'precompiled_charsmap'),
    ({'tokenizer.chat_template.a/b': 'x'}, 'not the name of a file'),
    ({'tokenizer.ggml.merges': ['ab']}, "'ab' is not two tokens"),
    ({'llama.expert_count': 4}, 'tensors missing'),
  ],
)
def test_metadata_that_is_not_known(whole, changed, match):
  refuse(rewritten(whole, **changed), match)


@pytest.mark.parametrize(
  'key',
  [
    'llama.block_count',
    'llama.embedding_length',
    'llama.context_length',
    'llama.attention.layer_norm_rms_epsilon',
    'tokenizer.ggml.model',
    'tokenizer.ggml.pre',
    'tokenizer.ggml.tokens',
    'tokenizer.ggml.token_type',
    'tokenizer.ggml.merges',
    'tokenizer.ggml.eos_token_id',
  ],
)
def test_metadata_that_is_missing(whole, key):
  name = 'pre' if key.endswith('.pre') else key.partition('.')[2]
  refuse(rewritten(whole, skip=[key]), name)


def test_tensors_that_are_missing_or_not_known(whole):
  gone = 'blk.1.ffn_up.weight'
  path = rewritten(
    whole,
    lambda name, array: None if name == gone else array,
    rename={'blk.0.attn_q.weight': 'blk.0.attn_x.weight'},
  )
  refuse(
    path,
    r'missing: blk\.0\.attn_q\.weight, blk\.1\.ffn_up\.weight; not known: '
    r'blk\.0\.attn_x\.weight',
  )


def test_tokens_and_embedding_of_other_sizes(whole):
  path = rewritten(
    whole, lambda name, a: a[:300] if name == 'token_embd.weight' else a
  )
  refuse(path, '320 tokens.*300 rows')


def test_divisors_of_another_rope(make, tmp_path):
  folder, _ = make('llama_3')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  path = rewritten(
    tmp_path / 'a.gguf',
    lambda name, a: (
      np.linspace(1, 8, len(a)).astype(np.float32)
      if name == 'rope_freqs.weight'
      else a
    ),
  )
  refuse(path, 'rope_freqs.weight holds divisors')


def test_an_interrupted_conversion_leaves_nothing(whole, monkeypatch):
  monkeypatch.setattr(library.load().quants, 'dequantize', lambda *_: 1 / 0)
  before = {p.name for p in whole.parent.iterdir()}
  with pytest.raises(ZeroDivisionError):
    read.convert(whole, whole.parent / 'out')
  assert {p.name for p in whole.parent.iterdir()} == before


def test_what_is_there_is_not_overwritten(make, whole):
  (whole.parent / 'out').mkdir()
  with pytest.raises(FileExistsError):
    read.convert(whole, whole.parent / 'out')
  folder, _ = make('llama')
  with pytest.raises(FileExistsError):
    write.write(folder, whole)


# Directories.


@pytest.mark.parametrize(
  ('case', 'changed', 'match'),
  [
    ('llama', {'model_type': 'gpt_bigcode'}, "'gpt_bigcode' cannot.*qwen3_moe"),
    (
      'llama',
      {'hidden_act': 'gelu'},
      "hidden_act: 'gelu'; llama.cpp has 'silu",
    ),
    ('llama', {'sliding_window': 64}, 'sliding_window: 64.*not read it'),
    ('mistral', {'sliding_window': 64}, 'sliding_window: 64.*attends to eve'),
    ('llama', {'quantization_config': {'bits': 4}}, 'dequantised first'),
    (
      'llama',
      {'max_position_embeddings': None},
      'max_position_embeddings miss',
    ),
    ('llama', {'vocab_size': 319}, 'vocab_size: 319; the embedding has 320'),
    ('llama', {'tie_word_embeddings': False}, 'missing: lm_head.weight'),
    ('llama', {'attention_bias': True}, 'missing: .*q_proj.bias'),
    ('llama', {'num_hidden_layers': 3}, r'layers\.2\.'),
    ('llama', {'num_hidden_layers': 1}, r'not known: model\.layers\.1'),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}},
      "'dynamic'; GGUF can hold default, linear",
    ),
    (
      'llama',
      {
        'rope_parameters': {'rope_type': 'yarn', 'factor': 2, 'mscale': 1.5}
        | {'mscale_all_dim': 1}
      },
      'yarn with attention_factor: 1.03',
    ),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}},
      'must agree',
    ),
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window: True'),
    ('qwen3_moe', {'norm_topk_prob': False}, 'norm_topk_prob: False'),
    ('qwen3_moe', {'decoder_sparse_step': 2}, 'decoder_sparse_step: 2'),
    ('gemma2', {'query_pre_attn_scalar': 224}, 'query_pre_attn_scalar: 224'),
    (
      'gemma3_text',
      {'layer_types': ['full_attention'] * 7},
      'layer_types: .*built in for gemma3',
    ),
    ('granite', {'head_dim': 16}, 'head_dim: 16; granite has'),
    ('smollm3', {'no_rope_layers': [1] * 5}, 'no_rope_layers'),
    ('gpt_oss', {'swiglu_limit': 5.0}, 'swiglu_limit: 5.0'),
  ],
)
def test_configs_that_llama_cpp_would_read_otherwise(
  case, changed, match, make, tmp_path
):
  folder, _ = make(case)
  change_config(folder, **changed)
  refuse_folder(folder, match)


def refuse_folder(folder, match, dtype='f32'):
  before = {p.name for p in folder.parent.iterdir()}
  with pytest.raises(ValueError, match=match) as error:
    write.write(folder, folder.parent / 'a.gguf', dtype)
  assert str(folder) in str(error.value)
  assert {p.name for p in folder.parent.iterdir()} == before


@pytest.mark.parametrize(
  'file', ['config.json', 'model.safetensors', 'tokenizer.json']
)
def test_files_that_are_missing_or_broken(file, make):
  folder, _ = make('llama')
  data = (folder / file).read_bytes()
  (folder / file).write_bytes(data[: len(data) // 2])
  refuse_folder(folder, f'{file}: not')
  (folder / file).unlink()
  refuse_folder(folder, f'{file} is missing|neither {file} nor')


def test_tensors_of_a_directory(make):
  folder, _ = make('llama')
  change_weights(
    folder,
    ['model.norm.weight'],
    **{'model.layers.0.extra.weight': np.zeros(3, np.float32)},
  )
  refuse_folder(
    folder, r'missing: model\.norm\.weight; not known: model\.layers\.0\.extra'
  )


def test_a_tensor_of_another_shape(make):
  folder, _ = make('llama')
  name = 'model.layers.1.mlp.up_proj.weight'
  change_weights(folder, **{name: np.zeros((60, 32), np.float32)})
  refuse_folder(folder, rf'{name} has shape \(60, 32\); .* implies \(64, 32\)')


def test_a_tied_head_must_be_the_embedding(make, tmp_path):
  folder, weights = make('llama')
  head = {'lm_head.weight': weights['model.embed_tokens.weight']}
  change_weights(folder, **head)
  write.write(folder, tmp_path / 'same.gguf', 'f32')
  change_weights(folder, **{'lm_head.weight': head['lm_head.weight'] + 1})
  refuse_folder(folder, r'not known: lm_head\.weight')


@pytest.mark.parametrize('dtype', ['f16', 'q8_0'])
def test_numbers_too_large_for_a_type(dtype, make):
  folder, weights = make('llama')
  name = 'model.layers.0.mlp.up_proj.weight'
  huge = weights[name].copy()
  huge[3, 4] = 1e6 if dtype == 'f16' else np.inf
  change_weights(folder, **{name: huge})
  with pytest.raises(ValueError, match=f'{name}(: the value 1e.06| holds)'):
    write.write(folder, folder.parent / 'a.gguf', dtype)
  assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_dtypes_are_named(make, whole):
  folder, _ = make('llama')
  with pytest.raises(
    ValueError, match="'q4_0': known are f32, f16, bf16, q8_0"
  ):
    write.write(folder, whole.parent / 'b.gguf', 'q4_0')
  with pytest.raises(ValueError, match="'f16': known are auto, float32"):
    read.convert(whole, whole.parent / 'b', 'f16')


def test_without_the_package_its_extra_is_named(monkeypatch, whole):
  monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
  with pytest.raises(RuntimeError, match=r"pip install 'tuner\[gguf\]'"):
    read.convert(whole, whole.parent / 'out')
