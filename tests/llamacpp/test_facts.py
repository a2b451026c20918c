"""What a file must hold, by others: a change that is wrong both ways shows."""

import json

import gguf
import numpy as np
import pytest
import transformers

from tuner.llamacpp import architectures, write
from tuner.llamacpp import config as config_lib
from tuner.llamacpp import rope as rope_lib

# What transformers' reader of GGUF knows, and can make a model of.
READ_BY_OTHERS = (
  *('llama', 'llama_untied', 'llama_3', 'mistral', 'qwen2', 'qwen2_moe'),
  *('qwen3', 'qwen3_moe', 'gemma2', 'gemma3_text', 'phi3'),
)


def stored(file):
  """{name: array} of a float32 file."""
  return {t.name: np.asarray(t.data) for t in gguf.GGUFReader(file).tensors}


@pytest.mark.parity
@pytest.mark.parametrize('case', READ_BY_OTHERS)
def test_transformers_own_reader_finds_the_same_model(case, make, tmp_path):
  import torch

  torch.set_num_threads(1)
  folder, _ = make(case)
  write.write(folder, tmp_path / 'gguf' / 'a.gguf', 'f32')
  tokens = torch.tensor(np.random.default_rng(0).integers(3, 250, (2, 24)))
  auto = transformers.AutoModelForCausalLM
  config = transformers.AutoConfig.from_pretrained(folder)
  if case == 'mistral':  # It is called llama in a file, and read as one.
    config = None
  ours = auto.from_pretrained(folder)
  theirs = auto.from_pretrained(
    tmp_path / 'gguf', gguf_file='a.gguf', config=config
  )
  with torch.no_grad():
    expected, found = (m(tokens).logits.numpy() for m in (ours, theirs))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('case', ['gemma2', 'gemma3_text'])
def test_gemmas_norms_are_stored_plus_one(case, make, tmp_path):
  folder, weights = make(case)
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  found = stored(tmp_path / 'a.gguf')
  names = {
    'output_norm.weight': 'model.norm.weight',
    'blk.1.attn_norm.weight': 'model.layers.1.input_layernorm.weight',
    'blk.0.post_ffw_norm.weight': (
      'model.layers.0.post_feedforward_layernorm.weight'
    ),
  }
  if case == 'gemma3_text':
    names['blk.0.attn_q_norm.weight'] = 'model.layers.0.self_attn.q_norm.weight'
  for name, hf in names.items():
    np.testing.assert_array_equal(found[name], weights[hf] + 1, err_msg=name)


