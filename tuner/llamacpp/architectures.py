"""What llama.cpp's architectures are in Hugging Face's terms, declared once.

Facts are those of llama.cpp's convert_hf_to_gguf.py and of its model loader.
"""

from tuner.llamacpp import changes, declaration

F = declaration.Field
R = declaration.Rule
A = declaration.Architecture

# In the order in which config.json lists them.
COMMON = (
  F('vocab_size', 'vocab_size', required=False),
  F('embedding_length', 'hidden_size'),
  F('feed_forward_length', 'intermediate_size'),
  F('block_count', 'num_hidden_layers'),
  F('attention.head_count', 'num_attention_heads'),
  F('attention.head_count_kv', 'num_key_value_heads', required=False),
  F('attention.key_length', 'head_dim', required=False),
  F('attention.value_length', 'head_dim', required=False),
  F('context_length', 'max_position_embeddings'),
  F('attention.layer_norm_rms_epsilon', 'rms_norm_eps', float),
)
USED = F('expert_used_count', 'num_experts_per_tok')
LOCAL_EXPERTS = (F('expert_count', 'num_local_experts'), USED)
EXPERTS = (
  F('expert_count', 'num_experts'),
  USED,
  F('expert_feed_forward_length', 'moe_intermediate_size'),
)
WINDOW = F('attention.sliding_window', 'sliding_window')
CAP = F('final_logit_softcapping', 'final_logit_softcapping', float)

