"""One declaration a weight, and everything that follows from it.

A module states each weight once, with `weight('DNH', hf='...', layout=...)`:
its dims (one letter each, see CONTRIBUTING.md), its Hugging Face name and its
layout in that file. The declaration is an `nnx.Param` without a value. Shapes,
shardings, loading, exporting, parameter counts and adapter targets are read
from it (`rows`); `fill` puts values in its place.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

FIELDS = ('dims', 'hf', 'layout', 'init', 'std', 'inputs', 'layers', 'kept_in')


@dataclasses.dataclass(frozen=True)
class Row:
  """A declared weight.

  path: where it sits in the module, 'blocks.0.attention.q'.
  dims: its letters, stacked axes first, 'LDNH'.
  hf: its Hugging Face name; '{L}' stands for the layer's number, '{E}' for
    the expert's.
  layout: the axes of one Hugging Face tensor; '(NH)D' fuses N and H.
  init: 'normal' (standard deviation `std`), 'ones' or 'zeros'.
  inputs: the letters that a matrix reads, '' of what is no matrix.
  layers: the model's numbers of the layers along L.
  kept_in: the dtype that it is read, computed with and written in, whatever
    the model's; '': the model's.
  """

  path: str
  dims: str
  hf: str
  layout: str
  init: str
  std: float
  inputs: str
  layers: tuple[int, ...]
  kept_in: str = ''

  @property
  def groups(self) -> list[str]:
    """The letters of each axis of one Hugging Face tensor: ['NH', 'D']."""
    return _groups(self.layout)

  @property
  def stacked(self) -> str:
    """The letters that run over Hugging Face names: '', 'L' or 'LE'."""
    return ''.join(d for d in self.dims if f'{{{d}}}' in self.hf)

  @property
  def is_matrix(self) -> bool:
    """Whether it maps inputs to outputs, a layer or an expert at a time."""
    return bool(self.inputs)

  @property
  def lead(self) -> str:
    """The letters that a stack of matrices begins with: '', 'L' or 'LE'."""
    return re.match('L?E?', self.dims).group()  # type: ignore[union-attr]

  @property
  def outputs(self) -> str:
    """Letters of what the matrix makes."""
    return ''.join(d for d in self.dims if d not in self.lead + self.inputs)

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the declared array; L is this weight's own."""
    return shape(self.dims, {**sizes, 'L': len(self.layers)})

  def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one Hugging Face tensor."""
    return tuple(math.prod(sizes[d] for d in group) for group in self.groups)

  def names(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], str]:
    """The Hugging Face name at each index of the stacked axes.

    {(): name} of a weight that is one tensor.
    """
    numbers = {'L': self.layers}
    ranges = [numbers.get(d, range(sizes.get(d, 0))) for d in self.stacked]
    indices = itertools.product(*(range(len(r)) for r in ranges))
    found = {}
    for index in indices:
      said = zip(self.stacked, ranges, index, strict=True)
      found[index] = self.hf.format(**{d: r[i] for d, r, i in said})
    return found


def weight(
  dims: str,
  hf: str,
  layout: str = '',
  init: str = 'normal',
  std: float = 0.02,
  inputs: str = '',
  kept_in: str = '',
) -> nnx.Param:
  """A declared weight, without a value.

  layout: of one tensor, `dims` without the letters that `hf` runs over by
    default. inputs: the letters that a matrix reads; by default those of the
    second of two axes, as a Linear at Hugging Face is (out, in).
    kept_in: a dtype for this weight alone, see Row.
  """
  over = ''.join(d for d in dims if f'{{{d}}}' in hf)
  layout = layout or dims[len(over) :]
  letters = layout.replace('(', '').replace(')', '')
  if sorted(over + letters) != sorted(dims) or not dims.startswith(over):
    raise ValueError(f'{hf}: layout {layout} must hold the letters of {dims}.')
  stack = 'E' if dims.startswith('E') else ''  # Experts in one tensor.
  sides = [group for group in _groups(layout) if group != stack]
  if not inputs and len(sides) == 2:
    inputs = ''.join(d for d in dims if d in sides[1])
  return nnx.Param(
    None,
    dims=dims,
    hf=hf,
    layout=layout,
    init=init,
    std=std,
    inputs=inputs,
    layers=(),
    kept_in=kept_in,
  )


def _groups(layout: str) -> list[str]:
  return [a or b for a, b in re.findall(r'\((\w+)\)|(\w)', layout)]


def is_param(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def stack(module: nnx.Module, prefix: str, layers: Sequence[int]) -> nnx.Module:
  """The module with every weight stacked along L, named `prefix` + its name.

  layers: the model's numbers of the stacked layers.
  """

  def stacked(param):
    meta = param.get_metadata()
    return param.replace(
      value=None,
      dims='L' + meta['dims'],
      hf=prefix + meta['hf'],
      layers=tuple(layers),
    )

  return jax.tree.map(stacked, module, is_leaf=is_param)


def rows(module: nnx.Module) -> dict[str, Row]:
  """Every declared weight by its path, in the module's order."""
  leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_param)
  found = {}
  for keys, param in leaves:
    path = '.'.join(_name(key) for key in keys)
    meta = param.get_metadata()
    found[path] = Row(path, *(meta[field] for field in FIELDS))
  return found


def fill(module: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
  """The module with `values[path]` (array or weight kind) in each weight."""

  def put(keys, param):
    return param.replace(values['.'.join(_name(key) for key in keys)])

  return jax.tree_util.tree_map_with_path(put, module, is_leaf=is_param)


def shape(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The sizes of the letters of `dims`."""
  return tuple(sizes[d] for d in dims)


def count(declared: Mapping[str, Row], sizes: Mapping[str, int]) -> int:
  """The number of parameters."""
  return sum(math.prod(row.shape(sizes)) for row in declared.values())


def _name(key) -> str:
  found = (getattr(key, name, None) for name in ('name', 'key', 'idx'))
  return str(next((x for x in found if x is not None), key))
