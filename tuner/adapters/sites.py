"""Where `peft` hangs an adapter: the modules and parameters of `transformers`.

A matrix is the weight of a Linear, and its adapter bears the Linear's name.
Experts are parameters of one module since `transformers` 5, [E, outputs,
inputs], gate and up as one; `peft` reaches them by target_parameters and hangs
the adapters of one module's parameters into each other, the first innermost:
'experts.base_layer' is gate_up_proj's where down_proj has one, too.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tuner.adapters import select
from tuner.models import weights

Rows = Mapping[str, weights.Row]
# Of one expert's matrix, by its name on disk: (the parameter, its part of it).
PARTS = {
  'gate_proj': ('gate_up_proj', 0),
  'w1': ('gate_up_proj', 0),
  'up_proj': ('gate_up_proj', 1),
  'w3': ('gate_up_proj', 1),
  'down_proj': ('down_proj', 0),
  'w2': ('down_proj', 0),
}
ONE = re.compile(r'(?P<module>.+\.experts)\.\{E\}\.(?P<leaf>\w+)\.weight')
ALL = re.compile(r'(?P<module>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)')
# In models with experts `peft` takes these names, at the end of a target, for
# experts of older `transformers`; as parameters they are what they say.
MISREAD = ('gate', 'gate_proj', 'up_proj', 'down_proj', 'w1', 'w2', 'w3')


class Part(NamedTuple):
  """What of an experts' parameter a weight is: part of parts, by outputs."""

  path: str
  layer: int  # Along L, in the stack.
  part: int
  parts: int


def linears(rows: Rows, sizes: Mapping[str, int]) -> dict[str, tuple]:
  """module -> (path, index of the stacked axes) of each matrix on disk."""
  return {
    in_memory(name.removesuffix('.weight')): (path, index)
    for path, row in select.matrices(rows).items()
    for index, name in row.names(sizes).items()
    if name.endswith('.weight')
  }


def parameters(rows: Rows) -> dict[str, list[Part]]:
  """'model.layers.0.mlp.experts.gate_up_proj' -> the weights it holds."""
  found: dict[str, list[Part]] = {}
  for path, row in select.matrices(rows).items():
    if 'E' not in row.lead:
      continue
    one, whole = ONE.fullmatch(row.hf), ALL.fullmatch(row.hf)
    match = one or whole
    if match is None:
      continue
    leaf, part, parts = match['leaf'], 0, 1
    if one:
      leaf, part = PARTS.get(leaf, (leaf, 0))
      parts = 2 if leaf == 'gate_up_proj' else 1
    for layer, number in enumerate(row.layers):
      module = in_memory(match['module'].replace('{L}', str(number)))
      own = Part(path, layer, part, parts)
      found.setdefault(f'{module}.{leaf}', []).append(own)
  return {
    name: sorted(held, key=lambda own: own.part) for name, held in found.items()
  }


def names(rows: Rows, sizes: Mapping[str, int]) -> Iterator[str]:
  """Every name by which a config may mean a module or a parameter.

  A router is the parameter of its module; experts were modules of another
  name before `transformers` 5.
  """
  for module in linears(rows, sizes):
    yield module
    yield f'{module}.weight'
    yield on_older(module)
  yield from parameters(rows)


def holder(parameter: str, adapted) -> str:
  """The module that holds the adapter of an experts' parameter.

  adapted: all adapted parameters.
  """
  module, _, leaf = parameter.rpartition('.')
  is_inner = leaf == 'gate_up_proj' and f'{module}.down_proj' in adapted
  return f'{module}.base_layer' if is_inner else module


def is_parameter(module: str, rows: Rows, path: str) -> bool:
  """Whether `peft` reaches this matrix only by target_parameters.

  So it does a router, whose module is no Linear, and a Linear whose name it
  would take for an expert's.
  """
  has_experts = any('E' in row.lead for row in rows.values())
  is_router = 'E' in rows[path].outputs
  return is_router or has_experts and module.rpartition('.')[2] in MISREAD


def modules(rows: Rows, sizes: Mapping[str, int]) -> Iterator[str]:
  """Every module of the model that holds a weight."""
  for row in rows.values():
    if 'E' in row.lead:
      continue
    for name in row.names(sizes).values():
      yield in_memory(name.rpartition('.')[0])


def in_memory(name: str) -> str:
  """As `transformers` 5 names it in memory: Mixtral's is not that on disk."""
  return name.replace('.block_sparse_moe.', '.mlp.')


def on_older(module: str) -> str:
  """As `transformers` 4 named it in memory, and on disk."""
  return module.replace('.mlp.', '.block_sparse_moe.')
