"""adapter_config.json, checked: what it says of ranks, alphas and targets.

Names are compared as `peft` compares them (0.21): a list by the ends of names,
a string as a regular expression of the whole name, patterns at the end.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

CONFIG = 'adapter_config.json'
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


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is said of an adapter; `raw` is the file."""

  raw: dict[str, Any]

  @property
  def kind(self) -> str:
    """'lora' or 'dora'."""
    return 'dora' if self.raw.get('use_dora') else 'lora'

  @property
  def scaling(self) -> str:
    """A key of low_rank.SCALINGS."""
    return 'rslora' if self.raw.get('use_rslora') else 'lora'

  @property
  def dropout(self) -> float:
    """The dropout that it was trained with."""
    return float(self.raw.get('lora_dropout') or 0.0)

  def rank(self, name: str) -> int:
    """The rank of the adapter of this module or parameter."""
    return int(_of(self.raw.get('rank_pattern'), name, self.raw['r']))

  def alpha(self, name: str) -> float:
    """The alpha of the adapter of this module or parameter."""
    usual = self.raw['lora_alpha']
    return float(_of(self.raw.get('alpha_pattern'), name, usual))

  def hits(self, module: str) -> bool:
    """Whether the adapter names this module as a target."""
    if _matches(self.raw.get('exclude_modules'), module):
      return False
    targets = self.raw.get('target_modules')
    if isinstance(targets, str) and targets.lower() == 'all-linear':
      return not module.endswith('lm_head')
    if not _matches(targets, module):
      return False
    layers = self.raw.get('layers_to_transform')
    if (
      layers is None
      or isinstance(targets, str)
      or targets
      and module in targets
    ):
      return True
    number = re.search(r'\.(\d+)\.', module)
    wanted = [layers] if isinstance(layers, int) else layers
    return number is not None and int(number.group(1)) in wanted

  def hits_parameter(self, name: str) -> bool:
    """Whether the adapter names this parameter as a target."""
    return _matches(self.raw.get('target_parameters') or [], name)


def read(directory: pathlib.Path) -> Settings:
  """The settings of an adapter's directory.

  Raises ValueError naming all keys whose meaning is not known here.
  """
  file = directory / CONFIG
  if not file.is_file():
    raise ValueError(
      f'config.adapt.path: {directory} has no {CONFIG}; wanted the directory '
      "that `peft`'s save_pretrained wrote."
    )
  try:
    raw = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{file}: no JSON: {error}') from None
  if not isinstance(raw, dict):
    raise ValueError(f'{file}: {type(raw).__name__}, wanted an object.')
  faults = list(_faults(raw))
  if faults:
    raise ValueError(f'{file}: ' + '; '.join(faults) + '.')
  return Settings(raw)


def _faults(raw: dict[str, Any]) -> Iterable[str]:
  kind = raw.get('peft_type')
  if kind != 'LORA':
    yield f"peft_type: {kind!r}; 'LORA' alone can go on here"
    return
  for key in ('r', 'lora_alpha'):
    value: Any = raw.get(key)
    kinds = int if key == 'r' else int | float
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or value <= 0:
      yield f'{key}: {value!r}, wanted a number above 0'
  for key in ('rank_pattern', 'alpha_pattern'):
    if not isinstance(raw.get(key) or {}, dict):
      yield f'{key}: {raw[key]!r}, wanted an object'
  dropout = raw.get('lora_dropout') or 0
  if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
    yield f'lora_dropout: {dropout!r}, wanted a number in [0, 1)'
  for key, idle, meaning in REFUSED:
    value = raw.get(key, idle[0])
    if value not in idle and value not in (None, [], {}):
      yield f'{key}: {value!r}: {meaning} cannot go on here'
  start = raw.get('init_lora_weights', True)
  if start not in STARTS:
    yield (
      f'init_lora_weights: {start!r} changes the base itself; convert the '
      'adapter to plain LoRA with `peft` (path_initial_model_for_weight_'
      'conversion)'
    )


def _matches(targets: Any, name: str) -> bool:
  if not targets:
    return False
  if isinstance(targets, str):
    return re.fullmatch(targets, name) is not None
  return any(name == t or name.endswith(f'.{t}') for t in targets)


def _of(pattern: dict[str, Any] | None, name: str, usual: Any) -> Any:
  for key, value in (pattern or {}).items():
    if re.match(rf'(.*\.)?({key})$', name):
      return value
  return usual
