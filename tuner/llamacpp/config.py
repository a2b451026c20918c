"""config.json from a GGUF file's metadata, and back."""

import math
import re
import typing

from tuner.llamacpp import architectures as arch_lib
from tuner.llamacpp import declaration, library, rope
from tuner.models import decoder, families

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
# How deep the models are whose scores are scaled by another number.
GEMMAS = {'gemma2': 46, 'gemma3': 62}
# Metadata that changes nothing here, after the architecture's name.
UNUSED = ('rope.scaling.finetuned', 'tensor_data_layout')


def normal(
  architecture: declaration.Architecture, config: Config
) -> tuple[Config, decoder.DecoderConfig]:
  """A config.json with what its model's declaration has, and that itself.

  Raises ValueError for a missing key and for what llama.cpp cannot do.
  """
  if config.get('quantization_config'):
    raise ValueError(
      'config.json: quantization_config: save the model dequantised first.'
    )
  layers = config.get('num_hidden_layers')
  if not isinstance(layers, int) or layers < 1:
    raise ValueError(f'config.json: num_hidden_layers: {layers}; wanted: >= 1.')
  _check_fixed(architecture, config)
  model = families.decoder_of(config).config
  config = {**config, **_declared(architecture, model)}
  _check_heads(architecture, model)
  _check_layers(architecture, config, model)
  _check_window(architecture, model)
  fixed = {key: value for key, (value, _) in architecture.fixed.items()}
  return {**config, **fixed}, model


def _declared(
  architecture: declaration.Architecture, model: decoder.DecoderConfig
) -> Config:
  """What a model's declaration says, by those keys that its family reads."""
  found = {
    'num_key_value_heads': model.K,
    'head_dim': model.H,
    'tie_word_embeddings': model.tied,
    'sliding_window': _window(model),
    'attn_logit_softcapping': model.attention_cap,
    'final_logit_softcapping': model.logit_cap,
    'attention_multiplier': model.attention_scale,
    'embedding_multiplier': model.embed_scale,
    'residual_multiplier': model.residual_scale,
    'logits_scaling': model.logit_divisor,
  }
  if model.experts is not None:
    found |= {
      'num_experts': model.experts.count,
      'num_local_experts': model.experts.count,
      'num_experts_per_tok': model.experts.chosen,
      'moe_intermediate_size': model.experts.width,
      'shared_expert_intermediate_size': model.experts.shared,
    }
  fields = (*arch_lib.COMMON, *architecture.fields)
  known = {field.config for field in fields} | {'tie_word_embeddings'}
  return {key: value for key, value in found.items() if key in known}


def _window(model: decoder.DecoderConfig) -> int | None:
  found = [layer.window for layer in model.layers if layer.window is not None]
  return max(found, default=None)


def _check_fixed(
  architecture: declaration.Architecture, config: Config
) -> None:
  for key, (built_in, absent) in architecture.fixed.items():
    value = config.get(key, absent)
    if (value or None) != (built_in or None):
      raise ValueError(
        f'config.json: {key}: {value!r}; llama.cpp has {built_in!r} built in '
        f'for {architecture.name}.'
      )


def _check_heads(
  architecture: declaration.Architecture, model: decoder.DecoderConfig
) -> None:
  own = model.D // model.N
  if not architecture.has_head_dim and model.H != own:
    raise ValueError(
      f'config.json: head_dim: {model.H}; {architecture.name} has '
      f'hidden_size / num_attention_heads = {own}.'
    )
  if architecture.name not in GEMMAS:
    return
  wanted = attention_scalar(architecture.name, model.L, own, model.H)
  if not math.isclose(model.attention_scale, wanted**-0.5):
    raise ValueError(
      f'config.json: query_pre_attn_scalar: {model.attention_scale**-2:g}; '
      f'llama.cpp takes {wanted} for {architecture.name} with {model.L} layers.'
    )


def attention_scalar(name: str, layers: int, own: int, head_dim: int) -> int:
  """What llama.cpp divides Gemma's scores by the root of; own: D / N."""
  # The 27B models are told by their depth.
  return own if layers == GEMMAS[name] else head_dim


def layer_keys(architecture: declaration.Architecture, layers: int) -> Config:
  """config.json's lists of one entry a layer, as llama.cpp has built in."""
  period = architecture.period
  if architecture.name == 'smollm3':
    return {'no_rope_layers': [int((i + 1) % 4 != 0) for i in range(layers)]}
  if not period:
    return {}
  kinds = ('sliding_attention', 'full_attention')
  return {'layer_types': [kinds[(i + 1) % period == 0] for i in range(layers)]}


def _check_layers(
  architecture: declaration.Architecture,
  config: Config,
  model: decoder.DecoderConfig,
) -> None:
  """Raises ValueError where layers differ otherwise than llama.cpp's do."""
  kinds = ('full_attention', 'sliding_attention')
  said = {
    'layer_types': [kinds[layer.window is not None] for layer in model.layers],
    'no_rope_layers': [int(layer.rope is not None) for layer in model.layers],
  }
  built_in = layer_keys(architecture, model.L)
  if not built_in and config.get('layer_types') is not None:
    said['layer_types'] = config['layer_types']
    built_in = {'layer_types': [kinds[0]] * model.L}
  for key, value in built_in.items():
    if said[key] != value:
      raise ValueError(
        f'config.json: {key}: {said[key]}; llama.cpp has {value} built in '
        f'for {architecture.name}.'
      )


def _check_window(
  architecture: declaration.Architecture, model: decoder.DecoderConfig
) -> None:
  window = _window(model)
  is_known = any(f.config == 'sliding_window' for f in architecture.fields)
  if window and not is_known and window < model.max_positions:
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
  if architecture.name in GEMMAS:
    config['query_pre_attn_scalar'] = attention_scalar(
      architecture.name,
      layers,
      config['hidden_size'] // config['num_attention_heads'],
      config['head_dim'],
    )
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