SILU = {'hidden_act': ('silu', 'silu')}
NO_BIAS = {'attention_bias': (False, False)}
NO_WINDOW = {'use_sliding_window': (False, False)}
ALL_SPARSE = {'decoder_sparse_step': (1, 1), 'mlp_only_layers': ([], [])}
GEMMA = {
  'hidden_activation': ('gelu_pytorch_tanh', 'gelu_pytorch_tanh'),
  **NO_BIAS,
  'tie_word_embeddings': (True, True),
}
BIASES = ('attention_bias', 'mlp_bias')
USUAL = {'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True}

# What llama.cpp changes, by the end of the Hugging Face name. All else is kept.
PERMUTED = tuple(
  R(f'self_attn.{x}_proj.{kind}', change)
  for x, change in (('q', changes.ROPE_Q), ('k', changes.ROPE_K))
  for kind in ('weight', 'bias')
)
ROUTER = (R('mlp.gate.weight', changes.ROUTER),)
ONE_MORE = (R('norm.weight', changes.ONE_MORE),)
# gpt-oss: gate and up of all experts are one tensor; in llama.cpp two.
EXPERTS_OF_OSS = (
  R('.self_attn.sinks', changes.FLOAT, ('.self_attn.sinks.weight',)),
  R('.mlp.router.weight', changes.ROUTER),
  R(
    'gate_up_proj', changes.INTERLEAVED, ('gate_proj.weight', 'up_proj.weight')
  ),
  R(
    'gate_up_proj_bias',
    changes.INTERLEAVED_BIAS,
    ('gate_proj.bias', 'up_proj.bias'),
  ),
  R('experts.down_proj', changes.TRANSPOSED, ('experts.down_proj.weight',)),
  R('down_proj_bias', changes.FLOAT, ('down_proj.bias',)),
)

ALL = (
  A(
    'llama',
    ('llama', 'mistral'),
    'LlamaForCausalLM',
    PERMUTED,
    fixed=SILU,
    biases=BIASES,
    has_head_dim=True,
    written={**USUAL, 'pretraining_tp': 1},
  ),
  A(
    'llama',
    ('mixtral',),
    'MixtralForCausalLM',
    (*PERMUTED, R('block_sparse_moe.gate.weight', changes.ROUTER)),
    LOCAL_EXPERTS,
    SILU,
    has_head_dim=True,
  ),
  A('qwen2', ('qwen2',), 'Qwen2ForCausalLM', fixed={**SILU, **NO_WINDOW}),
  A(
    'qwen2moe',
    ('qwen2_moe',),
    'Qwen2MoeForCausalLM',
    (*ROUTER, R('mlp.shared_expert_gate.weight', changes.ROW)),
    (
      *EXPERTS,
      F('expert_shared_feed_forward_length', 'shared_expert_intermediate_size'),
    ),
    {
      **SILU,
      **NO_WINDOW,
      **ALL_SPARSE,
      'norm_topk_prob': (False, False),
      'qkv_bias': (True, True),
    },
  ),
  A(
    'qwen3',
    ('qwen3',),
    'Qwen3ForCausalLM',
    fixed={**SILU, **NO_WINDOW, **NO_BIAS},
    has_head_dim=True,
  ),
  A(
    'qwen3moe',
    ('qwen3_moe',),
    'Qwen3MoeForCausalLM',
    ROUTER,
    EXPERTS,
    {
      **SILU,
      **NO_WINDOW,
      **NO_BIAS,
      **ALL_SPARSE,
      'norm_topk_prob': (True, False),
    },
    has_head_dim=True,
  ),
  A(
    'gemma2',
    ('gemma2',),
    'Gemma2ForCausalLM',
    ONE_MORE,
    (
      WINDOW,
      F('attn_logit_softcapping', 'attn_logit_softcapping', float),
      CAP,
    ),
    GEMMA,
    period=2,
    has_head_dim=True,
  ),
  A(
    'gemma3',
    ('gemma3_text',),
    'Gemma3ForCausalLM',
    ONE_MORE,
    (WINDOW, CAP._replace(required=False)),
    {
      **GEMMA,
      'attn_logit_softcapping': (None, None),
      'use_bidirectional_attention': (False, False),
    },
    period=6,
    has_head_dim=True,
  ),
  A(
    'phi3',
    ('phi3',),
    'Phi3ForCausalLM',
    fields=(WINDOW._replace(required=False),),
    fixed={**SILU, **NO_BIAS},
  ),
  A('olmo2', ('olmo2',), 'Olmo2ForCausalLM', fixed={**SILU, **NO_BIAS}),
  A(
    'granite',
    ('granite',),
    'GraniteForCausalLM',
    PERMUTED,
    (
      F('attention.scale', 'attention_multiplier', float),
      F('embedding_scale', 'embedding_multiplier', float),
      F('residual_scale', 'residual_multiplier', float),
      F('logit_scale', 'logits_scaling', float),
    ),
    SILU,
    BIASES,
  ),
  A(
    'smollm3',
    ('smollm3',),
    'SmolLM3ForCausalLM',
    PERMUTED,
    fixed={
      **SILU,
      **NO_WINDOW,
      **NO_BIAS,
      'mlp_bias': (False, False),
      'no_rope_layer_interval': (4, 4),
    },
  ),
  A(
    'gpt-oss',
    ('gpt_oss',),
    'GptOssForCausalLM',
    EXPERTS_OF_OSS,
    (
      *LOCAL_EXPERTS,
      F('expert_feed_forward_length', 'intermediate_size'),
      WINDOW,
    ),
    {
      **SILU,
      'attention_bias': (True, True),
      'swiglu_alpha': (1.702, 1.702),
      'swiglu_limit': (7.0, 7.0),
    },
    period=2,
    has_head_dim=True,
  ),
)


def by_model_type(model_type: object) -> declaration.Architecture:
  """The architecture of a config.json. Raises ValueError listing all."""
  for one in ALL:
    if model_type in one.model_types:
      return one
  known = sorted(t for a in ALL for t in a.model_types)
  raise ValueError(
    f'config.json: model_type: {model_type!r} cannot be written as GGUF; these '
    f'can: {", ".join(known)}.'
  )


def by_name(name: object, has_experts: bool) -> declaration.Architecture:
  """The architecture of a GGUF file. Raises ValueError listing all."""
  of_name = [a for a in ALL if a.name == name]
  for one in of_name:
    if one.has_experts == has_experts:
      return one
  if of_name:
    raise ValueError(
      f'general.architecture {name!r} with{"" if has_experts else "out"} '
      'experts is not known.'
    )
  known = ', '.join(dict.fromkeys(a.name for a in ALL))
  raise ValueError(
    f'general.architecture {name!r} is not known; known are {known}.'
  )