def test_gates_of_gpt_oss_are_the_even_columns(make, tmp_path):
  """ffn_gate_exps[e, i] is column 2 i of gate_up_proj[e], up's the next."""
  folder, weights = make('gpt_oss')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  found = stored(tmp_path / 'a.gguf')
  name = 'model.layers.1.mlp.experts.{}'.format
  both, bias = weights[name('gate_up_proj')], weights[name('gate_up_proj_bias')]
  down = weights[name('down_proj')]
  for odd, half in enumerate(('gate', 'up')):
    own = found[f'blk.1.ffn_{half}_exps.weight']
    own_bias = found[f'blk.1.ffn_{half}_exps.bias']
    for e in range(len(both)):
      for i in range(both.shape[-1] // 2):
        np.testing.assert_array_equal(own[e, i], both[e, :, 2 * i + odd])
        assert own_bias[e, i] == bias[e, 2 * i + odd]
  for e in range(len(down)):
    np.testing.assert_array_equal(
      found['blk.1.ffn_down_exps.weight'][e], down[e].T
    )
  sinks = weights['model.layers.1.self_attn.sinks']
  np.testing.assert_array_equal(found['blk.1.attn_sinks.weight'], sinks)


def test_experts_of_mixtral_by_their_numbers(make, tmp_path):
  """w1 is the gate, w3 goes up and w2 down; its router scores float32."""
  folder, weights = make('mixtral')
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  found = stored(tmp_path / 'a.gguf')
  name = 'model.layers.1.block_sparse_moe.{}.weight'.format
  for number, part in ((1, 'gate'), (3, 'up'), (2, 'down')):
    for e, own in enumerate(found[f'blk.1.ffn_{part}_exps.weight']):
      np.testing.assert_array_equal(
        own, weights[name(f'experts.{e}.w{number}')]
      )
  router = found['blk.1.ffn_gate_inp.weight']
  np.testing.assert_array_equal(router, weights[name('gate')])


@pytest.mark.parametrize(
  'case', ['granite', 'mixtral', 'smollm3', 'olmo2', 'gpt_oss']
)
def test_rows_of_queries_and_keys(case, make, tmp_path):
  """Row 2 i + j of a head is row i + j H / 2 where neighbours turn."""
  folder, weights = make(case)
  write.write(folder, tmp_path / 'a.gguf', 'f32')
  found = stored(tmp_path / 'a.gguf')
  for letter, heads in (('q', 4), ('k', 2)):
    hf = weights[f'model.layers.1.self_attn.{letter}_proj.weight']
    own = found[f'blk.1.attn_{letter}.weight']
    size = len(hf) // heads
    for row in range(len(hf)):
      head, at = divmod(row, size)
      pair, half = divmod(at, 2)
      if case in ('granite', 'smollm3', 'mixtral'):
        at = pair + half * size // 2
      np.testing.assert_array_equal(own[row], hf[head * size + at])


REQUIRED = dict(
  num_hidden_layers=4,
  hidden_size=1024,
  num_attention_heads=32,
  intermediate_size=64,
  vocab_size=320,
  rms_norm_eps=1e-5,
  max_position_embeddings=4096,
)
# What transformers takes for granted, by the metadata's keys.
GRANTED = {
  'llama': {'attention.head_count_kv': 32, 'rope.freq_base': 1e4},
  'mistral': {'attention.head_count_kv': 8, 'rope.freq_base': 1e4},
  'mixtral': {
    'attention.head_count_kv': 8,
    'expert_count': 8,
    'expert_used_count': 2,
    'rope.freq_base': 1e6,
  },
  'qwen2': {'attention.head_count_kv': 32},
  'qwen2_moe': {
    'attention.head_count_kv': 16,
    'expert_count': 60,
    'expert_used_count': 4,
    'expert_feed_forward_length': 1408,
    'expert_shared_feed_forward_length': 5632,
  },
  'qwen3': {'attention.key_length': 128, 'attention.head_count_kv': 32},
  'qwen3_moe': {
    'attention.head_count_kv': 4,
    'expert_count': 128,
    'expert_used_count': 8,
    'expert_feed_forward_length': 768,
  },
  'gemma2': {
    'attention.head_count_kv': 4,
    'attention.key_length': 256,
    'attention.sliding_window': 4096,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3_text': {
    'attention.head_count_kv': 4,
    'attention.key_length': 256,
    'attention.sliding_window': 4096,
    'rope.freq_base': 1e6,
    'rope.freq_base_swa': 1e4,
  },
  'phi3': {
    'attention.head_count_kv': 32,
    'rope.scaling.original_context_length': 4096,
  },
  'olmo2': {'attention.head_count_kv': 32, 'rope.freq_base': 1e4},
  'granite': {
    'attention.scale': 1.0,
    'embedding_scale': 1.0,
    'residual_scale': 1.0,
    'logit_scale': 1.0,
  },
  'smollm3': {'attention.head_count_kv': 4, 'rope.freq_base': 2e6},
  'gpt_oss': {
    'attention.head_count_kv': 8,
    'attention.key_length': 64,
    'attention.sliding_window': 128,
    'expert_count': 128,
    'expert_used_count': 4,
    'rope.freq_base': 150000.0,
    'rope.scaling.type': 'yarn',
    'rope.scaling.factor': 32.0,
    'rope.scaling.original_context_length': 4096,
    'rope.scaling.yarn_beta_fast': 32.0,
    'rope.scaling.yarn_beta_slow': 1.0,
  },
}


@pytest.mark.parametrize('model_type', GRANTED)
def test_what_a_config_leaves_out_is_said(model_type):
  """As transformers fills it in, and as the model's declaration has it."""
  raw = {'model_type': model_type, **REQUIRED}
  if model_type == 'qwen3_moe':
    raw['norm_topk_prob'] = True  # llama.cpp knows no other.
  architecture = architectures.by_model_type(model_type)
  config, model = config_lib.normal(architecture, raw)
  meta = config_lib.to_metadata(architecture, config)
  meta |= rope_lib.to_metadata(architecture, config, model.ropes)
  wanted = {
    **GRANTED[model_type],
    'attention.head_count_kv': model.K,
    'rope.freq_base': model.ropes[0].theta,
    'rope.dimension_count': model.ropes[0].size,
  }
  assert GRANTED[model_type].items() <= wanted.items()
  assert wanted.items() <= meta.items()
  theirs = transformers.AutoConfig.for_model(**raw)
  assert meta['attention.head_count_kv'] == theirs.num_key_value_heads


def test_a_window_that_is_taken_for_granted_is_seen():
  raw = {'model_type': 'mistral', **REQUIRED, 'max_position_embeddings': 32768}
  with pytest.raises(ValueError, match='sliding_window: 4096; llama.cpp'):
    config_lib.normal(architectures.by_model_type('mistral'), raw)


def test_a_base_is_checked_without_its_weights(make):
  folder, _ = make('gpt_oss')
  (folder / 'model.safetensors').unlink()
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {'quantization_config': {'a': 1}}))
  write.check(folder)
  path.write_text(json.dumps(config | {'swiglu_limit': 5.0}))
  with pytest.raises(ValueError, match='swiglu_limit: 5.0') as error:
    write.check(folder)
  assert str(folder) in str(error.value)
  path.write_text(json.dumps(config))
  (folder / 'tokenizer.json').write_text('{"model": {"type": "WordPiece"}}')
  with pytest.raises(ValueError, match="model.type: 'WordPiece'"):
    write.check(folder)
