"""Tiny models of several families, their adapters, and `peft` over them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import support

from tuner import adapt
from tuner.adapters import base as base_lib
from tuner.adapters import peft as writer
from tuner.models import hub, weights

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 16))
BASE = dict(vocab_size=64, max_position_embeddings=64)
MOE = BASE | dict(
  num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False
)
ROPE = dict(rope_type='default', rope_theta=1e4)
FAMILIES = {
  'tied': BASE,
  'untied': BASE | dict(tie_word_embeddings=False, num_hidden_layers=3),
  'qwen2': BASE | dict(model_type='qwen2', tie_word_embeddings=False),
  'phi3': BASE | dict(model_type='phi3', tie_word_embeddings=False),
  'gemma3': BASE
  | dict(model_type='gemma3_text', num_hidden_layers=4, head_dim=8)
  | dict(sliding_window=7, query_pre_attn_scalar=8, sliding_window_pattern=3)
  | dict(rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE)),
  'mixtral': MOE | dict(model_type='mixtral', num_local_experts=4),
  'qwen3_moe': MOE
  | dict(model_type='qwen3_moe', num_experts=4, norm_topk_prob=True),
  'qwen2_moe': MOE
  | dict(model_type='qwen2_moe', num_experts=4)
  | dict(shared_expert_intermediate_size=24),
  'gpt_oss': MOE
  | dict(model_type='gpt_oss', num_local_experts=4, sliding_window=7)
  | dict(head_dim=8),
}
ARCHITECTURES = {
  'qwen2': 'Qwen2ForCausalLM',
  'phi3': 'Phi3ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'mixtral': 'MixtralForCausalLM',
  'qwen3_moe': 'Qwen3MoeForCausalLM',
  'qwen2_moe': 'Qwen2MoeForCausalLM',
  'gpt_oss': 'GptOssForCausalLM',
}


def write_base(path, family):
  """The family's tiny model directory."""
  changes = FAMILIES[family]
  kind = changes.get('model_type', 'llama')
  if kind != 'llama':
    changes = changes | {'architectures': [ARCHITECTURES[kind]]}
  path.mkdir(exist_ok=True)
  values = support.write_model(path, **changes)
  # Smaller than its own: float32's rounding grows with the norms' scale.
  model = support.load_model(path)[0]
  values = {k: v / 4 if 'norm' in k else v for k, v in values.items()}
  rewrite(path, model, values)
  return path


def rewrite(path, model, values):
  """Writes the directory's weights anew."""
  for file in path.glob('*.safetensors*'):
    file.unlink()
  hub.write(path, model, values.__getitem__)


@functools.cache
def load(path):
  """(model, its weights) of a directory."""
  return support.load_model(path)


def factors(model, adaptation, values, seed=1):
  """A tree that changes what the model says: every path away from its start.

  Magnitudes move by a tenth; what is padded stays zero.
  """
  rng = np.random.default_rng(seed)
  shapes = adaptation.shapes(model.config.sizes)
  # a and b as if given: only what is scaled below is worth computing.
  drawn = {f'{path}.a': None for path in adaptation.targets}
  scaled = dataclasses.replace(adaptation, given=drawn)
  initial = functools.partial(scaled.initial, model.config.sizes)
  compiled = jax.jit(initial, compiler_options=support.QUICK)
  start = compiled(jax.random.key(0), values)
  tree = {}
  for path, shape in shapes.items():
    noise = rng.standard_normal(shape).astype(np.float32)
    if path.endswith(('.a', '.b')):
      tree[path] = jnp.asarray(0.1 * noise)
    else:
      tree[path] = jnp.asarray(start[path] * (1 + 0.1 * noise))
  return tree


def logits(model, values):
  return np.asarray(support.logits(weights.fill(model, values), TOKENS))


@functools.cache
def base_logits(path):
  """The untuned model's."""
  return logits(*load(path))


def write_adapter(path, base, model, adaptation, trainable):
  """The directory that `peft` loads; returns the config."""
  path.mkdir(exist_ok=True)
  tensors = writer.tensors(model, adaptation, trainable)
  file = path / 'adapter_model.safetensors'
  safetensors.numpy.save_file(tensors, file, {'format': 'pt'})
  config = writer.config(adaptation, str(base), None)
  (path / 'adapter_config.json').write_text(json.dumps(config))
  return config


def read_adapter(path, base, model, **kwargs):
  """The adaptation that goes on from a directory."""
  return adapt.peft(
    weights.rows(model),
    str(path),
    sizes=model.config.sizes,
    base=base_lib.Base(str(base), None, base),
    **kwargs,
  )


def torch_base(path):
  """The base as `transformers` loads it, in float32."""
  import torch
  import transformers

  torch.set_num_threads(1)  # Several spin while they wait for a core.
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation='eager'
  )


def torch_logits(model):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()
