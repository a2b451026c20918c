"""Tiny models of every kind of cache: `load(name)`."""

import functools

import numpy as np
import support

from tuner.models import families, weights

V = 320
DYNAMIC = dict(rope_type='dynamic', factor=4.0, rope_theta=10000.0)
GEMMA3 = dict(
  model_type='gemma3_text',
  architectures=['Gemma3ForCausalLM'],
  num_hidden_layers=3,
  sliding_window_pattern=2,
  sliding_window=6,
  query_pre_attn_scalar=8,
  rope_parameters=None,
)
GPT_OSS = dict(
  model_type='gpt_oss',
  architectures=['GptOssForCausalLM'],
  num_local_experts=4,
  num_experts_per_tok=2,
  sliding_window=5,
  tie_word_embeddings=False,
  hidden_act='silu',
)
DEEPSEEK = dict(
  model_type='deepseek_v3',
  architectures=['DeepseekV3ForCausalLM'],
  num_key_value_heads=4,
  n_routed_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=8,
  first_k_dense_replace=1,
  n_shared_experts=1,
  n_group=2,
  topk_group=1,
  q_lora_rank=12,
  kv_lora_rank=10,
  qk_nope_head_dim=6,
  qk_rope_head_dim=4,
  v_head_dim=8,
  tie_word_embeddings=False,
)
KINDS = {
  'llama': {},
  'window': dict(model_type='mistral', sliding_window=6),  # Shorter than most.
  # This rope changes at 46, which the longest text and its answer fill; the
  # cache and what is prefilled reach past it.
  'dynamic': dict(
    max_position_embeddings=46, num_hidden_layers=1, rope_parameters=DYNAMIC
  ),
  'gemma3': GEMMA3,  # Local and global layers, in groups.
  'gpt_oss': GPT_OSS,  # Sinks.
  'deepseek': DEEPSEEK,  # Latent attention; values narrower than keys.
}


@functools.cache
def declared(name):
  """(declared model, its weights by path), random."""
  config = {**support.LLAMA, **KINDS[name]}
  config = {k: v for k, v in config.items() if v is not None}
  model = families.decoder_of(config)
  rng, values = np.random.default_rng(0), {}
  for row in weights.rows(model).values():
    noise = rng.standard_normal(row.shape(model.config.sizes), np.float32)
    values[row.path] = 1 + 0.1 * noise if row.init == 'ones' else 0.2 * noise
  return model, values


@functools.cache
def load(name):
  """The filled model."""
  return weights.fill(*declared(name))
