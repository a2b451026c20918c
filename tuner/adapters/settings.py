"""adapter_config.json, checked: what it says of ranks, alphas and targets.

Names are compared as `peft` compares them (0.21): a list by the ends of names,
a string as a regular expression of the whole name, patterns at the end.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.adapters import keys, patterns
from tuner.models import tensors

CONFIG = 'adapter_config.json'
PATTERNS = ('rank_pattern', 'alpha_pattern')
TARGETS = ('target_modules', 'exclude_modules')
START = r'(.*\.)?'  # What `peft` lets stand before a key of a pattern.


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is said of an adapter; `raw` is the file.

  found: the model's names that each regular expression in it matches.
  """

  raw: dict[str, Any]
  found: Mapping[patterns.Pattern, frozenset[str]]

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
    return int(self._of('rank_pattern', name, self.raw['r']))

  def alpha(self, name: str) -> float:
    """The alpha of the adapter of this module or parameter."""
    return float(self._of('alpha_pattern', name, self.raw['lora_alpha']))

  def hits(self, module: str) -> bool:
    """Whether the adapter names this module as a target."""
    if self._names('exclude_modules', module):
      return False
    targets = self.raw.get('target_modules') or []
    if isinstance(targets, str) and targets.lower() == 'all-linear':
      return not module.endswith('lm_head')
    if not self._names('target_modules', module):
      return False
    layers = self.raw.get('layers_to_transform')
    if layers in (None, []) or isinstance(targets, str) or module in targets:
      return True
    number = re.search(r'\.(\d+)\.', module)
    wanted = [layers] if isinstance(layers, int) else layers
    return number is not None and int(number.group(1)) in wanted

  def hits_parameter(self, name: str) -> bool:
    """Whether the adapter names this parameter as a target."""
    return self._names('target_parameters', name)

  def _names(self, key: str, name: str) -> bool:
    targets = self.raw.get(key) or []
    if isinstance(targets, str):
      return name in self.found[patterns.Pattern(key, targets)]
    return any(name == t or name.endswith(f'.{t}') for t in targets)

  def _of(self, key: str, name: str, usual: Any) -> Any:
    for text, value in (self.raw.get(key) or {}).items():
      if name in self.found[patterns.Pattern(key, text, START)]:
        return value
    return usual


def read(directory: pathlib.Path, names: Sequence[str]) -> Settings:
  """The settings of an adapter's directory.

  names: all that they can be asked about. Raises ValueError naming all keys
  whose meaning is not known here.
  """
  file = directory / CONFIG
  if not file.is_file():
    raise ValueError(
      f'config.adapt.path: {directory} has no {CONFIG}; wanted the directory '
      "that `peft`'s save_pretrained wrote."
    )
  raw = tensors.read_json(file)
  faults = list(keys.faults(raw))
  if faults:
    raise ValueError(f'{file}: ' + '; '.join(faults) + '.')
  try:
    return Settings(raw, patterns.find(_patterns(raw), names))
  except ValueError as error:
    raise ValueError(f'{file}: {error}.') from None


def _patterns(raw: dict[str, Any]) -> Iterator[patterns.Pattern]:
  """The regular expressions of a checked config."""
  for key in TARGETS:
    if isinstance(raw.get(key), str):
      yield patterns.Pattern(key, raw[key])
  for key in PATTERNS:
    for text in raw.get(key) or {}:
      yield patterns.Pattern(key, text, START)
