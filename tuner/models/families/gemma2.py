"""Gemma 2: soft-caps, four norms of 1 + w, a window in every other layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tuner.models import decoder, keys, layers
from tuner.models.families import llama

READS = (
  'attention_bias',
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'layer_types',
  'query_pre_attn_scalar',
  'sliding_window',
)
# What `transformers` assumes where config.json leaves a key out.
DEFAULTS = {
  'num_key_value_heads': 4,
  'head_dim': 256,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'attn_logit_softcapping': 50.0,
  'final_logit_softcapping': 30.0,
  'hidden_activation': 'gelu_pytorch_tanh',
  'tie_word_embeddings': True,
}
NORMS = decoder.Norms(
  attention_post='post_attention_layernorm',
  mlp='pre_feedforward_layernorm',
  mlp_post='post_feedforward_layernorm',
)


def decoder_config(config: dict[str, Any]) -> decoder.DecoderConfig:
  """The config.json of a Gemma 2: layers 0, 2, 4... have the window."""
  config = {**DEFAULTS, **config}
  base = gemma(config)
  types = types_of(config, 2)
  found = keys.windows(types, config['sliding_window'])
  return dataclasses.replace(
    base, layers=tuple(decoder.Layer(window=window) for window in found)
  )


def gemma(
  config: dict[str, Any], ropes: Callable = llama.one_rope
) -> decoder.DecoderConfig:
  """What Gemma 2 and 3 share; the layers are not yet told apart.

  `hidden_act` means nothing here: old files hold it beside hidden_activation.
  """
  activation = config['hidden_activation']
  if activation not in layers.ACTIVATIONS:
    raise ValueError(
      f'config.json: hidden_activation: {activation!r}; supported: '
      f'{", ".join(layers.ACTIVATIONS)}.'
    )
  base = llama.decoder_config({**config, 'hidden_act': 'silu'}, ropes)
  return dataclasses.replace(
    base,
    norm=layers.Norm(base.norm.eps, offset=1.0, scaled_in='float32'),
    norms=NORMS,
    activation=activation,
    attention_scale=config['query_pre_attn_scalar'] ** -0.5,
    attention_cap=config['attn_logit_softcapping'],
    logit_cap=config['final_logit_softcapping'],
    embed_scale=base.D**0.5,
  )


def types_of(config: dict[str, Any], pattern: int) -> list[str]:
  """Each layer's type: the last of every `pattern` looks everywhere."""
  usual = [
    'sliding_attention' if (i + 1) % pattern else 'full_attention'
    for i in range(config['num_hidden_layers'])
  ]
  return keys.layer_types(config, usual)
