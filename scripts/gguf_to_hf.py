"""A llama-architecture GGUF file -> a Hugging Face directory, without torch.

`convert(gguf_path, out)` writes float32 `model.safetensors` under Hugging Face
names, `config.json`, `generation_config.json`, the tokenizer and its chat
template. Tensors are dequantised and written one after another, so memory holds
one of them at a time and not the model. What llama.cpp changed on the way in is
undone here: the rows of q and k (its rope turns neighbouring pairs, Hugging
Face's turns halves), dims stored in reverse, the pre-tokenizer kept as a name
only, and 1e-5 read back as the float32 next to it.

Run by itself: `python scripts/gguf_to_hf.py MODEL.gguf OUT_DIR`.
"""

import json
import math
import os
import pathlib
import struct
import sys

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = 3  # gguf.TokenType.CONTROL
NORMAL = 1

# llama.cpp keeps a pre-tokenizer as a name. These are the ones known here, as
# the model's own tokenizer.json has them. A wrong one still encodes, just
# differently, so an unknown name is an error.
PRE_TOKENIZERS = {
  'smollm': lambda: pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=True, use_regex=True
      ),
    ]
  ),
}

LAYER_NAMES = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
TOP_NAMES = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}


def convert(gguf_path, out):
  """The names of the files written into `out`, a directory made here.

  Raises ValueError when the file is not a llama-architecture GGUF with a
  tokenizer and tensors known here.
  """
  reader = gguf.GGUFReader(gguf_path)
  fields = {name: f.contents() for name, f in reader.fields.items()}
  if fields.get('general.architecture') != 'llama':
    raise ValueError(
      f'{gguf_path}: architecture {fields.get("general.architecture")!r}; only '
      "'llama' can be converted."
    )
  out = pathlib.Path(out)
  out.mkdir(parents=True)
  config = hf_config(fields, {t.name for t in reader.tensors})
  write_json(out / 'config.json', config)
  write_json(out / 'generation_config.json', hf_generation_config(fields))
  write_tokenizer(out, fields)
  write_safetensors(out / 'model.safetensors', reader.tensors, config)
  return sorted(path.name for path in out.iterdir())


def write_json(path, value):
  text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')


def hf_config(fields, tensor_names):
  """config.json for transformers 4 and 5.

  Both `rope_theta` (4) and `rope_parameters` (5) are written: a reader that
  misses its own falls back to a theta of 10000 without a word.
  """
  of = lambda key: fields[f'llama.{key}']
  if scaling := [key for key in fields if key.startswith('llama.rope.scaling')]:
    raise ValueError(f'rope scaling is not converted: {", ".join(scaling)}')
  heads = of('attention.head_count')
  theta = short_float(fields.get('llama.rope.freq_base', 10000.0))
  width = of('embedding_length')
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': len(fields['tokenizer.ggml.tokens']),
    'hidden_size': width,
    'intermediate_size': of('feed_forward_length'),
    'num_hidden_layers': of('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': fields.get('llama.attention.head_count_kv', heads),
    'head_dim': fields.get('llama.attention.key_length', width // heads),
    'max_position_embeddings': of('context_length'),
    'rms_norm_eps': short_float(of('attention.layer_norm_rms_epsilon')),
    'rope_theta': theta,
    'rope_scaling': None,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': theta},
    'tie_word_embeddings': 'output.weight' not in tensor_names,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'mlp_bias': False,
    'pretraining_tp': 1,
    'initializer_range': 0.02,
    'use_cache': True,
    **special_ids(fields),
    'torch_dtype': 'float32',
    'dtype': 'float32',
  }


def short_float(value):
  """The shortest decimal that is this float32: 9.99999974e-06 -> 1e-05."""
  return float(str(np.float32(value)))


def special_ids(fields):
  keys = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}
  ids = {k: fields.get(f'tokenizer.ggml.{v}_token_id') for k, v in keys.items()}
  return {f'{k}_token_id': v for k, v in ids.items()}


def hf_generation_config(fields):
  """The ids generation needs; eos as a list, the form every reader takes."""
  ids = special_ids(fields)
  return {**ids, 'eos_token_id': [ids['eos_token_id']]}


