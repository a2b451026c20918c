"""An adapter's directory -> values to start training from.

What is stored counts: the targets are those of the tensors. What the config
says of them must agree, and all that is missing, too much or misshapen is
reported at once.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tuner import named
from tuner.adapters import arrays, low_rank, settings, sites, whole
from tuner.models import hub, weights

Rows = Mapping[str, weights.Row]
Sizes = Mapping[str, int]
WEIGHTS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
KINDS = {
  '.lora_A.weight': 'a',
  '.lora_B.weight': 'b',
  '.lora_magnitude_vector': 'm',
  '.lora_magnitude_vector.weight': 'm',
}
SHOWN = 20  # faults in full; of more, how many


@dataclasses.dataclass(frozen=True)
class Stored:
  """An adapter as it is on disk, in this project's letters.

  sizes: rank and alpha of each adapted path. values: the trainable tree.
  saved: the paths that train whole. sha256: of both files.
  """

  directory: pathlib.Path
  settings: settings.Settings
  sizes: dict[str, low_rank.Size]
  values: dict[str, np.ndarray]
  saved: tuple[str, ...]
  sha256: str


def adapter(
  rows: Rows, sizes: Sizes, path: str, revision: str | None = None
) -> Stored:
  """The adapter of a directory or hub id. Raises ValueError with all faults."""
  directory = _directory(path, revision)
  said = settings.read(directory, list(sites.names(rows, sizes)))
  tensors = _tensors(directory)
  reading = _Reading(rows, sizes, said)
  for name, tensor in tensors.items():
    reading.take(name, tensor)
  found = reading.finish()
  if reading.faults:
    shown = reading.faults[:SHOWN]
    more = len(reading.faults) - len(shown)
    rest = [f'and {more} more'] if more else []
    raise ValueError('\n  '.join([f'{directory / WEIGHTS}:', *shown, *rest]))
  digest = hashlib.sha256()
  for file in (settings.CONFIG, WEIGHTS):
    digest.update((directory / file).read_bytes())
  ranks, values, saved = found
  return Stored(directory, said, ranks, values, saved, digest.hexdigest())


def _directory(path: str, revision: str | None) -> pathlib.Path:
  local = pathlib.Path(path).expanduser()
  if local.is_dir():
    return local
  if not path or not hub.is_id(path):
    found = named.existing_path(path, 'config.adapt.path')
    raise ValueError(f'config.adapt.path: {found} is a file, not a directory.')
  try:
    return hub.directory(path, revision)
  except OSError as error:  # All that the hub raises: no network, no such id.
    reason = (str(error).splitlines() or [''])[0]
    raise RuntimeError(
      f'config.adapt.path: {path!r} is no directory here, and the hub did not '
      f'give it: {reason}'
    ) from error


def _tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  file = directory / WEIGHTS
  if not file.is_file():
    pickled = file.with_name('adapter_model.bin')
    why = f'no {WEIGHTS}'
    if pickled.exists():
      why += (
        f', only {pickled.name}, a pickle, which runs code when it is read; '
        'save it again with safe_serialization=True'
      )
    raise ValueError(f'config.adapt.path: {directory} has {why}.')
  try:
    with safetensors.safe_open(file, 'numpy') as opened:
      return {name: _float32(opened, name) for name in opened.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file}: no safetensors file: {error}') from None


def _float32(opened, name: str) -> np.ndarray:
  """A tensor as float32, which holds all that its dtype does."""
  kind = opened.get_slice(name).get_dtype()
  if kind not in ('F32', 'F16', 'BF16'):
    raise ValueError(f'{name} is {kind}; allowed are F32, F16, BF16.')
  return opened.get_tensor(name).astype(np.float32)


class _Reading:
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
    held: dict[str, dict[tuple, tuple]] = {}
    for module, factors in sorted(self.factors.items()):
      for path, index, *own in self._placed(module, factors):
        held.setdefault(path, {})[index] = tuple(own)
    self._check_hit()
    ranks: dict[str, low_rank.Size] = {}
    values: dict[str, np.ndarray] = {}
    for path in [path for path in self.rows if path in held]:
      ranks[path], own = self._stacked(path, held[path])
      values |= own
    saved, faults = whole.values(self.rows, self.sizes, self.saved)
    self.faults += [f'{PREFIX}{fault}' for fault in faults]
    if not ranks and not self.faults:
      self.faults.append('holds no adapter of any matrix')
    return ranks, values | saved, tuple(p for p in self.rows if p in saved)

  def _placed(self, module: str, factors):
    """(path, index, a, b, m, rank, alpha) of each weight that it adapts."""
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
    return [(path, index, a, b, m, rank, self._alpha(module))]

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
      found.append((part.path, (part.layer,), a, b, None, own, shrunk))
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

  def _stacked(self, path: str, layers: Mapping[tuple, tuple]):
    """(Size, values) of the layers of one stack, padded to one rank."""
    row = self.rows[path]
    count = len(row.layers) or 1
    per_layer = self._by_layer(row, layers)
    usual = next(iter(per_layer.values()))
    ranks = [per_layer[i][3] if i in per_layer else 0 for i in range(count)]
    alphas = [per_layer.get(i, usual)[4] for i in range(count)]
    size = low_rank.Size(tuple(ranks), tuple(alphas))
    own = {**self.sizes, 'L': count, 'R': size.rank}
    values = {}
    kinds = {'a': f'R{row.inputs}', 'b': f'R{row.outputs}', 'm': row.outputs}
    if self.said.kind != 'dora':
      del kinds['m']
    for i, (kind, dims) in enumerate(kinds.items()):
      value = np.zeros(weights.shape(row.lead + dims, own), np.float32)
      for layer, held in per_layer.items():
        place = value[layer] if 'L' in row.lead else value
        if kind == 'm':
          place[...] = held[i]
        else:
          _rank_last(place, row)[..., : held[3]] = _rank_last(held[i], row)
      values[f'{path}.{kind}'] = value
    return size, values

  def _by_layer(self, row: weights.Row, layers: Mapping[tuple, tuple]):
    """{layer: (a, b, m, rank, alpha)}; experts said one by one stacked."""
    if 'E' not in row.lead or all(len(index) == 1 for index in layers):
      return {(index[0] if index else 0): own for index, own in layers.items()}
    found: dict[int, Any] = {}
    for layer in sorted({index[0] for index in layers}):
      own = {i[1]: held for i, held in layers.items() if i[0] == layer}
      missing = set(range(self.sizes['E'])) - set(own)
      settled = {held[3:] for held in own.values()}
      if missing or len(settled) > 1:
        why = f'experts {sorted(missing)} have none' if missing else (
          'experts differ in rank or alpha'
        )  # fmt: skip
        name = row.hf.replace('{L}', str(row.layers[layer]))
        self.faults.append(f'{PREFIX}{name}: {why}')
        continue
      a, b = (np.stack([own[e][i] for e in sorted(own)]) for i in (0, 1))
      found[layer] = (a, b, None, *settled.pop())
    return found or {0: next(iter(layers.values()))}


def _rank_last(factor: np.ndarray, row: weights.Row) -> np.ndarray:
  """A view with R, which follows E where there is one, as the last axis."""
  return np.moveaxis(factor, 1 if 'E' in row.lead else 0, -1)
