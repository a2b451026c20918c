"""One declaration a weight, and everything that follows from it.

A module states each weight once, with `weight('DNH', hf='...', layout=...)`:
its dims (one letter each, see CONTRIBUTING.md), its Hugging Face name and its
layout in that file. The declaration is an `nnx.Param` without a value. Shapes,
initial values, shardings, loading, exporting, parameter counts and adapter
targets are read from it (`rows`); `fill` puts values in its place.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Row:
  """A declared weight.

  path: where it sits in the module, 'blocks.attention.q'.
  dims: its letters, stacked axis first, 'LDNH'.
  hf: its Hugging Face name, '{L}' standing for the layer's number.
  layout: the axes of one Hugging Face tensor; '(NH)D' fuses N and H.
  init: 'normal' (standard deviation `std`), 'ones' or 'zeros'.
  """

  path: str
  dims: str
  hf: str
  layout: str
  init: str
  std: float

  @property
  def groups(self) -> list[str]:
    """The letters of each axis of the Hugging Face tensor: ['NH', 'D']."""
    return [a or b for a, b in re.findall(r'\((\w+)\)|(\w)', self.layout)]

  @property
  def is_stacked(self) -> bool:
    return '{L}' in self.hf

  @property
  def is_matrix(self) -> bool:
    """Whether it is a matrix (out, in) at Hugging Face: decayed, adaptable."""
    return len(self.groups) == 2

  @property
  def outputs(self) -> str:
    """Letters of what the matrix makes; Hugging Face puts them first."""
    return ''.join(d for d in self.dims if d in self.groups[0])

  @property
  def inputs(self) -> str:
    """Letters of what the matrix reads."""
    return ''.join(d for d in self.dims if d in self.groups[1])


def weight(
  dims: str, hf: str, layout: str = '', init: str = 'normal', std: float = 0.02
) -> nnx.Param:
  """A declared weight, without a value. `layout` defaults to `dims`."""
  layout = layout or dims
  if sorted(layout.replace('(', '').replace(')', '')) != sorted(dims):
    raise ValueError(f'{hf}: layout {layout} must hold the letters of {dims}.')
  return nnx.Param(None, dims=dims, hf=hf, layout=layout, init=init, std=std)


def is_param(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def stack(module: nnx.Module, prefix: str) -> nnx.Module:
  """The module with every weight stacked along L, named `prefix` + its name."""

  def stacked(param):
    meta = param.get_metadata()
    return param.replace(
      value=None, dims='L' + meta['dims'], hf=prefix + meta['hf']
    )

  return jax.tree.map(stacked, module, is_leaf=is_param)


def rows(module: nnx.Module) -> dict[str, Row]:
  """Every declared weight by its path, in the module's order."""
  leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_param)
  found = {}
  for keys, param in leaves:
    path = '.'.join(_name(key) for key in keys)
    meta = param.get_metadata()
    fields = ('dims', 'hf', 'layout', 'init', 'std')
    found[path] = Row(path, *(meta[field] for field in fields))
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
  return sum(math.prod(shape(row.dims, sizes)) for row in declared.values())


def initial(row: Row, sizes: Mapping[str, int], key, dtype=jnp.float32):
  """A fresh value: normal with the row's standard deviation, ones or zeros."""
  size = shape(row.dims, sizes)
  if row.init == 'normal':
    return row.std * jax.random.normal(key, size, dtype)
  return {'ones': jnp.ones, 'zeros': jnp.zeros}[row.init](size, dtype)


def initial_values(
  declared: Mapping[str, Row], sizes: Mapping[str, int], key, dtype=jnp.float32
) -> dict[str, jax.Array]:
  """Fresh values for all weights; a pure function of the key."""
  keys = jax.random.split(key, len(declared))
  return {
    path: initial(row, sizes, k, dtype)
    for (path, row), k in zip(declared.items(), keys, strict=True)
  }


def _name(key) -> str:
  return str(getattr(key, 'name', getattr(key, 'key', key)))
