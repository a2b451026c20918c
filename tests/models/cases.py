"""Tiny config.json files of every family: `CASES[family][variant]`."""

from tuner.models.families import llama

REQUIRED = dict(
  num_hidden_layers=2,
  hidden_size=32,
  num_attention_heads=4,
  intermediate_size=48,
  vocab_size=64,
  rms_norm_eps=1e-5,
  max_position_embeddings=64,
)
assert set(REQUIRED) == set(llama.REQUIRED)
# Some have a pad token by default that is beyond this vocabulary.
SMALL = REQUIRED | dict(num_key_value_heads=2, head_dim=8, pad_token_id=0)
SHORT, LONG = 7, 100  # Windows; the texts have 24 tokens.
FAR, NEAR = 'full_attention', 'sliding_attention'


def rope(kind, **keys):
  return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **keys))


def ropes(full, near=None):
  near = near or dict(rope_type='default', rope_theta=1e4)
  return dict(rope_parameters={FAR: full, NEAR: near})


LINEAR = dict(rope_type='linear', factor=3.0, rope_theta=1e6)
# The ramp has channels on it and on both sides.
YARN = dict(factor=4.0, original_max_position_embeddings=16)
YARN |= dict(beta_fast=2.0, beta_slow=0.5)
OLD_YARN = dict(type='yarn', factor=4.0, original_max_position_embeddings=16)
WAVES = dict(short_factor=[1.0, 1.1, 1.3, 1.2], long_factor=[1.5, 2, 4, 6])
WITHIN = dict(original_max_position_embeddings=24)  # The texts' length.
BEYOND = dict(original_max_position_embeddings=23)

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)

