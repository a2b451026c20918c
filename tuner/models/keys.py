"""Keys of config.json that change a model's numbers in some families only.

A family names those that it reads (`READS`). Any other that says more than
"off" is refused: `transformers` would ignore it or compute something else, and
nobody could see which was meant.
"""

from collections.abc import Collection, Mapping
from typing import Any

# The value at which the key changes nothing; null does so for all of them.
OFF: dict[str, Any] = {
  'attention_bias': False,
  'attention_multiplier': None,
  'attn_logit_softcapping': None,
  'clip_qkv': None,
  'embedding_multiplier': 1.0,
  'final_logit_softcapping': None,
  'layer_types': None,
  'logits_scaling': 1.0,
  'mlp_bias': False,
  'no_rope_layers': None,
  'partial_rotary_factor': 1.0,
  'query_pre_attn_scalar': None,
  'residual_multiplier': 1.0,
  'rope_interleaved': False,
  'rope_local_base_freq': None,
  'sliding_window': None,
  'sliding_window_pattern': None,
  'use_bidirectional_attention': False,
  'use_sliding_window': False,
}
# What is counted; null means what the family assumes.
COUNTS = (
  'head_dim',
  'hidden_size',
  'intermediate_size',
  'max_position_embeddings',
  'moe_intermediate_size',
  'num_attention_heads',
  'num_experts',
  'num_experts_per_tok',
  'num_hidden_layers',
  'num_key_value_heads',
  'num_local_experts',
  'vocab_size',
)
WINDOWED = {'full_attention': False, 'sliding_attention': True}


def refuse_others(config: Mapping[str, Any], reads: Collection[str]) -> None:
  """Raises ValueError for a key of OFF that is on and that nobody reads."""
  for key, off in OFF.items():
    value = config.get(key)
    if key not in reads and value is not None and value != off:
      raise ValueError(
        f'config.json: {key}: {value!r}; the family {config["model_type"]!r} '
        'does not read it, so it must not be there.'
      )


def check_counts(config: Mapping[str, Any]) -> None:
  """Raises ValueError for a count that is no whole number above 0."""
  for key in COUNTS:
    value = config.get(key)
    if value is not None and (type(value) is not int or value < 1):
      raise ValueError(
        f'config.json: {key}: {value!r}; wanted: a whole number above 0.'
      )


def layer_types(config, default: Collection[str]) -> list[str]:
  """The type of attention of each layer, `default` where none is said.

  Raises ValueError for types that are not known and for a wrong number.
  """
  given = config.get('layer_types')
  found = list(default if given is None else given)
  if unknown := sorted(set(found) - set(WINDOWED)):
    raise ValueError(
      f'config.json: layer_types holds {", ".join(unknown)}; supported: '
      f'{", ".join(WINDOWED)}.'
    )
  if len(found) != config['num_hidden_layers']:
    raise ValueError(
      f'config.json: layer_types has {len(found)} entries; num_hidden_layers '
      f'is {config["num_hidden_layers"]}.'
    )
  return found


def windows(types: Collection[str], window: int | None) -> list[int | None]:
  """How far back each layer looks: the window where its type has one.

  Raises ValueError where a layer needs a window and there is none.
  """
  if window is None and any(WINDOWED[kind] for kind in types):
    raise ValueError(
      'config.json: layer_types holds sliding_attention, and no '
      'sliding_window is in use.'
    )
  return [window if WINDOWED[kind] else None for kind in types]
