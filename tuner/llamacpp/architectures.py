"""What llama.cpp's architectures are in Hugging Face's terms, declared once.

Facts are those of llama.cpp's convert_hf_to_gguf.py and of its model loader.
"""

from tuner.llamacpp import changes, declaration

# In the order in which config.json lists them.
COMMON = (
  declaration.Field('vocab_size', 'vocab_size', required=False),
  declaration.Field('embedding_length', 'hidden_size'),
  declaration.Field('feed_forward_length', 'intermediate_size'),
  declaration.Field('block_count', 'num_hidden_layers'),
  declaration.Field('attention.head_count', 'num_attention_heads'),
  declaration.Field(
    'attention.head_count_kv', 'num_key_value_heads', required=False
  ),
  declaration.Field('attention.key_length', 'head_dim', required=False),
  declaration.Field('attention.value_length', 'head_dim', required=False),
  declaration.Field('context_length', 'max_position_embeddings'),
  declaration.Field('attention.layer_norm_rms_epsilon', 'rms_norm_eps', float),
)
EXPERTS = (
  declaration.Field('expert_count', 'num_experts'),
  declaration.Field('expert_used_count', 'num_experts_per_tok'),
)
WINDOW = declaration.Field('attention.sliding_window', 'sliding_window')

SILU = {'hidden_act': ('silu', 'silu')}
NO_BIAS = {'attention_bias': (False, False)}
NO_WINDOW = {'use_sliding_window': (False, False)}
ALL_SPARSE = {'decoder_sparse_step': (1, 1), 'mlp_only_layers': ([], [])}
GEMMA = {
  'hidden_activation': ('gelu_pytorch_tanh', 'gelu_pytorch_tanh'),
  **NO_BIAS,
  'tie_word_embeddings': (True, True),
}
USUAL = {'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True}

TOP = (
  declaration.Rule('model.embed_tokens.weight'),
  declaration.Rule('model.norm.weight'),
  declaration.Rule('lm_head.weight', when='untied'),
)
LAYER = 'model.layers.{L}.'


def _rules(
  names: str, change=changes.SAME, when=''
) -> tuple[declaration.Rule, ...]:
  return tuple(
    declaration.Rule(LAYER + n, change, when=when) for n in names.split()
  )


def _biased(names: str, when: str = '') -> tuple[declaration.Rule, ...]:
  return _rules(' '.join(f'{n}.bias' for n in names.split()), when=when)


Q, K, V, O = (f'self_attn.{x}_proj' for x in 'qkvo')
QKV = f'{Q} {K} {V}'
MLP = 'mlp.gate_proj mlp.up_proj mlp.down_proj'


def _weights(names: str) -> tuple[declaration.Rule, ...]:
  return _rules(' '.join(f'{n}.weight' for n in names.split()))


NORMS = _weights('input_layernorm post_attention_layernorm')
QK_NORMS = _weights('self_attn.q_norm self_attn.k_norm')
ATTENTION = _weights(f'{QKV} {O}')
PERMUTED = (
  *_rules(f'{Q}.weight', changes.ROPE_Q),
  *_rules(f'{K}.weight', changes.ROPE_K),
  *_weights(f'{V} {O}'),
)
PERMUTED_BIAS = (
  *_rules(f'{Q}.bias', changes.ROPE_Q, 'attention_bias'),
  *_rules(f'{K}.bias', changes.ROPE_K, 'attention_bias'),
  *_biased(f'{V} {O}', 'attention_bias'),
)
LLAMA = (
  *TOP,
  *NORMS,
  *PERMUTED,
  *PERMUTED_BIAS,
  *_weights(MLP),
  *_biased(MLP, 'mlp_bias'),
)
MOE = 'mlp.experts.{E}.'
SPARSE = (
  *_rules('mlp.gate.weight', changes.ROUTER),
  *_weights(f'{MOE}gate_proj {MOE}up_proj {MOE}down_proj'),
)
MIXTRAL_MOE = 'block_sparse_moe.experts.{E}.'
MIXTRAL = (
  *TOP,
  *NORMS,
  *PERMUTED,
  *_rules('block_sparse_moe.gate.weight', changes.ROUTER),
  *_weights(f'{MIXTRAL_MOE}w1 {MIXTRAL_MOE}w2 {MIXTRAL_MOE}w3'),
)
SHARED = (
  *_weights(
    'mlp.shared_expert.gate_proj mlp.shared_expert.up_proj '
    'mlp.shared_expert.down_proj'
  ),
  *_rules('mlp.shared_expert_gate.weight', changes.ROW),
)
GEMMA2 = (
  declaration.Rule('model.embed_tokens.weight'),
  declaration.Rule('model.norm.weight', changes.ONE_MORE),
  *_rules(
    'input_layernorm.weight post_attention_layernorm.weight '
    'pre_feedforward_layernorm.weight post_feedforward_layernorm.weight',
    changes.ONE_MORE,
  ),
  *ATTENTION,
  *_weights(MLP),
)
GEMMA3 = (
  *GEMMA2,
  *_rules('self_attn.q_norm.weight self_attn.k_norm.weight', changes.ONE_MORE),
)
PHI3 = (
  *TOP,
  *NORMS,
  *_weights(f'self_attn.qkv_proj {O} mlp.gate_up_proj mlp.down_proj'),
)
OLMO2 = (
  *TOP,
  *_weights('post_attention_layernorm post_feedforward_layernorm'),
  *QK_NORMS,
  *ATTENTION,
  *_weights(MLP),
)


def _fused(name: str, change: changes.Change, suffix: str) -> declaration.Rule:
  """gpt-oss: gate and up of all experts in one tensor; in llama.cpp two."""
  via = tuple(f'{LAYER}mlp.experts.{p}_proj.{suffix}' for p in ('gate', 'up'))
  return declaration.Rule(LAYER + name, change, via)


GPT_OSS = (
  *TOP,
  *NORMS,
  *ATTENTION,
  *_biased(f'{QKV} {O}'),
  declaration.Rule(
    f'{LAYER}self_attn.sinks',
    changes.FLOAT,
    (f'{LAYER}self_attn.sinks.weight',),
  ),
  *_rules('mlp.router.weight', changes.ROUTER),
  *_biased('mlp.router'),
  _fused('mlp.experts.gate_up_proj', changes.INTERLEAVED, 'weight'),
  _fused('mlp.experts.gate_up_proj_bias', changes.INTERLEAVED_BIAS, 'bias'),
  declaration.Rule(
    f'{LAYER}mlp.experts.down_proj',
    changes.TRANSPOSED,
    (f'{LAYER}mlp.experts.down_proj.weight',),
  ),
  declaration.Rule(
    f'{LAYER}mlp.experts.down_proj_bias',
    changes.FLOAT,
    (f'{LAYER}mlp.experts.down_proj.bias',),
  ),
)

ALL = (
  declaration.Architecture(
    'llama',
    ('llama', 'mistral'),
    'LlamaForCausalLM',
    LLAMA,
    fixed=SILU,
    has_head_dim=True,
    permuted=True,
    written={**USUAL, 'pretraining_tp': 1},
  ),
  declaration.Architecture(
    'llama',
    ('mixtral',),
    'MixtralForCausalLM',
    MIXTRAL,
    (
      declaration.Field('expert_count', 'num_local_experts'),
      declaration.Field('expert_used_count', 'num_experts_per_tok'),
    ),
    SILU,
    has_head_dim=True,
    has_experts=True,
    permuted=True,
  ),
  declaration.Architecture(
    'qwen2',
    ('qwen2',),
    'Qwen2ForCausalLM',
    (*TOP, *NORMS, *ATTENTION, *_biased(QKV), *_weights(MLP)),
    fixed={**SILU, **NO_WINDOW},
  ),
  declaration.Architecture(
    'qwen2moe',
    ('qwen2_moe',),
    'Qwen2MoeForCausalLM',
    (*TOP, *NORMS, *ATTENTION, *_biased(QKV), *SPARSE, *SHARED),
    (
      *EXPERTS,
      declaration.Field('expert_feed_forward_length', 'moe_intermediate_size'),
      declaration.Field(
        'expert_shared_feed_forward_length', 'shared_expert_intermediate_size'
      ),
    ),
    {
      **SILU,
      **NO_WINDOW,
      **ALL_SPARSE,
      'norm_topk_prob': (False, False),
      'qkv_bias': (True, True),
    },
    has_experts=True,
  ),
  declaration.Architecture(
    'qwen3',
    ('qwen3',),
    'Qwen3ForCausalLM',
    (*TOP, *NORMS, *ATTENTION, *QK_NORMS, *_weights(MLP)),
    fixed={**SILU, **NO_WINDOW, **NO_BIAS},
    has_head_dim=True,
  ),
  declaration.Architecture(
    'qwen3moe',
    ('qwen3_moe',),
    'Qwen3MoeForCausalLM',
    (*TOP, *NORMS, *ATTENTION, *QK_NORMS, *SPARSE),
    (
      *EXPERTS,
      declaration.Field('expert_feed_forward_length', 'moe_intermediate_size'),
    ),
    {
      **SILU,
      **NO_WINDOW,
      **NO_BIAS,
      **ALL_SPARSE,
      'norm_topk_prob': (True, False),
    },
    has_head_dim=True,
    has_experts=True,
  ),
  declaration.Architecture(
    'gemma2',
    ('gemma2',),
    'Gemma2ForCausalLM',
    GEMMA2,
    (
      WINDOW,
      declaration.Field(
        'attn_logit_softcapping', 'attn_logit_softcapping', float
      ),
      declaration.Field(
        'final_logit_softcapping', 'final_logit_softcapping', float
      ),
    ),
    GEMMA,
    period=2,
    has_head_dim=True,
  ),
  declaration.Architecture(
    'gemma3',
    ('gemma3_text',),
    'Gemma3ForCausalLM',
    GEMMA3,
    (
      WINDOW,
      declaration.Field(
        'final_logit_softcapping',
        'final_logit_softcapping',
        float,
        required=False,
      ),
    ),
    {
      **GEMMA,
      'attn_logit_softcapping': (None, None),
      'use_bidirectional_attention': (False, False),
    },
    period=6,
    has_head_dim=True,
  ),
  declaration.Architecture(
    'phi3',
    ('phi3',),
    'Phi3ForCausalLM',
    PHI3,
    (
      declaration.Field(
        'attention.sliding_window', 'sliding_window', required=False
      ),
    ),
    {**SILU, **NO_BIAS},
  ),
  declaration.Architecture(
    'olmo2',
    ('olmo2',),
    'Olmo2ForCausalLM',
    OLMO2,
    fixed={**SILU, **NO_BIAS},
  ),
  declaration.Architecture(
    'granite',
    ('granite',),
    'GraniteForCausalLM',
    LLAMA,
    (
      declaration.Field('attention.scale', 'attention_multiplier', float),
      declaration.Field('embedding_scale', 'embedding_multiplier', float),
      declaration.Field('residual_scale', 'residual_multiplier', float),
      declaration.Field('logit_scale', 'logits_scaling', float),
    ),
    SILU,
    permuted=True,
  ),
  declaration.Architecture(
    'smollm3',
    ('smollm3',),
    'SmolLM3ForCausalLM',
    (*TOP, *NORMS, *PERMUTED, *_weights(MLP)),
    fixed={
      **SILU,
      **NO_WINDOW,
      **NO_BIAS,
      'mlp_bias': (False, False),
      'no_rope_layer_interval': (4, 4),
    },
    permuted=True,
  ),
  declaration.Architecture(
    'gpt-oss',
    ('gpt_oss',),
    'GptOssForCausalLM',
    GPT_OSS,
    (
      declaration.Field('expert_count', 'num_local_experts'),
      declaration.Field('expert_used_count', 'num_experts_per_tok'),
      declaration.Field('expert_feed_forward_length', 'intermediate_size'),
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
    has_experts=True,
  ),
)


def by_model_type(model_type: object) -> declaration.Architecture:
  """The architecture of a config.json. Raises ValueError listing all."""
  for architecture in ALL:
    if model_type in architecture.model_types:
      return architecture
  known = sorted(t for a in ALL for t in a.model_types)
  raise ValueError(
    f'config.json: model_type: {model_type!r} cannot be written as GGUF; these '
    f'can: {", ".join(known)}.'
  )


def by_name(name: object, has_experts: bool) -> declaration.Architecture:
  """The architecture of a GGUF file. Raises ValueError listing all."""
  of_name = [a for a in ALL if a.name == name]
  for architecture in of_name:
    if architecture.has_experts == has_experts:
      return architecture
  if of_name:
    raise ValueError(
      f'general.architecture {name!r} with{"" if has_experts else "out"} '
      'experts is not known.'
    )
  known = ', '.join(dict.fromkeys(a.name for a in ALL))
  raise ValueError(
    f'general.architecture {name!r} is not known; known are {known}.'
  )