LLAMA = {
  'base': {},
  'tied': dict(tie_word_embeddings=True),
  'bfloat16': dict(dtype='bfloat16'),  # Of the files.
  'biases': dict(attention_bias=True, mlp_bias=True),
  'mha': dict(num_key_value_heads=4),
  'mha_by_default': dict(num_key_value_heads=None),
  'mqa': dict(num_key_value_heads=1),
  'wide_heads': dict(head_dim=12, num_key_value_heads=1),
  'heads_by_default': dict(head_dim=None),
  'eps': dict(rms_norm_eps=0.5),
  'theta': dict(rope_theta=500.0),
  'theta_in_scaling': dict(rope_scaling=dict(LINEAR, rope_theta=500.0)),
  'linear': dict(rope_parameters=LINEAR),
  'linear_old': dict(rope_scaling=dict(type='linear', factor=3.0)),
  'dynamic_within': rope('dynamic', factor=4.0),
  'dynamic_beyond': rope('dynamic', factor=4.0)
  | dict(max_position_embeddings=9),
  'dynamic_original': rope(
    'dynamic', factor=4.0, original_max_position_embeddings=9
  ),
  'llama3': rope('llama3', **LLAMA3),
  'llama3_old': dict(
    rope_theta=5e5, rope_scaling=dict(rope_type='llama3', **LLAMA3)
  ),
  'yarn': rope('yarn', **YARN),
  'yarn_old': dict(rope_scaling=OLD_YARN),
  'yarn_slopes': rope('yarn', **YARN | dict(beta_fast=8.0, beta_slow=0.1)),
  'yarn_no_original': rope('yarn', factor=4.0),
  'yarn_attention': rope('yarn', **YARN, attention_factor=1.5),
  'yarn_mscale': rope('yarn', **YARN, mscale=2.0, mscale_all_dim=0.5),
  'yarn_untruncated': rope('yarn', **YARN, truncate=False),
  'longrope_within': rope('longrope', **WAVES, **WITHIN),
  'longrope_beyond': rope('longrope', **WAVES, **BEYOND),
  'longrope_factor': rope('longrope', **WAVES, **BEYOND, factor=9.0),
  'longrope_attention': rope(
    'longrope', **WAVES, **BEYOND, attention_factor=1.5
  ),
  'longrope_beside': rope('longrope', **WAVES) | BEYOND,
}
MISTRAL = {
  'base': dict(sliding_window=None),
  'nemo': dict(head_dim=16, sliding_window=None),
  'window': dict(sliding_window=SHORT),
  'window_longer': dict(sliding_window=LONG),
}
MINISTRAL = {
  'base': dict(sliding_window=SHORT),
  'layer_types': dict(sliding_window=SHORT, layer_types=[NEAR, FAR]),
  'window_longer': dict(sliding_window=LONG),
}
WINDOWED = dict(use_sliding_window=True, max_window_layers=1)
WINDOWED |= dict(sliding_window=SHORT)
QWEN2 = {
  'base': {},
  'tied': dict(tie_word_embeddings=True),
  'window_off': WINDOWED | dict(use_sliding_window=False),
  'window': WINDOWED,
  'window_longer': WINDOWED | dict(sliding_window=LONG),
  'layer_types': WINDOWED | dict(layer_types=[NEAR, FAR]),
  'yarn': dict(rope_scaling=OLD_YARN, rope_theta=1e4),
}
QWEN3 = {
  'base': {},
  'tied': dict(tie_word_embeddings=True),
  'biases': dict(attention_bias=True),
  'wide_heads': dict(head_dim=16),
  'window': WINDOWED,
  'theta': dict(rope_theta=500.0),
}
GEMMA2_BASE = dict(num_hidden_layers=3, query_pre_attn_scalar=8)
GEMMA2_BASE |= dict(sliding_window=SHORT)
GEMMA2 = {
  'base': GEMMA2_BASE,
  'untied': GEMMA2_BASE | dict(tie_word_embeddings=False),
  'seven_layers': GEMMA2_BASE | dict(num_hidden_layers=7),
  'window_longer': GEMMA2_BASE | dict(sliding_window=LONG),
  'layer_types': GEMMA2_BASE | dict(layer_types=[FAR, FAR, NEAR]),
  'scalar': GEMMA2_BASE | dict(query_pre_attn_scalar=32),
  'attention_cap': GEMMA2_BASE | dict(attn_logit_softcapping=1.0),
  'logit_cap': GEMMA2_BASE | dict(final_logit_softcapping=2.0),
  'no_caps': GEMMA2_BASE
  | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
  'activation': GEMMA2_BASE | dict(hidden_activation='silu'),
  'old_activation': GEMMA2_BASE | dict(hidden_act='gelu'),
  'biases': GEMMA2_BASE | dict(attention_bias=True),
}
GEMMA3_BASE = dict(num_hidden_layers=4, sliding_window_pattern=3)
GEMMA3_BASE |= dict(sliding_window=SHORT, query_pre_attn_scalar=8)
GEMMA3 = {
  'base': GEMMA3_BASE,
  'untied': GEMMA3_BASE | dict(tie_word_embeddings=False),
  'seven_layers': GEMMA3_BASE
  | dict(num_hidden_layers=7, sliding_window_pattern=6),
  'window_longer': GEMMA3_BASE | dict(sliding_window=LONG),
  'layer_types': GEMMA3_BASE | dict(layer_types=[NEAR, FAR, FAR, NEAR]),
  'logit_cap': GEMMA3_BASE | dict(final_logit_softcapping=2.0),
  'linear': GEMMA3_BASE | ropes(LINEAR),
  'linear_old': GEMMA3_BASE
  | dict(rope_theta=500.0, rope_local_base_freq=50.0)
  | dict(rope_scaling=dict(rope_type='linear', factor=3.0)),
  'yarn': GEMMA3_BASE
  | ropes(dict(rope_type='yarn', rope_theta=1e4, **YARN), LINEAR),
}
PHI3 = {
  'base': {},
  'tied': dict(tie_word_embeddings=True),
  'window': dict(sliding_window=SHORT),
  'window_longer': dict(sliding_window=LONG),
  'longrope_within': rope('longrope', **WAVES) | WITHIN,
  'longrope_beyond': rope('longrope', **WAVES) | BEYOND,
  'longrope_old': dict(rope_scaling=dict(type='longrope', **WAVES), **BEYOND),
  'partial': dict(partial_rotary_factor=0.5),
  'partial_longrope': dict(
    partial_rotary_factor=0.5,
    rope_scaling=dict(type='longrope', short_factor=[1, 2], long_factor=[3, 4]),
    **BEYOND,
  ),
}
OLMO2 = {
  'base': {},
  'tied': dict(tie_word_embeddings=True),
  'biases': dict(attention_bias=True),
  'theta': dict(rope_theta=500.0),
  'mha': dict(num_key_value_heads=None),
}
OLMO3_BASE = dict(num_hidden_layers=5, sliding_window=SHORT)
OLMO3 = {
  'base': OLMO3_BASE,
  'window_longer': OLMO3_BASE | dict(sliding_window=LONG),
  'yarn': OLMO3_BASE | ropes(dict(rope_type='yarn', rope_theta=1e4, **YARN)),
}
GRANITE_BASE = dict(
  attention_multiplier=0.3,
  embedding_multiplier=3.0,
  residual_multiplier=0.22,
  logits_scaling=2.0,
)
GRANITE = {
  'base': GRANITE_BASE,
  'tied': GRANITE_BASE | dict(tie_word_embeddings=True),
  'biases': GRANITE_BASE | dict(attention_bias=True, mlp_bias=True),
  **{f'no_{key}': GRANITE_BASE | {key: 1.0} for key in GRANITE_BASE},
}
SMOLLM3_BASE = dict(num_hidden_layers=5)
SMOLLM3 = {
  'base': SMOLLM3_BASE,
  'untied': SMOLLM3_BASE | dict(tie_word_embeddings=False),
  'biases': SMOLLM3_BASE | dict(attention_bias=True, mlp_bias=True),
  'interval': SMOLLM3_BASE | dict(no_rope_layer_interval=2),
  'no_rope_layers': SMOLLM3_BASE | dict(no_rope_layers=[0, 1, 1, 0, 0]),
  'window': SMOLLM3_BASE | dict(use_sliding_window=True, sliding_window=SHORT),
  'window_off': SMOLLM3_BASE | dict(sliding_window=SHORT),
  'theta': SMOLLM3_BASE | rope('default'),
}
FAMILIES = {
  'llama': LLAMA,
  'mistral': MISTRAL,
  'ministral': MINISTRAL,
  'qwen2': QWEN2,
  'qwen3': QWEN3,
  'gemma2': GEMMA2,
  'gemma3_text': GEMMA3,
  'phi3': PHI3,
  'olmo2': OLMO2,
  'olmo3': OLMO3,
  'granite': GRANITE,
  'smollm3': SMOLLM3,
}
CASES = {
  f'{family}-{name}': {'model_type': family, **SMALL, **changes}
  for family, variants in FAMILIES.items()
  for name, changes in variants.items()
}
# What gives the very numbers of the family's base; all others must not.
SAME = (
  'llama-heads_by_default',
  'llama-dynamic_within',
  'llama-dynamic_original',
  'mistral-window_longer',
  'qwen2-window_off',
  'qwen2-window_longer',
  'gemma2-old_activation',
  'phi3-window_longer',
  'smollm3-window_off',
)
