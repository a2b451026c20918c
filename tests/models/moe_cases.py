"""Tiny config.json files of mixtures of experts, and random weights."""

import json
import pathlib
import tempfile

import jax
import numpy as np
import support

from tuner.models import families, hub, policy, weights
from tuner.objectives import sft

E = 8
# Not the pad token, whose embedding gets no gradient in torch.
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 24))

COMMON = dict(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=64,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=1e4,
  tie_word_embeddings=False,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=2,
)
MIXTRAL = dict(
  COMMON,
  model_type='mixtral',
  architectures=['MixtralForCausalLM'],
  num_local_experts=E,
)
QWEN2 = dict(
  COMMON,
  model_type='qwen2_moe',
  architectures=['Qwen2MoeForCausalLM'],
  num_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  shared_expert_intermediate_size=12,
)
QWEN3 = dict(
  COMMON,
  model_type='qwen3_moe',
  architectures=['Qwen3MoeForCausalLM'],
  head_dim=8,
  num_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  norm_topk_prob=True,
)
GPT_OSS = dict(
  COMMON,
  model_type='gpt_oss',
  architectures=['GptOssForCausalLM'],
  head_dim=8,
  num_local_experts=E,
  num_experts_per_tok=3,
  sliding_window=5,
  swiglu_limit=0.5,  # So that it is met.
)
DEEPSEEK = dict(
  COMMON,
  model_type='deepseek_v3',
  architectures=['DeepseekV3ForCausalLM'],
  num_key_value_heads=4,
  n_routed_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  first_k_dense_replace=1,
  n_shared_experts=2,
  n_group=4,
  topk_group=2,
  q_lora_rank=12,
  kv_lora_rank=10,
  qk_nope_head_dim=6,
  qk_rope_head_dim=4,
  v_head_dim=8,
)
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 0.7,
  'original_max_position_embeddings': 16,
}
FAMILIES = {
  'mixtral': MIXTRAL,
  'qwen2_moe': QWEN2,
  'qwen3_moe': QWEN3,
  'gpt_oss': GPT_OSS,
  'deepseek_v3': DEEPSEEK,
}
CASES = {
  **FAMILIES,
  'mixtral_windows': dict(MIXTRAL, sliding_window=7),
  'mixtral_long_windows': dict(MIXTRAL, sliding_window=100),
  'qwen2_moe_steps': dict(QWEN2, decoder_sparse_step=2, norm_topk_prob=True),
  'qwen2_moe_windows': dict(
    QWEN2, use_sliding_window=True, sliding_window=7, max_window_layers=1
  ),
  'qwen3_moe_dense': dict(QWEN3, mlp_only_layers=[0], norm_topk_prob=False),
  'qwen3_moe_windows': dict(QWEN3, use_sliding_window=True, sliding_window=7),
  'gpt_oss_long_windows': dict(GPT_OSS, sliding_window=100, swiglu_alpha=2.0),
  'gpt_oss_plain_rope': dict(
    GPT_OSS, rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}
  ),
  'deepseek_v3_direct': dict(
    DEEPSEEK, q_lora_rank=None, rope_interleave=False, n_group=1, topk_group=1
  ),
  'deepseek_v3_yarn': dict(DEEPSEEK, rope_scaling=YARN),
  # Biases, fused matrices and one body of layers, which compiles sooner.
  'mesh': dict(GPT_OSS, layer_types=['full_attention'] * 2),
}


def write_case(path, name):
  """The random model directory of a case; the same seed for all."""
  config = CASES[name]
  (path / 'config.json').write_text(json.dumps(config))
  model = families.decoder_of(config)
  rng, values = np.random.default_rng(0), {}
  for row in weights.rows(model).values():
    noise = rng.standard_normal(row.shape(model.config.sizes), np.float32)
    values[row.path] = 1 + 0.1 * noise if row.init == 'ones' else 0.2 * noise
  hub.write(path, model, values.__getitem__)


def load_case(name):
  with tempfile.TemporaryDirectory() as folder:
    write_case(pathlib.Path(folder), name)
    return support.load_model(pathlib.Path(folder))


def loss_and_gradients(model, values, batch, balance):
  """Of the mean NLL and `balance` times the balance, for every weight."""

  @jax.value_and_grad
  def loss(values):
    tuned = policy.Policy(weights.fill(model, values), chunk=16)
    loss_sum, weight, _ = sft.sft(tuned, None, batch, balance=balance)
    return loss_sum / weight

  return jax.jit(loss, compiler_options=support.QUICK)(values)
