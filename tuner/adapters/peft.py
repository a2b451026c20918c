"""An adapter as `peft` writes it: tensors by name, and adapter_config.json.

What is written loads by PeftModel.from_pretrained and says the same. Keys that
hold `peft`'s own default are left out, so that its older versions read it, too.
"""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tuner.adapters import arrays, low_rank, sites
from tuner.models import decoder, hub

PREFIX = 'base_model.model.'


class Hung(NamedTuple):
  """One adapter of `peft`'s: what it hangs on, its rank and its alpha.

  name: a module, or a parameter by its module's name and its own.
  """

  name: str
  is_parameter: bool
  rank: int
  alpha: float


def tensors(
  model: decoder.Decoder,
  adaptation: low_rank.LowRank,
  trainable: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Every tensor of adapter_model.safetensors, float32, by its `peft` name."""
  sizes = model.config.sizes
  values = {path: np.asarray(x, np.float32) for path, x in trainable.items()}
  found: dict[str, np.ndarray] = {}
  for path in adaptation.targets:
    if 'E' not in adaptation.rows[path].lead:
      found |= _linear(adaptation, path, values)
  held = {p: h for p, h, _ in _parameters(adaptation)}
  for parameter, parts in held.items():
    found |= _experts(adaptation, parameter, parts, set(held), values, sizes)
  for path in adaptation.saved:
    row = adaptation.rows[path]
    for name, tensor in hub.hf_tensors(row, values[path], sizes):
      found[sites.in_memory(name)] = tensor
      if path == 'embed' and 'head' not in adaptation.rows:
        found['lm_head.weight'] = tensor.copy()  # One file may not alias.
  return {PREFIX + k: np.ascontiguousarray(x) for k, x in found.items()}


def config(
  adaptation: low_rank.LowRank, base_name: str, revision: str | None
) -> dict[str, Any]:
  """adapter_config.json: of what `peft` needs, and says of an adapter."""
  hung = list(_hung(adaptation))
  rank = _most(one.rank for one in hung)
  alpha = _most(one.alpha for one in hung)
  names = {one.name for one in hung}
  ranks = {one.name: one.rank for one in hung}
  alphas = {one.name: one.alpha for one in hung}
  params = {one.name for one in hung if one.is_parameter}
  modules = set(sites.modules(adaptation.rows, {}))
  others = set(sites.parameters(adaptation.rows)) | {
    f'{module}.weight' for module in modules
  }
  found = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_name,
    'revision': revision,
    'r': rank,
    'lora_alpha': _plain(alpha),
    'lora_dropout': adaptation.dropout,
    'rank_pattern': _pattern(ranks, rank),
    'alpha_pattern': _pattern(alphas, alpha),
    'use_rslora': adaptation.scaling == 'rslora',
    'use_dora': adaptation.kind == 'dora',
    'target_modules': _suffixes(names - params, modules),
    'modules_to_save': _saved(adaptation, modules) or None,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
  }
  if params:  # `peft` refuses dropout beside them, and loads none that has it.
    found['target_parameters'] = _suffixes(params, others)
    found['lora_dropout'] = 0.0
  if 'embed' in adaptation.saved and 'head' not in adaptation.rows:
    found['ensure_weight_tying'] = True
  return found


def _linear(adaptation, path: str, values) -> dict[str, np.ndarray]:
  """lora_A [R, in], lora_B [out, R] and the magnitude of each layer."""
  row, size = adaptation.rows[path], adaptation.sizes[path]
  found = {}
  for (index, name), rank in zip(
    row.names({}).items(), size.ranks, strict=True
  ):
    if not rank:
      continue
    module = sites.in_memory(name.removesuffix('.weight'))
    a = arrays.out(values[f'{path}.a'][index][:rank], row, row.inputs)
    b = arrays.out(values[f'{path}.b'][index][:rank], row, row.outputs)
    found[f'{module}.lora_A.weight'] = a
    found[f'{module}.lora_B.weight'] = b.T
    if adaptation.kind == 'dora':
      m = arrays.out(values[f'{path}.m'][index], row, row.outputs)
      found[f'{module}.lora_magnitude_vector'] = m
  return found


def _experts(adaptation, parameter, parts, adapted, values, sizes):
  """lora_A and lora_B of one layer's gate_up_proj or down_proj."""
  factors = []
  for part in parts:
    row, size = adaptation.rows[part.path], adaptation.sizes.get(part.path)
    if size is None:
      inputs = arrays.width(row, row.inputs, sizes)
      outputs = arrays.width(row, row.outputs, sizes)
      shape = (sizes['E'], 0)
      factors.append((np.zeros((*shape, inputs)), np.zeros((*shape, outputs))))
      continue
    rank = size.ranks[part.layer]
    a = values[f'{part.path}.a'][part.layer][:, :rank]
    b = values[f'{part.path}.b'][part.layer][:, :rank]
    factors.append(
      (arrays.out(a, row, row.inputs), arrays.out(b, row, row.outputs))
    )
  a, b = arrays.experts_out(*arrays.side_by_side(factors))
  module = sites.holder(parameter, adapted)
  made = {f'{module}.lora_A.weight': a, f'{module}.lora_B.weight': b}
  return {name: x.astype(np.float32) for name, x in made.items()}


def _parameters(adaptation) -> Iterator[tuple]:
  """(name, parts, sizes of the adapted ones) of adapted experts' parameters."""
  for name, parts in sites.parameters(adaptation.rows).items():
    own = [p for p in parts if p.path in adaptation.sizes]
    own = [p for p in own if adaptation.sizes[p.path].ranks[p.layer]]
    if own:
      yield name, parts, own


def _hung(adaptation) -> Iterator[Hung]:
  rows = adaptation.rows
  for path, size in adaptation.sizes.items():
    if 'E' in rows[path].lead:
      continue
    names = rows[path].names({}).values()
    for name, rank, alpha in zip(names, size.ranks, size.alphas, strict=True):
      module = sites.in_memory(name.removesuffix('.weight'))
      is_parameter = sites.is_parameter(module, rows, path)
      name = f'{module}.weight' if is_parameter else module
      if rank:
        yield Hung(name, is_parameter, rank, alpha)
  for name, _, own in _parameters(adaptation):
    ranks = [adaptation.sizes[p.path].ranks[p.layer] for p in own]
    alphas = [adaptation.sizes[p.path].alphas[p.layer] for p in own]
    grown = sum(ranks) / ranks[0]  # alpha with it, so that the scale stays.
    is_root = adaptation.scaling == 'rslora'
    alpha = alphas[0] * (math.sqrt(grown) if is_root else grown)
    yield Hung(name, True, sum(ranks), alpha)


def _saved(adaptation, modules: Iterable[str]) -> list[str]:
  """The modules that train whole, by ends that no other module has."""
  rows = adaptation.rows
  held = {
    sites.in_memory(name.rpartition('.')[0])
    for path in adaptation.saved
    for name in rows[path].names({}).values()
  }
  found = _suffixes(held, set(modules), ends='')
  if 'embed' in adaptation.saved and 'head' not in rows:
    found.append('lm_head')
  return sorted(found)


def _suffixes(wanted: set[str], known: set[str], ends: str = '.') -> list[str]:
  """The fewest ends of dotted names by which `wanted` and no other is known.

  ends: what stands before an end in a name: '.', or '' where `peft` compares
    the ends of strings ('norm' would be 'input_layernorm', too).
  """
  others = known - wanted
  found: set[str] = set()
  for name in wanted:
    parts = name.split('.')
    tails = ['.'.join(parts[-n:]) for n in range(1, len(parts) + 1)]
    tails = [tail for tail in tails if not tail[0].isdigit()]
    alone = (
      tail
      for tail in tails
      if not any(o == tail or o.endswith(ends + tail) for o in others)
    )
    found.add(next(alone, name))
  return sorted(found)


def _pattern(values: dict[str, Any], usual: Any) -> dict[str, Any]:
  """{end of a name: value} of what differs from the usual."""
  found = {}
  for value in sorted(set(values.values()) - {usual}):
    own = {name for name, v in values.items() if v == value}
    for end in _suffixes(own, set(values)):
      found[end] = _plain(value)
  return found


def _most(values: Iterable) -> Any:
  """The most frequent; of equally frequent ones the first."""
  return collections.Counter(values).most_common(1)[0][0]


def _plain(value: float) -> float | int:
  """4 for 4.0, as `peft` writes alphas."""
  return int(value) if value == int(value) else value
