"""Factors of single layers -> the arrays of a stack, padded to one rank."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tuner.adapters import low_rank
from tuner.models import weights


class Factors(NamedTuple):
  """One layer's, in this project's letters. m: None but of DoRA."""

  a: np.ndarray
  b: np.ndarray
  m: np.ndarray | None
  rank: int
  alpha: float


Held = Mapping[tuple, Factors]


def stacked(
  row: weights.Row, sizes: Mapping[str, int], held: Held, is_dora: bool
) -> tuple[low_rank.Size, dict[str, np.ndarray], list[str]]:
  """(size, values by path of the trainable tree, what is wrong).

  held: the factors of the layers that have some, by index in the stack.
  """
  count = len(row.layers) or 1
  layers, faults = _by_layer(row, sizes, held)
  if not layers:
    return low_rank.Size((0,) * count, (1.0,) * count), {}, faults
  usual = next(iter(layers.values())).alpha
  size = low_rank.Size(
    tuple(layers[i].rank if i in layers else 0 for i in range(count)),
    tuple(layers[i].alpha if i in layers else usual for i in range(count)),
  )
  own = {**sizes, 'L': count, 'R': size.rank}
  dims = {'a': f'R{row.inputs}', 'b': f'R{row.outputs}'}
  if is_dora:
    dims['m'] = row.outputs
  values = {}
  for kind, letters in dims.items():
    value = np.zeros(weights.shape(row.lead + letters, own), np.float32)
    for layer, factors in layers.items():
      place = value[layer] if 'L' in row.lead else value
      if kind == 'm':
        place[...] = factors.m
      else:
        wide = _rank_last(getattr(factors, kind), row)
        _rank_last(place, row)[..., : factors.rank] = wide
    values[f'{row.path}.{kind}'] = value
  return size, values, faults


def _by_layer(row: weights.Row, sizes: Mapping[str, int], held: Held):
  """({layer: factors}, faults); experts said one by one are stacked."""
  if 'E' not in row.lead or all(len(index) == 1 for index in held):
    return {(index[0] if index else 0): own for index, own in held.items()}, []
  if any(len(index) == 1 for index in held):
    return {}, [f'{row.hf}: experts of some layers one by one, of others not']
  found, faults = {}, []
  for layer in sorted({index[0] for index in held}):
    own = {i[1]: factors for i, factors in held.items() if i[0] == layer}
    missing = sorted(set(range(sizes['E'])) - set(own))
    settled = {(factors.rank, factors.alpha) for factors in own.values()}
    if missing or len(settled) > 1:
      why = 'experts differ in rank or alpha'
      if missing:
        why = f'experts {missing} have none'
      name = row.hf.replace('{L}', str(row.layers[layer]))
      faults.append(f'{name}: {why}')
      continue
    a = np.stack([own[e].a for e in sorted(own)])
    b = np.stack([own[e].b for e in sorted(own)])
    found[layer] = Factors(a, b, None, *settled.pop())
  return found, faults


def _rank_last(factor: np.ndarray, row: weights.Row) -> np.ndarray:
  """A view with R, which follows E where there is one, as the last axis."""
  return np.moveaxis(factor, 1 if 'E' in row.lead else 0, -1)
