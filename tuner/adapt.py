"""What trains, and how it joins the frozen weights.

`full` and `lora` return an adaptation: which weights stay frozen, what the
trainable tree holds (dims, initial values) and how both make a filled model.
Both trees are flat, {path: array}. Frozen weights get no gradient and no
optimizer state.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tuner import named
from tuner.models import linear, weights

Rows = Mapping[str, weights.Row]
Tree = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Full:
  """Every weight trains; nothing is frozen."""

  rows: Rows

  @property
  def dims(self) -> dict[str, str]:
    """The dims of each trainable array."""
    return {path: row.dims for path, row in self.rows.items()}

  @property
  def matrices(self) -> dict[str, tuple[str, str]]:
    """(inputs, outputs) letters of each trainable matrix."""
    rows = self.rows.items()
    return {p: (r.inputs, r.outputs) for p, r in rows if r.is_matrix}

  rate_scale = 1.0
  is_adapter = False

  def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable array."""
    return {path: row.shape(sizes) for path, row in self.rows.items()}

  def split(self, base: Tree) -> tuple[Tree, Tree]:
    """(frozen, the weights that start the trainable tree)."""
    return {}, base

  def initial(self, sizes: Mapping[str, int], key: jax.Array) -> Tree:
    """What the trainable tree holds beside the base's weights: nothing."""
    del sizes, key
    return {}

  def attach(self, frozen: Tree, trainable: Tree, key=None) -> dict[str, Any]:
    """The weights of the tuned model, by path."""
    del key
    return {**frozen, **trainable}

  def base(self, frozen: Tree) -> dict[str, Any]:
    """The weights of the untuned model. Raises: full fine-tuning moves them."""
    raise ValueError(
      'config.adapt: full fine-tuning keeps no untuned reference; use lora for '
      f'an objective that needs one ({len(frozen)} frozen weights).'
    )