def hf_name(name):
  """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
  if name in TOP_NAMES:
    return TOP_NAMES[name]
  parts = name.split('.')
  if len(parts) == 4 and parts[0] == 'blk' and parts[2] in LAYER_NAMES:
    return f'model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}'
  raise ValueError(f'tensor {name!r} has no Hugging Face name here')


def unpermute(w, heads):
  """Rows of a q or k projection in Hugging Face's order, from llama.cpp's.

  w: [heads * head_dim, in]. llama.cpp interleaves the two halves of every
  head's rows, (2, H/2) -> (H/2, 2); this turns them back.
  """
  pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
  return pairs.swapaxes(1, 2).reshape(w.shape)


def hf_array(tensor, config):
  """One GGUF tensor as a float32 array with Hugging Face's rows."""
  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  array = array.astype('<f4', copy=False)
  if '.attn_q.' in tensor.name:
    return unpermute(array, config['num_attention_heads'])
  if '.attn_k.' in tensor.name:
    return unpermute(array, config['num_key_value_heads'])
  return array


def write_safetensors(path, tensors, config):
  """Writes the tensors one at a time.

  The header comes first and needs only names and shapes, which GGUF knows
  before anything is dequantised. (`safetensors.numpy.save_file` wants all
  arrays at once and copies them: twice the model in memory.)
  """
  tensors = sorted(tensors, key=lambda t: hf_name(t.name))
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for tensor in tensors:
    shape = [int(n) for n in reversed(tensor.shape)]
    start, end = end, end + 4 * math.prod(shape)
    header[hf_name(tensor.name)] = {
      'dtype': 'F32',
      'shape': shape,
      'data_offsets': [start, end],
    }
  head = json.dumps(header, separators=(',', ':')).encode()
  head += b' ' * (-len(head) % 8)
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(head)) + head)
    for tensor in tensors:
      array = np.ascontiguousarray(hf_array(tensor, config))
      expected = tuple(header[hf_name(tensor.name)]['shape'])
      assert array.shape == expected, (tensor.name, array.shape, expected)
      f.write(array.data)
    f.flush()
    os.fsync(f.fileno())


def build_tokenizer(fields):
  """The `tokenizers.Tokenizer` of a byte-level BPE GGUF."""
  kind = fields['tokenizer.ggml.model'], fields.get('tokenizer.ggml.pre')
  if kind[0] != 'gpt2' or kind[1] not in PRE_TOKENIZERS:
    raise ValueError(
      f'tokenizer model {kind[0]!r} with pre-tokenizer {kind[1]!r}: known are '
      f"'gpt2' with one of {sorted(PRE_TOKENIZERS)}."
    )
  tokens = fields['tokenizer.ggml.tokens']
  merges = [tuple(m.split(' ')) for m in fields['tokenizer.ggml.merges']]
  vocab = {token: i for i, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=False))
  tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind[1]]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [added_token(tokens[i]) for i in special_tokens(fields)]
  )
  assert tokenizer.get_vocab_size() == len(tokens)
  return tokenizer


def special_tokens(fields):
  """Ids of the control tokens. Raises on a kind of token not known here."""
  types = fields['tokenizer.ggml.token_type']
  if other := sorted(set(types) - {NORMAL, SPECIAL}):
    raise ValueError(f'token types {other} are not converted')
  return [i for i, kind in enumerate(types) if kind == SPECIAL]


def added_token(text):
  return tokenizers.AddedToken(text, special=True, normalized=False)


def write_tokenizer(out, fields):
  """tokenizer.json, its config, special tokens and chat template.

  `PreTrainedTokenizerFast` takes tokenizer.json as it is in transformers 4 and
  5; the class of the original, GPT2Tokenizer, rebuilds the pre-tokenizer in
  5 and loses the digit splitter. The template stands in two places because 4
  reads it from the config and 5 writes it to a file.
  """
  build_tokenizer(fields).save(str(out / 'tokenizer.json'))
  tokens = fields['tokenizer.ggml.tokens']
  keys = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}
  ids = {k: fields.get(f'tokenizer.ggml.{v}_token_id') for k, v in keys.items()}
  named = {f'{k}_token': tokens[i] for k, i in ids.items() if i is not None}
  template = fields['tokenizer.chat_template']
  flags = dict.fromkeys(
    ['lstrip', 'normalized', 'rstrip', 'single_word'], False
  )
  special = {
    str(i): {'content': tokens[i], **flags, 'special': True}
    for i in special_tokens(fields)
  }
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'add_prefix_space': False,
    'added_tokens_decoder': special,
    **named,
    'model_max_length': fields['llama.context_length'],
    'clean_up_tokenization_spaces': False,
    'chat_template': template,
  }
  write_json(out / 'tokenizer_config.json', config)
  write_json(out / 'special_tokens_map.json', named)
  (out / 'chat_template.jinja').write_text(template, encoding='utf-8')


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit('usage: python scripts/gguf_to_hf.py MODEL.gguf OUT_DIR')
  print(*convert(sys.argv[1], sys.argv[2]), sep='\n')
