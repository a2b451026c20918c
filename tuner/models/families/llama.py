"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their shape (SmolLM, SmolLM2)."""

from collections.abc import Callable
from typing import Any

from tuner.models import decoder, layers, rope

READS = ('attention_bias', 'mlp_bias')
REQUIRED = (
  'num_hidden_layers',
  'hidden_size',
  'num_attention_heads',
  'intermediate_size',
  'vocab_size',
  'rms_norm_eps',
  'max_position_embeddings',
)


def one_rope(config: dict[str, Any], size: int) -> tuple[rope.Rope, ...]:
  return (rope.read(config, size),)


def decoder_config(
  config: dict[str, Any], ropes: Callable = one_rope
) -> decoder.DecoderConfig:
  """The config.json of a Llama, older and newer spelling of rope alike.

  ropes: (config, channels of a head) -> the model's ropes, where a family that
    starts from this one has others.

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
  size = config.get('head_dim') or width // heads
  biases = ('q', 'k', 'v', 'o') if config.get('attention_bias') else ()
  return decoder.DecoderConfig(
    D=width,
    N=heads,
    K=config.get('num_key_value_heads') or heads,
    H=size,
    F=config['intermediate_size'],
    V=config['vocab_size'],
    ropes=ropes(config, size),
    layers=(decoder.Layer(),) * config['num_hidden_layers'],
    norm=layers.Norm(config['rms_norm_eps']),
    max_positions=config['max_position_embeddings'],
    attention_scale=size**-0.5,
    tied=config.get('tie_word_embeddings', False),
    attention_biases=biases,
    mlp_bias=config.get('mlp_bias', False),
  )
