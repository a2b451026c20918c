"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape (SmolLM, SmolLM2)."""

from typing import Any

from tuner.models import decoder, layers

ROPE_KINDS = ('default', 'linear', 'dynamic', 'llama3')


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Llama, older and newer spelling of rope alike."""
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
  """The rotary embedding; `rope_parameters` (new) wins over `rope_scaling`.

  Raises ValueError for an unknown kind and where old and new names disagree
  on the base: some reader of that directory is wrong.
  """
  new = config.get('rope_parameters') or {}
  scaling = new or config.get('rope_scaling') or {}
  thetas = {
    float(source['rope_theta'])
    for source in (new, config)
    if source.get('rope_theta') is not None
  }
  if len(thetas) > 1:
    raise ValueError(
      f'config.json: rope_theta is {config["rope_theta"]} and '
      f'rope_parameters.rope_theta is {new["rope_theta"]}; they must agree.'
    )
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in ROPE_KINDS:
    raise ValueError(
      f'config.json: rope type {kind!r} is not supported; supported: '
      f'{", ".join(ROPE_KINDS)}.'
    )
  original = scaling.get('original_max_position_embeddings')
  return layers.Rope(
    theta=thetas.pop() if thetas else 10000.0,
    kind=kind,
    factor=float(scaling.get('factor') or 1.0),
    original=original or config['max_position_embeddings'],
    low_frequency=float(scaling.get('low_freq_factor') or 1.0),
    high_frequency=float(scaling.get('high_freq_factor') or 4.0),
  )
