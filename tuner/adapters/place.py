"""Tensors of an adapter -> the declared weights that they adapt.

What is stored counts: the targets are those of the tensors. What the config
says of them must agree, and all that is missing, too much or misshapen is
reported at once.
"""

from collections.abc import Mapping

import numpy as np

from tuner import named
from tuner.adapters import arrays, low_rank, settings, sites, stack, whole
from tuner.models import weights

Rows = Mapping[str, weights.Row]
Sizes = Mapping[str, int]
PREFIX = 'base_model.model.'
KINDS = {
  '.lora_A.weight': 'a',
  '.lora_B.weight': 'b',
  '.lora_magnitude_vector': 'm',
  '.lora_magnitude_vector.weight': 'm',
}


class Reading:
  """Tensors taken one by one; `finish` puts layers together."""

  def __init__(self, rows: Rows, sizes: Sizes, said: settings.Settings):
    self.rows, self.sizes, self.said = rows, sizes, said
    self.faults: list[str] = []
    self.linears = sites.linears(rows, sizes)
    self.parameters = sites.parameters(rows)
    self.factors: dict[str, dict[str, np.ndarray]] = {}
    self.saved: dict[str, np.ndarray] = {}

  def take(self, name: str, tensor: np.ndarray) -> None:
    """Keeps a tensor by the module that it belongs to."""
    if not name.startswith(PREFIX):
      self.faults.append(f'{name}: names begin with {PREFIX!r}')
      return
    if not np.isfinite(tensor).all():
      self.faults.append(f'{name}: holds values that are not finite')
    inner = sites.in_memory(name.removeprefix(PREFIX))
    for end, kind in KINDS.items():
      if inner.endswith(end):
        module = inner.removesuffix(end)
        self.factors.setdefault(module, {})[kind] = tensor
        return
    if '.lora_' in inner:
      self.faults.append(f'{name}: adapters of this kind cannot go on here')
      return
    self.saved[inner] = tensor

  def finish(self):
    """(sizes, values, saved), each layer where it belongs."""
    held: dict[str, dict[tuple, stack.Factors]] = {}
    for module, factors in sorted(self.factors.items()):
      for path, index, own in self._placed(module, factors):
        held.setdefault(path, {})[index] = own
    self._check_hit()
    ranks: dict[str, low_rank.Size] = {}
    values: dict[str, np.ndarray] = {}
    for path in [path for path in self.rows if path in held]:
      is_dora = self.said.kind == 'dora'
      own = stack.stacked(self.rows[path], self.sizes, held[path], is_dora)
      ranks[path], made, faults = own
      values |= made
      self.faults += [f'{PREFIX}{fault}' for fault in faults]
    saved, faults = whole.values(self.rows, self.sizes, self.saved)
    self.faults += [f'{PREFIX}{fault}' for fault in faults]
    if not ranks and not self.faults:
      self.faults.append('holds no adapter of any matrix')
    return ranks, values | saved, tuple(p for p in self.rows if p in saved)

  def _placed(self, module: str, factors):
    """(path, index, factors) of each weight that it adapts."""
    parameter = self._parameter_of(module)
    if parameter is None and module not in self.linears:
      self.faults.append(f'{PREFIX}{module}: {self._unknown(module)}')
      return []
    wanted = {'a', 'b'} | ({'m'} if self.said.kind == 'dora' else set())
    sides = dict(a='lora_A', b='lora_B', m='lora_magnitude_vector')
    for kind in sorted(wanted ^ set(factors)):
      what = 'is missing' if kind in wanted else 'has no use_dora in the config'
      self.faults.append(f'{PREFIX}{module}.{sides[kind]}: {what}')
    if not {'a', 'b'} <= set(factors) or wanted - set(factors):
      return []
    if parameter is not None:
      return self._experts(parameter, module, factors['a'], factors['b'])
    return self._linear(module, factors)

  def _unknown(self, module: str) -> str:
    ends = sorted({name.rpartition('.')[2] for name in self.linears})
    near = named.nearest(module, self.linears) or ''
    return f'the model has no such matrix{near}; it has {", ".join(ends)}'

  def _parameter_of(self, module: str) -> str | None:
    """The experts' parameter whose adapter hangs on this module."""
    leaves = ('gate_up_proj', 'down_proj')
    if module.endswith('.base_layer'):
      return f'{module.removesuffix(".base_layer")}.{leaves[0]}'
    names = [f'{module}.{leaf}' for leaf in leaves]
    if not any(name in self.parameters for name in names):
      return None
    is_alone = f'{module}.base_layer' not in self.factors
    outer = self.said.hits_parameter(names[1]) or not is_alone
    return names[1] if outer else names[0]

  def _linear(self, module: str, factors):
    path, index = self.linears[module]
    row = self.rows[path]
    rank = self._rank(module, module)
    inputs = arrays.width(row, row.inputs, self.sizes)
    outputs = arrays.width(row, row.outputs, self.sizes)
    if not self._has_shapes(module, factors, rank, inputs, outputs):
      return []
    a = arrays.back(factors['a'], row, row.inputs, self.sizes)
    b = arrays.back(factors['b'].T, row, row.outputs, self.sizes)
    m = None
    if self.said.kind == 'dora':
      m = arrays.back(factors['m'], row, row.outputs, self.sizes)
    own = stack.Factors(a, b, m, rank, self._alpha(module))
    return [(path, index, own)]

  def _rank(self, module: str, name: str) -> int:
    """As the config says, of the parameter where the name is said so."""
    return self.said.rank(self._said_as(name))

  def _alpha(self, name: str) -> float:
    return self.said.alpha(self._said_as(name))

  def _said_as(self, name: str) -> str:
    is_module = self.said.hits(name)
    other = f'{name}.weight'
    return other if not is_module and self.said.hits_parameter(other) else name

  def _has_shapes(self, module, factors, rank, inputs, outputs, experts=1):
    shapes = {
      'a': ('.lora_A.weight', (experts * rank, inputs)),
      'b': ('.lora_B.weight', (outputs, experts * rank)),
      'm': ('.lora_magnitude_vector', (outputs,)),
    }
    before = len(self.faults)
    for kind, tensor in factors.items():
      end, wanted = shapes[kind]
      if tensor.shape != wanted:
        self.faults.append(
          f'{PREFIX}{module}{end}: shape {tensor.shape}; rank {rank} of '
          f'{settings.CONFIG} and the model imply {wanted}'
        )
    return len(self.faults) == before

  def _experts(self, parameter: str, module: str, lora_a, lora_b):
    parts = self.parameters.get(parameter)
    if parts is None:
      self.faults.append(f'{PREFIX}{module}: {self._unknown(module)}')
      return []
    rank, alpha = self.said.rank(parameter), self.said.alpha(parameter)
    row, count = self.rows[parts[0].path], self.sizes['E']
    inputs = arrays.width(row, row.inputs, self.sizes)
    outputs = len(parts) * arrays.width(row, row.outputs, self.sizes)
    factors = {'a': lora_a, 'b': lora_b}
    if not self._has_shapes(module, factors, rank, inputs, outputs, count):
      return []
    a_ERI, b_ERO = arrays.experts_back(lora_a, lora_b, count)
    split = arrays.apart(a_ERI, b_ERO, len(parts))
    found = []
    for part, (a, b) in zip(parts, split, strict=True):
      row = self.rows[part.path]
      a = arrays.back(a, row, row.inputs, self.sizes)
      b = arrays.back(b, row, row.outputs, self.sizes)
      own = a.shape[1]
      is_root = self.said.scaling == 'rslora'  # The same scale at its rank.
      shrunk = alpha * (own / rank) ** (0.5 if is_root else 1)
      placed = stack.Factors(a, b, None, own, shrunk)
      found.append((part.path, (part.layer,), placed))
    return found

  def _check_hit(self) -> None:
    """What the config names and is not there, or is there and not named."""
    stored = set(self.factors)
    all_linear = (
      str(self.said.raw.get('target_modules')).lower() == 'all-linear'
    )
    for module, (path, _) in self.linears.items():
      hit = self.said.hits(module) or self.said.hits_parameter(
        f'{module}.weight'
      )
      # Experts are parameters since `transformers` 5, a router is no Linear.
      is_linear = 'E' not in self.rows[path].lead
      is_linear &= not (all_linear and 'E' in self.rows[path].dims)
      if hit and is_linear and module not in stored:
        self.faults.append(f'{PREFIX}{module}: named as a target, not there')
      if not hit and module in stored and not self._is_named_otherwise(module):
        self.faults.append(
          f'{PREFIX}{module}: there, but no target of {settings.CONFIG}'
        )
    adapted = {self._parameter_of(module) for module in stored}
    for name in self.parameters:
      if self.said.hits_parameter(name) and name not in adapted:
        self.faults.append(f'{PREFIX}{name}: named as a target, not there')

  def _is_named_otherwise(self, module: str) -> bool:
    """As experts of older `transformers`, by their names on disk."""
    return self.said.hits(sites.on_older(module))
