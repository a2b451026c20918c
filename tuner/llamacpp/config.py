"""config.json from a GGUF file's metadata, and back."""

import re
import typing

from tuner.llamacpp import architectures as arch_lib
from tuner.llamacpp import declaration, library, rope

Config = dict[str, typing.Any]
LAST = (
  'hidden_act',
  'attention_bias',
  'attention_dropout',
  'mlp_bias',
  'pretraining_tp',
  'initializer_range',
  'use_cache',
)
HEAD = 'output.weight'
# The names by which a file says that a config has biases.
BIASES = {
  'attention_bias': re.compile(r'blk\.\d+\.attn_\w+\.bias$'),
  'mlp_bias': re.compile(r'blk\.\d+\.ffn_\w+\.bias$'),
}
# Metadata that changes nothing here, after the architecture's name.
UNUSED = ('rope.scaling.finetuned', 'tensor_data_layout')


def normal(architecture: declaration.Architecture, config: Config) -> Config:
  """A config.json with what transformers takes for granted filled in.

  Raises ValueError for a missing key and for what llama.cpp cannot do.
  """
  config = dict(config)
  if config.get('quantization_config'):
    raise ValueError(
      'config.json: quantization_config: save the model dequantised first.'
    )
  heads, width = (config.get(k) for k in ('num_attention_heads', 'hidden_size'))
  if not heads or not width:
    raise ValueError(
      'config.json: num_attention_heads and hidden_size must be there; found '
      f'{heads} and {width}.'
    )
  if config.get('num_key_value_heads') is None:
    config['num_key_value_heads'] = heads
  if config.get('head_dim') is None:
    config['head_dim'] = width // heads
  for one, other in _same_experts(architecture):  # Both spellings are in use.
    if config.get(one) is None:
      config[one] = config.get(other)
  _check_fixed(architecture, config)
  _check_window(architecture, config)
  return config | {key: value for key, (value, _) in architecture.fixed.items()}


def _same_experts(architecture) -> list[tuple[str, str]]:
  names = ('num_experts', 'num_local_experts')
  return [names, names[::-1]] if architecture.has_experts else []


def _check_fixed(
  architecture: declaration.Architecture, config: Config
) -> None:
  own = config['hidden_size'] // config['num_attention_heads']
  if not architecture.has_head_dim and config['head_dim'] != own:
    raise ValueError(
      f'config.json: head_dim: {config["head_dim"]}; {architecture.name} has '
      f'hidden_size / num_attention_heads = {own}.'
    )
  for key, (built_in, absent) in architecture.fixed.items():
    value = config.get(key, absent)
    if (value or None) != (built_in or None):
      raise ValueError(
        f'config.json: {key}: {value!r}; llama.cpp has {built_in!r} built in '
        f'for {architecture.name}.'
      )
  scale = config.get('query_pre_attn_scalar')
  if scale is not None and scale != attention_scalar(architecture, config):
    raise ValueError(
      f'config.json: query_pre_attn_scalar: {scale}; llama.cpp takes '
      f'{attention_scalar(architecture, config)} for {architecture.name} with '
      f'{config["num_hidden_layers"]} layers.'
    )


def attention_scalar(architecture: declaration.Architecture, config: Config):
  """What llama.cpp divides Gemma's scores by the root of."""
  largest = {'gemma2': 46, 'gemma3': 62}.get(architecture.name)
  if config['num_hidden_layers'] == largest:  # The 27B models, told by depth.
    return config['hidden_size'] // config['num_attention_heads']
  return config['head_dim']


def layer_keys(architecture: declaration.Architecture, layers: int) -> Config:
  """config.json's lists of one entry a layer, as llama.cpp has built in."""
  period = architecture.period
  if architecture.name == 'smollm3':
    return {'no_rope_layers': [int((i + 1) % 4 != 0) for i in range(layers)]}
  if not period:
    return {}
  kinds = ('sliding_attention', 'full_attention')
  return {'layer_types': [kinds[(i + 1) % period == 0] for i in range(layers)]}


def _check_window(
  architecture: declaration.Architecture, config: Config
) -> None:
  layers = config.get('num_hidden_layers')
  if not isinstance(layers, int) or layers < 1:
    raise ValueError(f'config.json: num_hidden_layers: {layers}; wanted: >= 1.')
  built_in = layer_keys(architecture, layers)
  full = {'layer_types': ['full_attention'] * layers}
  for key, value in {**full, **built_in}.items():
    if config.get(key) is not None and config[key] != value:
      raise ValueError(
        f'config.json: {key}: {config[key]}; llama.cpp has {value} built in '
        f'for {architecture.name}.'
      )
  window = config.get('sliding_window')
  is_known = any(f.config == 'sliding_window' for f in architecture.fields)
  is_used = config.get('use_sliding_window', True) and window
  if is_used and not is_known and window < config['max_position_embeddings']:
    raise ValueError(
      f'config.json: sliding_window: {window}; llama.cpp attends to everything '
      f'in {architecture.name}. Set it to null to have that, or '
      f'max_position_embeddings to {window}, up to which both are the same.'
    )


