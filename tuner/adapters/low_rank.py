"""Adapters of low rank: LoRA, rsLoRA, DoRA, and parts that train whole.

`path.a` [lead, R, inputs] and `path.b` [lead, R, outputs] train, with DoRA also
`path.m` [lead, outputs]. Layers of one stack may differ in rank and scale, as a
`peft` adapter's do: R is the greatest, and the rest of a and of b is zero. Such
a row of a gets the gradient b g = 0, and of b g (a x) = 0, so that it stays
zero.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import linear, weights

Rows = Mapping[str, weights.Row]
Tree = dict[str, jax.Array]
SCALINGS = {
  'lora': lambda alpha, rank: alpha / rank,
  'rslora': lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """Of one target: ranks and alphas of the layers along L, in order.

  One of each where nothing is stacked. Rank 0 is a layer without an adapter.
  """

  ranks: tuple[int, ...]
  alphas: tuple[float, ...]

  @property
  def rank(self) -> int:
    """R of the stack."""
    return max(self.ranks)

  def scales(self, scaling: str) -> tuple[float, ...]:
    """What each layer's product is multiplied by; 1 where there is none."""
    both = zip(self.alphas, self.ranks, strict=True)
    return tuple(SCALINGS[scaling](a, r) if r else 1.0 for a, r in both)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """What trains beside the frozen weights, and how they join.

  sizes: rank and alpha of each target, by path.
  kind: 'lora' or 'dora'. scaling: a key of SCALINGS.
  saved: paths that train whole.
  given: values to start from, by path of the trainable tree; others are fresh.
  facts: what a resumed run must have in common beside the config.
  """

  rows: Rows
  sizes: Mapping[str, Size]
  dropout: float = 0.0
  rate_scale: float = 1.0
  kind: str = 'lora'
  scaling: str = 'lora'
  saved: tuple[str, ...] = ()
  given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  is_adapter = True

  @property
  def targets(self) -> tuple[str, ...]:
    """The adapted paths."""
    return tuple(self.sizes)

  @property
  def rank(self) -> int:
    """The greatest rank."""
    return max(size.rank for size in self.sizes.values())

  @property
  def scale(self) -> float:
    """The scale of all. Raises ValueError where they differ."""
    found = {s for size in self.sizes.values() for s in self._scales(size)}
    if len(found) > 1:
      raise ValueError(f'scales differ: {sorted(found)}.')
    return found.pop()

  def _scales(self, size: Size) -> set[float]:
    both = zip(size.scales(self.scaling), size.ranks, strict=True)
    return {scale for scale, rank in both if rank}

  @property
  def dims(self) -> dict[str, str]:
    """The dims of each trainable array."""
    dims = {}
    for path in self.targets:
      row = self.rows[path]
      dims[f'{path}.a'] = f'{row.lead}R{row.inputs}'
      dims[f'{path}.b'] = f'{row.lead}R{row.outputs}'
      if self.kind == 'dora':
        dims[f'{path}.m'] = f'{row.lead}{row.outputs}'
    return dims | {path: self.rows[path].dims for path in self.saved}

  def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable array."""
    dims, shapes = self.dims, {}
    for path, size in self.sizes.items():
      own = {**sizes, 'L': len(self.rows[path].layers), 'R': size.rank}
      for name in (f'{path}.a', f'{path}.b', f'{path}.m'):
        if name in dims:
          shapes[name] = weights.shape(dims[name], own)
    return shapes | {path: self.rows[path].shape(sizes) for path in self.saved}

  @property
  def matrices(self) -> dict[str, tuple[str, str]]:
    """(inputs, outputs) letters of each trainable matrix."""
    found = {}
    for path in self.targets:
      found[f'{path}.a'] = (self.rows[path].inputs, 'R')
      found[f'{path}.b'] = ('R', self.rows[path].outputs)
    for path in self.saved:
      row = self.rows[path]
      if row.is_matrix:
        found[path] = (row.inputs, row.outputs)
    return found

  def split(self, base: Tree) -> tuple[Tree, Tree]:
    """(frozen, the weights that move into the trainable tree): all, none.

    What trains whole starts as a copy: the untuned model keeps its own.
    """
    return base, {}

  def initial(
    self, sizes: Mapping[str, int], key: jax.Array, base: Tree | None = None
  ) -> Tree:
    """What the trainable tree starts with, but for what is given.

    a uniform in +-1/sqrt(inputs), as `peft` draws it; b zero; m the lengths
    of the base's matrices. base: needed for m and for what trains whole.
    """
    shapes, tree = self.shapes(sizes), {}
    for i, path in enumerate(self.targets):
      row = self.rows[path]
      bound = 1 / math.sqrt(math.prod(sizes[d] for d in row.inputs))
      if f'{path}.a' not in self.given:
        tree[f'{path}.a'] = jax.random.uniform(
          jax.random.fold_in(key, i), shapes[f'{path}.a'],
          minval=-bound, maxval=bound,
        )  # fmt: skip
        tree[f'{path}.b'] = jnp.zeros(shapes[f'{path}.b'])
      if self.kind == 'dora' and f'{path}.m' not in self.given:
        assert base is not None
        tree[f'{path}.m'] = linear.lengths(
          base[path], row.dims, row.lead, row.inputs, row.outputs
        )
    for path in self.saved:
      if path not in self.given:
        assert base is not None
        tree[path] = jnp.copy(base[path])  # Else jit returns the base's own.
    return tree

  def attach(self, frozen: Tree, trainable: Tree, key=None) -> dict[str, Any]:
    """The weights of the tuned model, by path; `key` turns dropout on."""
    attached = dict(frozen) | {path: trainable[path] for path in self.saved}
    for i, path in enumerate(self.targets):
      keys = None
      if key is not None and self.dropout > 0:
        keys = jax.random.fold_in(key, i)
        if 'L' in self.rows[path].lead:
          keys = jax.random.split(keys, frozen[path].shape[0])
      attached[path] = self._weight(path, frozen[path], trainable, keys)
    return attached

  def _weight(self, path: str, base, trainable: Tree, keys):
    """The weight kind at `path`.

    Its scale is one for the stack; a layer whose own differs has b multiplied
    by their ratio, in the step: the trained b stays what `peft` stores.
    """
    size = self.sizes[path]
    scales = size.scales(self.scaling)
    scale = max(self._scales(size), default=1.0)
    b = trainable[f'{path}.b']
    if len(self._scales(size)) > 1:
      ratios = np.array(scales, np.float32) / np.float32(scale)
      b = b * ratios.reshape(-1, *[1] * (b.ndim - 1)).astype(b.dtype)
    a, b = trainable[f'{path}.a'].astype(base.dtype), b.astype(base.dtype)
    if self.kind == 'lora':
      return linear.Lora(base, a, b, keys, scale, self.dropout)
    m = trainable[f'{path}.m']
    if 0 in size.ranks:  # A layer without an adapter keeps its own length.
      row, has = self.rows[path], np.array(size.ranks) > 0
      own = linear.lengths(base, row.dims, row.lead, row.inputs, row.outputs)
      own = jax.lax.stop_gradient(own)
      m = jnp.where(has.reshape(-1, *[1] * (m.ndim - 1)), m, own)
    return linear.Dora(base, a, b, m, keys, scale, self.dropout)

  def base(self, frozen: Tree) -> dict[str, Any]:
    """The weights of the untuned model: the reference of DPO."""
    return dict(frozen)
