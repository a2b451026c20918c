"""The keys of adapter_config.json: what each may hold, and which are refused.

Every key that `peft` 0.21 writes is here by name; any other that says something
is refused, as it may change what the adapter is.
"""

import sys
from collections.abc import Iterator
from typing import Any

# Starts that leave the base's weights alone. Others (PiSSA, OLoRA, LoftQ,
# CorDA, LoRA-GA) subtract from them, so that the adapter changes another base.
STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')
# (key, values that mean nothing, what the key asks for).
REFUSED: tuple[tuple[str, tuple, str], ...] = (
  ('bias', ('none',), 'trained biases'),
  ('fan_in_fan_out', (False,), 'transposed weights'),
  ('lora_bias', (False,), 'a bias of lora_B'),
  ('trainable_token_indices', (None,), 'trained rows of the embedding'),
  ('layer_replication', (None,), 'repeated layers'),
  ('alora_invocation_tokens', (None,), 'activated LoRA'),
  ('arrow_config', (None,), 'routing between adapters'),
  ('megatron_config', (None,), "Megatron's layers"),
  ('use_qalora', (False,), 'QALoRA'),
  ('use_bdlora', (False, None), 'block-diagonal LoRA'),
  ('kasa_config', (None,), 'KaSA'),
  ('velora_config', (None,), 'VeLoRA'),
  ('monteclora_config', (None,), 'MonteCLoRA'),
)
# What `peft` writes and what changes nothing here: what it is for, who wrote
# it, and how it was started or would be merged.
IDLE = frozenset((
  'task_type', 'auto_mapping', 'peft_version', 'inference_mode',
  'loftq_config', 'eva_config', 'corda_config', 'lora_ga_config',
  'megatron_core', 'qalora_group_size', 'runtime_config', 'merge_weights',
  'ensure_weight_tying',
))  # fmt: skip


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_flag(value: Any) -> bool:
  return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
  return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _is_rate(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value < 1


def _is_list(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is_layers(value: Any) -> bool:
  layers = value if isinstance(value, list) else [value]
  return all(type(layer) is int for layer in layers)


NEEDED = ('r', 'lora_alpha')
# Key: (whether a value can be one, what it should be); null says nothing of a
# key that is not needed.
TYPES: dict[str, tuple] = {
  'r': (_is_rank, 'a whole number above 0'),
  'lora_alpha': (_is_alpha, 'a number above 0'),
  'lora_dropout': (_is_rate, 'a number in [0, 1)'),
  'use_dora': (_is_flag, 'true or false'),
  'use_rslora': (_is_flag, 'true or false'),
  'base_model_name_or_path': (_is_text, 'a string'),
  'revision': (_is_text, 'a string'),
  'target_parameters': (_is_list, 'a list of names'),
  'modules_to_save': (_is_list, 'a list of names'),
  'layers_to_transform': (_is_layers, 'numbers of layers'),
  # Another list of layers is of no model that is known here.
  'layers_pattern': (
    lambda value: value in ('', [], 'layers', ['layers']),
    "'layers'",
  ),
  'rank_pattern': (
    lambda value: (
      isinstance(value, dict) and all(map(_is_rank, value.values()))
    ),
    'an object of whole numbers above 0',
  ),
  'alpha_pattern': (
    lambda value: (
      isinstance(value, dict) and all(map(_is_alpha, value.values()))
    ),
    'an object of numbers above 0',
  ),
} | dict.fromkeys(
  ('target_modules', 'exclude_modules'),
  (
    lambda value: _is_text(value) or _is_list(value),
    'names or a regular expression',
  ),
)
KNOWN = IDLE | set(TYPES) | {key for key, _, _ in REFUSED}
KNOWN |= {'peft_type', 'init_lora_weights'}


def faults(raw: dict[str, Any]) -> Iterator[str]:
  """What cannot go on here, by key."""
  kind = raw.get('peft_type')
  if kind != 'LORA':
    yield f"peft_type: {kind!r:.200}; 'LORA' alone can go on here"
    return
  for key, (is_right, wanted) in TYPES.items():
    value = raw.get(key)
    if (value is not None or key in NEEDED) and not is_right(value):
      yield f'{key}: {value!r:.200}, wanted {wanted}'
  for key, idle, meaning in REFUSED:
    value = raw.get(key, idle[0])
    if value not in idle and value not in (None, [], {}):
      yield f'{key}: {value!r:.200}: {meaning} cannot go on here'
  start = raw.get('init_lora_weights', True)
  if start not in STARTS:
    yield (
      f'init_lora_weights: {start!r:.200} changes the base itself; convert the '
      'adapter to plain LoRA with `peft` (path_initial_model_for_weight_'
      'conversion)'
    )
  for key in sorted(set(raw) - KNOWN):
    if raw[key] is not False and raw[key] not in (None, '', [], {}):
      yield f'{key}: {raw[key]!r:.200}: this key is not known here'