def notes(architecture: declaration.Architecture, config: Config) -> list[str]:
  """What llama.cpp will do otherwise than config.json says, in words."""
  window = config.get('sliding_window')
  if architecture.name == 'phi3' and window:
    if window < config['max_position_embeddings']:
      return [
        f'llama.cpp attends to everything in phi3, not to {window} tokens'
      ]
  if architecture.name == 'gpt-oss':
    return ["llama.cpp rounds yarn's range, which config.json does not"]
  return []


def to_metadata(
  architecture: declaration.Architecture, config: Config
) -> Config:
  """{key after the architecture's name: value} of a `normal` config."""
  meta = {}
  for field in (*arch_lib.COMMON, *architecture.fields):
    value = config.get(field.config)
    if value is None and field.required:
      raise ValueError(f'config.json: {field.config} is missing.')
    if value is None:
      continue
    if field.config == 'head_dim' and not architecture.has_head_dim:
      continue
    if isinstance(value, list | bool | str):
      raise ValueError(
        f'config.json: {field.config}: {value!r}; wanted: a number.'
      )
    meta[field.key] = field.kind(value)
  return meta


def of_metadata(
  architecture: declaration.Architecture,
  meta: Config,
  vocab_size: int,
  tensors: dict,
  names: typing.Collection[str],
) -> Config:
  """config.json without token ids and dtype; meta: after the name.

  tensors: rope's own. names: of all tensors, which say of biases and of a head
  whether there are any. What `check_whole` wants is still to be asked. Raises
  ValueError naming a key that is missing, not known, or contradicted.
  """
  meta = {k: v for k, v in meta.items() if k not in UNUSED}
  if meta.pop('attention.causal', True) is not True:
    raise ValueError('attention.causal is false: not a decoder.')
  config: Config = {
    'architectures': [architecture.class_name],
    'model_type': architecture.model_types[0],
    'vocab_size': vocab_size,
  }
  meta.pop('vocab_size', None)  # The embedding's rows count.
  _take_fields(architecture, meta, config)
  layers = config['num_hidden_layers']
  config |= rope.of_metadata(architecture, meta, config, tensors)
  _take_pattern(architecture, meta)
  if architecture.has_experts:
    meta.pop('expert_gating_func', None)
  unknown = sorted({*meta, *tensors})
  if unknown:
    raise ValueError(
      f'{architecture.name}: metadata or tensors that are not known: '
      f'{library.quote(unknown)}.'
    )
  config |= layer_keys(architecture, layers)
  config['tie_word_embeddings'] = HEAD not in names
  if architecture.name in ('gemma2', 'gemma3'):
    config['query_pre_attn_scalar'] = attention_scalar(architecture, config)
  return config | _built_in(architecture, names)


def _built_in(
  architecture: declaration.Architecture, names: typing.Collection[str]
) -> Config:
  """What metadata need not say, in the order in which transformers lists it."""
  found = {
    **{key: value for key, (value, _) in architecture.fixed.items()},
    **{key: any(map(BIASES[key].match, names)) for key in architecture.biases},
    **arch_lib.USUAL,
    **architecture.written,
  }
  return {key: found[key] for key in sorted(found, key=_place)}


def _place(key: str) -> tuple[int, str]:
  return (LAST.index(key) if key in LAST else -1, key)


def _take_fields(architecture, meta: Config, config: Config) -> None:
  fields = (*arch_lib.COMMON[1:], *architecture.fields)
  config |= {field.config: None for field in fields}
  for field in fields:
    value = meta.pop(field.key, None)
    if isinstance(value, list):  # One a layer, which may all be the same.
      if len(set(value)) != 1:
        raise ValueError(f'{field.key}: differs between layers: {value}')
      value = value[0]
    if value is None:
      continue
    value = rope.short_float(value) if field.kind is float else int(value)
    if config[field.config] not in (None, value):
      raise ValueError(
        f'{field.key} is {value}, another key says {config[field.config]}.'
      )
    config[field.config] = value
  _check_said(architecture, config, arch_lib.COMMON)
  heads = config['num_attention_heads']
  own = config['hidden_size'] // heads
  config['num_key_value_heads'] = config['num_key_value_heads'] or heads
  config['head_dim'] = config['head_dim'] or own
  if config['head_dim'] != own and not architecture.has_head_dim:
    raise ValueError(
      f'attention.key_length is {config["head_dim"]}; {architecture.name} has '
      f'embedding_length / head_count = {own}.'
    )


def _check_said(architecture, config: Config, fields) -> None:
  for field in fields:
    if field.required and config[field.config] is None:
      raise ValueError(f'{architecture.name}.{field.key} is missing.')


def check_whole(architecture: declaration.Architecture, config: Config) -> None:
  """Raises ValueError for a key that the architecture wants and no other does.

  Apart, as a file whose tensors are another architecture's is to say so.
  """
  _check_said(architecture, config, architecture.fields)


def _take_pattern(architecture, meta: Config) -> None:
  pattern = meta.pop('attention.sliding_window_pattern', architecture.period)
  if pattern != architecture.period:
    raise ValueError(
      f'attention.sliding_window_pattern {pattern}; known for '
      f'{architecture.name}: {architecture.period}.'
    )