@dataclasses.dataclass(frozen=True)
class LoraAdaptation:
  """Low-rank factors `path.a` [R, inputs] and `path.b` [R, outputs] train."""

  rows: Rows
  targets: tuple[str, ...]
  rank: int
  scale: float
  dropout: float
  rate_scale: float

  is_adapter = True

  @property
  def dims(self) -> dict[str, str]:
    """The dims of each trainable array."""
    dims = {}
    for path in self.targets:
      row = self.rows[path]
      dims[f'{path}.a'] = f'{row.lead}R{row.inputs}'
      dims[f'{path}.b'] = f'{row.lead}R{row.outputs}'
    return dims

  def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable array."""
    shapes = {}
    for path in self.targets:
      own = {**sizes, 'L': len(self.rows[path].layers), 'R': self.rank}
      for name in (f'{path}.a', f'{path}.b'):
        shapes[name] = weights.shape(self.dims[name], own)
    return shapes

  @property
  def matrices(self) -> dict[str, tuple[str, str]]:
    """(inputs, outputs) letters of each trainable matrix."""
    found = {}
    for path in self.targets:
      found[f'{path}.a'] = (self.rows[path].inputs, 'R')
      found[f'{path}.b'] = ('R', self.rows[path].outputs)
    return found

  def split(self, base: Tree) -> tuple[Tree, Tree]:
    """(frozen, the weights that start the trainable tree): all, none."""
    return base, {}

  def initial(self, sizes: Mapping[str, int], key: jax.Array) -> Tree:
    """a uniform in +-1/sqrt(inputs), as `peft` draws it; b zero."""
    shapes, tree = self.shapes(sizes), {}
    for i, path in enumerate(self.targets):
      inputs = math.prod(sizes[d] for d in self.rows[path].inputs)
      bound = 1 / math.sqrt(inputs)
      tree[f'{path}.a'] = jax.random.uniform(
        jax.random.fold_in(key, i), shapes[f'{path}.a'],
        minval=-bound, maxval=bound,
      )  # fmt: skip
      tree[f'{path}.b'] = jnp.zeros(shapes[f'{path}.b'])
    return tree

  def attach(self, frozen: Tree, trainable: Tree, key=None) -> dict[str, Any]:
    """The weights of the tuned model, by path; `key` turns dropout on."""
    attached = dict(frozen)
    for i, path in enumerate(self.targets):
      base = frozen[path]
      keys = None
      if key is not None and self.dropout > 0:
        keys = jax.random.fold_in(key, i)
        if 'L' in self.rows[path].lead:
          keys = jax.random.split(keys, base.shape[0])
      attached[path] = linear.Lora(
        base,
        trainable[f'{path}.a'].astype(base.dtype),
        trainable[f'{path}.b'].astype(base.dtype),
        keys,
        self.scale,
        self.dropout,
      )
    return attached

  def base(self, frozen: Tree) -> dict[str, Any]:
    """The weights of the untuned model: the reference of DPO."""
    return dict(frozen)


Adaptation = Full | LoraAdaptation


def full(rows: Rows) -> Full:
  """Every weight trains."""
  return Full(rows)


def lora(
  rows: Rows,
  rank: int = 16,
  alpha: float = 32.0,
  targets: str | Sequence[str] = 'all-linear',
  dropout: float = 0.0,
  scaling: str = 'lora',
  lr_ratio: float = 1.0,
) -> LoraAdaptation:
  """Low-rank adapters on chosen matrices (Hu et al. 2021).

  targets: 'all-linear' (every matrix of the blocks), names ('q', 'o_proj',
    'blocks.0.mlp.down') or letters of dims ('N': all that touch query heads).
  scaling: 'lora' alpha / rank; 'rslora' alpha / sqrt(rank).
  lr_ratio: learning rate of b over that of a (LoRA+, Hayou et al. 2024).
  """
  if rank < 1:
    raise ValueError(f'config.adapt.rank: {rank}; it must be at least 1.')
  for key, value in (('alpha', alpha), ('lr_ratio', lr_ratio)):
    if not value > 0:
      raise ValueError(f'config.adapt.{key}: {value}; it must be above 0.')
  if not 0 <= dropout < 1:
    raise ValueError(f'config.adapt.dropout: {dropout}; it must be in [0, 1).')
  scales = {'lora': alpha / rank, 'rslora': alpha / math.sqrt(rank)}
  if scaling not in scales:
    raise ValueError(
      f'config.adapt.scaling: {scaling!r}; allowed are {", ".join(scales)}.'
    )
  chosen = select(rows, targets)
  return LoraAdaptation(rows, chosen, rank, scales[scaling], dropout, lr_ratio)


def select(declared: Rows, targets: str | Sequence[str]) -> tuple[str, ...]:
  """The paths that `targets` names. Raises ValueError for what names none."""
  linears = {
    path: row
    for path, row in declared.items()
    if row.is_matrix and path.startswith('blocks.')
  }
  if targets == 'all-linear':
    return tuple(linears)
  chosen: set[str] = set()
  for target in [targets] if isinstance(targets, str) else targets:
    found = {p for p, row in linears.items() if _matches(target, p, row)}
    if not found:
      raise ValueError(_names_nothing(target, linears))
    chosen |= found
  if not chosen:
    raise ValueError(_names_nothing(targets, linears))
  return tuple(path for path in linears if path in chosen)


def _names_nothing(target: str | Sequence[str], linears: Rows) -> str:
  """What to say of a target that is no matrix, with the nearest that is."""
  names = sorted({path.rpartition('.')[2] for path in linears})
  known = [name for p, row in linears.items() for name in _names(p, row)]
  hint = named.nearest(str(target), known) or '.'
  return (
    f'config.adapt.targets: {target!r} names no matrix of the blocks{hint} '
    f'Names are {", ".join(names)}; letters are those of their dims.'
  )


def _matches(target: str, path: str, row: weights.Row) -> bool:
  if len(target) == 1 and target.isupper():
    return target in row.dims[len(row.lead) :]
  return target in _names(path, row)


def _names(path: str, row: weights.Row) -> tuple[str, str, str]:
  """('q', 'q_proj', 'blocks.0.attention.q')."""
  hf_name = row.hf.removesuffix('.weight').rpartition('.')[2]
  return path.rpartition('.')[2], hf_name, path


def merge(declared: Rows, attached: Mapping[str, Any], path: str) -> jax.Array:
  """The plain array that the attached weight at `path` stands for."""
  row = declared[path]
  if not isinstance(attached[path], linear.Lora):
    return attached[path]
  return linear.merged(attached[path], row)
