"""Tiny models of every architecture, and texts that are hard to tokenise.

`python tests/llamacpp/conftest.py` writes the golden configs and tensor names
anew, as `transformers` saves them, for machines where torch is not installed.
"""

import json
import pathlib
import random
import re
import sys
import tempfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'models.json'
SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
BASE = dict(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=320,
  max_position_embeddings=256,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
SPARSE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
LLAMA3 = dict(
  rope_theta=500000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=32)


def rope(kind, **keys):
  return dict(rope_parameters={'rope_type': kind, 'rope_theta': 500.0, **keys})


CASES = {
  'llama': dict(tie_word_embeddings=True),
  'llama_untied': dict(tie_word_embeddings=False, head_dim=16),
  'llama_biased': dict(attention_bias=True, mlp_bias=True),
  'llama_3': rope('llama3', **LLAMA3)
  | dict(head_dim=64, max_position_embeddings=131072),
  'llama_linear': rope('linear', factor=3.0),
  'llama_yarn': rope('yarn', factor=4.0, original_max_position_embeddings=64)
  | dict(head_dim=16),
  'mistral': dict(sliding_window=None, head_dim=16),
  'mixtral': dict(num_local_experts=4, num_experts_per_tok=2),
  'qwen2': dict(tie_word_embeddings=True),
  'qwen2_moe': SPARSE | dict(num_experts=4, shared_expert_intermediate_size=96),
  'qwen3': dict(head_dim=16),
  'qwen3_moe': SPARSE | dict(num_experts=4, head_dim=16, norm_topk_prob=True),
  'gemma2': GEMMA,
  'gemma3_text': GEMMA
  | dict(
    num_hidden_layers=7,
    rope_parameters={
      'full_attention': {
        'rope_type': 'linear',
        'rope_theta': 1e6,
        'factor': 8.0,
      },
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 10000.0},
    },
  ),
  'phi3': dict(original_max_position_embeddings=256, sliding_window=63),
  'phi3_longrope': dict(
    num_attention_heads=2,
    num_key_value_heads=1,
    original_max_position_embeddings=64,
    rope_parameters={
      'rope_type': 'longrope',
      'rope_theta': 10000.0,
      'partial_rotary_factor': 0.75,
      'short_factor': [1.0 + i / 10 for i in range(6)],
      'long_factor': [1.5 + i for i in range(6)],
      'original_max_position_embeddings': 64,
    },
  ),
  'olmo2': {},
  'granite': dict(
    attention_multiplier=0.25,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_scaling=8.0,
  ),
  'smollm3': dict(num_hidden_layers=5),
  'gpt_oss': dict(
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=16,
    sliding_window=32,
    max_position_embeddings=131072,
  ),
}


def model_type(case):
  """'llama_yarn' -> 'llama'."""
  whole = ('qwen2_moe', 'qwen3_moe', 'gemma3_text', 'gpt_oss')
  return case if case in whole else case.partition('_')[0]


def golden():
  return json.loads(GOLDEN.read_text())


def tensor_shapes(entry):
  """{name: shape} of all layers and experts of a golden entry."""
  config, shapes = entry['config'], {}
  experts = config.get('num_experts') or config.get('num_local_experts') or 0
  for name, shape in entry['shapes'].items():
    for layer in range(config['num_hidden_layers']):
      for expert in range(experts or 1):
        own = name.replace('layers.0.', f'layers.{layer}.')
        own = own.replace('experts.0.', f'experts.{expert}.')
        shapes[own] = tuple(shape)
  return shapes


def random_weights(entry, dtype=np.float32):
  """Every tensor of a golden entry, other than that of every other name.

  Norms are bfloat16's, so that Gemma's, stored plus one, come back exactly.
  """
  rng = np.random.default_rng(len(entry['shapes']))
  weights = {}
  for name, shape in tensor_shapes(entry).items():
    array = rng.normal(size=shape).astype(np.float32)
    if 'norm' in name:
      array = np.round(array * 64) / np.float32(64)
    weights[name] = array.astype(dtype)
  return weights


def bpe_tokenizer(template=True):
  """A byte-level tokenizer of SmolLM's kind; `<|im_end|>` is id 2."""
  words = ['hi', 'Ġthe', 'ing', '12', 'ĊĊ', 'ĠĠ']
  vocab = {token: i for i, token in enumerate(SPECIALS)}
  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocab[byte] = len(vocab)
  merges = []
  for word in words:
    for end in range(1, len(word)):
      merges.append((word[:end], word[end]))
      vocab.setdefault(word[: end + 1], len(vocab))
  made = tokenizers.Tokenizer(models.BPE(vocab, merges))
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIALS]
  )
  return made


CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
  "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder, made, **own):
  """The tokenizer's files: eos is `<|im_end|>` unless said otherwise."""
  made.save(str(folder / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'unk_token': '<|endoftext|>',
    'chat_template': CHATML,
    **own,
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  generation = {'bos_token_id': 1, 'eos_token_id': [2], 'pad_token_id': 0}
  (folder / 'generation_config.json').write_text(json.dumps(generation))


def write_model(folder, case, dtype=np.float32, **changed):
  """A Hugging Face directory of a golden case; returns its weights."""
  entry = golden()[case]
  folder.mkdir(parents=True, exist_ok=True)
  weights = random_weights(entry, dtype)
  safetensors.numpy.save_file(weights, folder / 'model.safetensors')
  config = {**entry['config'], **changed}
  (folder / 'config.json').write_text(json.dumps(config))
  write_tokenizer(folder, bpe_tokenizer())
  return weights


@pytest.fixture
def make(tmp_path):
  """make(case, dtype=..., **config) -> (directory, weights)."""

  def made(case, dtype=np.float32, **changed):
    folder = tmp_path / f'hf_{case}'
    return folder, write_model(folder, case, dtype, **changed)

  return made


PIECES = (
  '0 1 12 123 1234 3.14 1,000,000 007 2024-05-06 ½ ² ٣٤ 四 Ⅷ'.split()
  + "a I'm we'LL don’t HTTPServer camelCase snake_case x=y+1 !!! ... —".split()
  + 'é e\u0301 ñ Straße İstanbul ﬁ Ωμέγα Привет שלום مرحبا हिन्दी ไทย'.split()
  + '日本語 中文字符 한국어 カタカナ 𝒳 👍 👩‍👩‍👧 🇩🇪 🦙🦙 ✅'.split()
  + '\u200d \ufeff \u00a0'.split(' ')
  + [' ', '  ', '   ', ' ' * 9, '\n', '\n\n', '\r\n', '\t', '\t\t \n ', ' \n']
  + ['def f(x):\n    return x', '</a>', '{"k": [1, null]}', '$x^2$', '\\n', '`']
  + ['▁', 'Ġ', '<0x41>', '<|im', '|>', '<', '\x00', '\x7f', '\u2028', '\u3000']
  + ['the', ' the', 'The', ' quick', 'ing', ' Ing', 'hi', "it's", 'aaaaaaaaaa']
)


@pytest.fixture(scope='session')
def helpers():
  """This module, for tests that make more than fixtures hold."""
  return sys.modules[__name__]


@pytest.fixture(scope='session')
def nasty_texts():
  return make_nasty_texts()


def make_nasty_texts(n=200, specials=SPECIALS):
  """Every piece by itself, then joins of a few, some with special tokens."""
  rng = random.Random(0)
  texts = ['', *PIECES]
  while len(texts) < n:
    parts = [rng.choice(PIECES) for _ in range(rng.randint(2, 9))]
    if rng.random() < 0.3:
      parts.insert(rng.randrange(len(parts)), rng.choice(specials))
    texts.append(rng.choice(['', ' ', '']).join(parts))
  assert len(texts) == n
  return texts


def train_bpe(pre_tokenizer, normalizer=None, ignores_merges=False, n=1200):
  """A byte-level tokenizer that learnt merges from the nasty texts."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizer
  if normalizer:
    made.normalizer = normalizer
  trainer = trainers.BpeTrainer(
    vocab_size=n,
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(make_nasty_texts(400) * 3, trainer)
  state = json.loads(made.to_str())
  state['model']['ignore_merges'] = ignores_merges
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  made.decoder = decoders.ByteLevel()
  return made


def write_golden():
  """Configs, and shapes of layer 0 and expert 0, as transformers saves them."""
  import torch
  import transformers

  torch.set_num_threads(1)
  entries = {}
  for case, changed in CASES.items():
    kind = model_type(case)
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **changed})
    with tempfile.TemporaryDirectory() as folder:
      made = transformers.AutoModelForCausalLM.from_config(config)
      made.save_pretrained(folder)
      folder = pathlib.Path(folder)
      saved = json.loads((folder / 'config.json').read_text())
      weights = safetensors.numpy.load_file(folder / 'model.safetensors')
    del saved['transformers_version']
    entries[case] = {
      'config': saved,
      'shapes': {
        name: list(array.shape)
        for name, array in sorted(weights.items())
        if not re.search(r'layers\.[1-9]|experts\.[1-9]', name)
      },
    }
    assert tensor_shapes(entries[case]) == {
      name: array.shape for name, array in weights.items()
    }, case
  return entries


BF16 = ml_dtypes.bfloat16

if __name__ == '__main__':
  GOLDEN.parent.mkdir(exist_ok=True)
  lines = (
    f'{json.dumps(case)}: {json.dumps(entry)}'
    for case, entry in write_golden().items()
  )
  GOLDEN.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
