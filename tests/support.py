"""A tiny tokenizer, model, data set and config, small enough to read."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from tuner.models import families, hub, policy, weights

SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# Each of these is one token; everything else is bytes.
WORDS = ('system', 'user', 'assistant', 'Be', 'hi', 'yes', 'no', 'ĊĊ', 'ĠĊ')
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
  "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'vocab_size': 320,
  'max_position_embeddings': 256,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
  'tie_word_embeddings': True,
  'hidden_act': 'silu',
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 2,
}
# Half the time to compile; the passes above LLVM's are the same.
QUICK = {'xla_backend_optimization_level': 0}


def make_tokenizer(template=CHATML, **special):
  """The tiny tokenizer; `<|im_end|>` is its eos and its pad, id 2."""
  vocab = {token: i for i, token in enumerate(SPECIALS)}
  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocab[byte] = len(vocab)
  merges = []
  for word in WORDS:
    for end in range(1, len(word)):
      merges.append((word[:end], word[end]))
      vocab.setdefault(word[: end + 1], len(vocab))
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  special = {
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'pad_token': '<|im_end|>',
    'unk_token': '<|endoftext|>',
  } | special
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **special
  )
  tokenizer.chat_template = template
  return tokenizer


def write_tokenizer(path: pathlib.Path) -> None:
  """The tokenizer and the generation config of a model directory."""
  make_tokenizer().save_pretrained(path)
  config = {'eos_token_id': 2, 'pad_token_id': 2}
  (path / 'generation_config.json').write_text(json.dumps(config))


def initial_values(declared, sizes, key) -> dict:
  """Fresh float32 values of all weights; a pure function of the key."""
  keys = jax.random.split(key, len(declared))
  return {
    path: _initial(row, row.shape(sizes), k)
    for (path, row), k in zip(declared.items(), keys, strict=True)
  }


def _initial(row, shape, key):
  """Normal with the declared standard deviation, ones or zeros."""
  if row.init == 'normal':
    return row.std * jax.random.normal(key, shape)
  return {'ones': jnp.ones, 'zeros': jnp.zeros}[row.init](shape)


def write_model(path: pathlib.Path, seed: int = 0, **changes) -> dict:
  """A random model directory; `changes` are keys of config.json.

  Returns the weights by path, as numpy arrays.
  """
  config = {**LLAMA, **changes}
  (path / 'config.json').write_text(json.dumps(config))
  write_tokenizer(path)
  model = families.decoder_of(config)
  initial = functools.partial(
    initial_values, weights.rows(model), model.config.sizes
  )
  values = jax.jit(initial, compiler_options=QUICK)(jax.random.key(seed))
  # Larger than at the start of training, so that attention is not uniform
  # and a wrong norm shows.
  rng = np.random.default_rng(seed)
  values = {
    name: np.asarray(x) * 5 + 0.1 * rng.standard_normal(x.shape, np.float32)
    for name, x in values.items()
  }
  hub.write(path, model, values.__getitem__)
  return values


def write_rows(path: pathlib.Path, n: int = 60) -> None:
  """Questions whose JSON answers can be read off them."""
  rng = np.random.default_rng(0)
  with path.open('w') as file:
    for _ in range(n):
      a, b = (int(x) for x in rng.integers(0, 1000, 2))
      row = {'input': f'{a} and {b}', 'output': json.dumps({'a': a, 'b': b})}
      file.write(json.dumps(row) + '\n')


def config(model: pathlib.Path, rows: pathlib.Path):
  """A LoRA of four steps on the tiny model."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.model = dict(path=str(model), head_chunk=32)
  c.data = dict(path=str(rows), system='Be', max_tokens=96, test=0.2, dev=0.1)
  c.batch = dict(rows=4, tokens=96, accumulate=1)
  c.train = dict(steps=4)
  c.adapt = dict(name='lora', rank=4, alpha=8.0)
  c.objective = dict(name='sft')
  c.optimizer = dict(name='adamw')
  c.schedule = dict(name='constant', peak=1e-3)
  c.evaluate = dict(metrics=('json_valid',), max_tokens=8, rows=4)
  c.checkpoint = dict(every=2)
  c.mesh = dict(data=-1, fsdp=1, tensor=1, devices=1)
  c.log = dict(writers=('jsonl',))
  c.export = dict(formats=())  # Each would be read again.
  return c


def load_model(path: pathlib.Path):
  """(declared model, its weights by path) of a model directory."""
  model = hub.declare(path)
  return model, hub.load(path, model)


def fresh_factors(model, adaptation) -> dict:
  """What an adapter trains, as it starts; compiled as one."""
  initial = functools.partial(adaptation.initial, model.config.sizes)
  return jax.jit(initial, compiler_options=QUICK)(jax.random.key(0))


@functools.partial(jax.jit, compiler_options=QUICK)
def logits(model, tokens_BT):
  """float32 logits_BTV of a filled model on rows of one example each."""
  batch = {
    'tokens': tokens_BT,
    'positions': jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
    ),
    'segments': jnp.ones_like(tokens_BT),
  }
  return policy.Policy(model).logits(batch)


def pack(rows, width: int) -> dict:
  """A batch [B, T]: each row a list of (ids, first trained position)."""
  names = ('tokens', 'positions', 'segments')
  batch = {name: np.zeros((len(rows), width), np.int32) for name in names}
  batch['mask'] = np.zeros((len(rows), width), np.float32)
  for i, row in enumerate(rows):
    start = 0
    for segment, (ids, trained) in enumerate(row, 1):
      span = slice(start, start + len(ids))
      batch['tokens'][i, span] = ids
      batch['positions'][i, span] = np.arange(len(ids))
      batch['segments'][i, span] = segment
      batch['mask'][i, span] = np.arange(len(ids)) >= trained
      start += len(ids)
  return batch


def towards_one(policy, reference, batch):
  """An objective without a forward pass, which compiles in no time.

  Squared distance of every weight from 1: a gradient for all that trains.
  """
  del reference
  leaves = jax.tree.leaves(policy.model)
  total = sum(jnp.square(x.astype(jnp.float32) - 1).sum() for x in leaves)
  return total, batch['mask'].sum(), {}
