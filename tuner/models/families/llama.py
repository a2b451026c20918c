"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape (SmolLM, SmolLM2)."""

from typing import Any

from tuner.models import decoder, layers

REQUIRED = (
  'num_hidden_layers',
  'hidden_size',
  'num_attention_heads',
  'intermediate_size',
  'vocab_size',
  'rms_norm_eps',
  'max_position_embeddings',
)
ROPE_KINDS = ('default', 'linear', 'dynamic', 'llama3')


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Llama, older and newer spelling of rope alike.

  Raises ValueError for a missing key and for what this family does not know.
  """
  missing = [key for key in REQUIRED if config.get(key) is None]
  if missing:
    raise ValueError(f'config.json: {", ".join(missing)} missing.')
  if config.get('hidden_act', 'silu') != 'silu':
    raise ValueError(
      f'config.json: hidden_act: {config["hidden_act"]!r}; this family knows '
      "'silu'."
    )
  heads, width = config['num_attention_heads'], config['hidden_size']
  return decoder.DecoderConfig(
    L=config['num_hidden_layers'],
    D=width,
    N=heads,
    K=config.get('num_key_value_heads') or heads,
    H=config.get('head_dim') or width // heads,
    F=config['intermediate_size'],
    V=config['vocab_size'],
    rope=rope(config),
    eps=config['rms_norm_eps'],
    max_positions=config['max_position_embeddings'],
    tied=config.get('tie_word_embeddings', False),
    attention_bias=config.get('attention_bias', False),
    mlp_bias=config.get('mlp_bias', False),
  )


def rope(config: dict[str, Any]) -> layers.Rope:
  """The rotary embedding, from `rope_parameters` (new) or `rope_scaling` (old).

  Raises ValueError for an unknown kind and where two places disagree: some
  reader of that directory is wrong.
  """
  new, old = (config.get(k) for k in ('rope_parameters', 'rope_scaling'))
  if new and old and {**new, **old} != {**old, **new}:
    raise ValueError(
      f'config.json: rope_scaling is {old} and rope_parameters is {new}; they '
      'must agree.'
    )
  scaling = {**(old or {}), **(new or {})}
  thetas = [source.get('rope_theta') for source in (config, scaling)]
  given = {float(theta) for theta in thetas if theta is not None}
  if len(given) > 1:
    raise ValueError(
      f'config.json: rope_theta is {thetas[0]} and '
      f'rope_parameters.rope_theta is {thetas[1]}; they must agree.'
    )
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in ROPE_KINDS:
    raise ValueError(
      f'config.json: rope type {kind!r} is not supported; supported: '
      f'{", ".join(ROPE_KINDS)}.'
    )
  original = config['max_position_embeddings']
  if kind == 'llama3':  # `transformers` reads it for this kind alone.
    original = scaling.get('original_max_position_embeddings') or original
  return layers.Rope(
    theta=given.pop() if given else 10000.0,
    kind=kind,
    factor=float(scaling.get('factor') or 1.0),
    original=original,
    low_frequency=float(scaling.get('low_freq_factor') or 1.0),
    high_frequency=float(scaling.get('high_freq_factor') or 4.0),
  )
