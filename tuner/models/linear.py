"""`project`: one contraction for every kind of weight.

A weight is an array or a weight kind: a pytree that knows how to be projected
through, such as `Lora(base, a, b)`. Kinds nest (a Lora over a quantised base),
stack along L and pass through `lax.scan` like arrays.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuner.models import layers, ragged, weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """base + scale * a^T b (Hu et al. 2021), never multiplied out.

  base: the frozen weight, array or kind.
  a_RI: [R, inputs...], b_RO: [R, outputs...]. R stands first in both: on CPU
    the gradient of an [I, R] factor runs at a seventh of the speed.
  key: a dropout key, or None for no dropout on the adapter's input.
  scale: alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski 2023).
  rate: dropout rate in [0, 1).
  """

  base: Any
  a_RI: Any
  b_RO: Any
  key: Any = None
  scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  rate: float = dataclasses.field(default=0.0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora:
  """m * V / |V|, V = base + scale * a^T b, |V| over inputs (Liu et al. 2024).

  Where m is |base| and b is zero, it is the base. |V| is a constant to the
  gradient (section 4.3). m_O: [outputs...], in float32 whatever is computed
  in: rounded to bfloat16 it would move every output at the start. Others: see
  Lora; dropout is on the input of a alone.
  """

  base: Any
  a_RI: Any
  b_RO: Any
  m_O: Any
  key: Any = None
  scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  rate: float = dataclasses.field(default=0.0, metadata=dict(static=True))

  @property
  def direction(self) -> Lora:
    """V, whose length does not count."""
    own = (self.base, self.a_RI, self.b_RO, self.key, self.scale, self.rate)
    return Lora(*own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
  """Several low-rank adapters over one base, of which each row goes by one.

  Row b goes by adapter row_B[b]; 0 is the base alone. All products are made at
  once: the adapters' factors stand side by side along R, and what is not the
  row's own is made zero between a and b.

  base, a_RI, b_RO: see Lora. factors_AO: what outputs are multiplied by, for
    the base (1) and each adapter, where one is a Dora; else None.
  row_B: set by `for_rows`, of length 0 until then.
  owners, scales: of each of R, the adapter's number and scale.
  """

  base: Any
  a_RI: Any
  b_RO: Any
  factors_AO: Any
  row_B: Any
  owners: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
  scales: tuple[float, ...] = dataclasses.field(metadata=dict(static=True))
  count: int = dataclasses.field(metadata=dict(static=True))


def cast(
  values: Mapping[str, Any], dtype: Any, rows: Mapping[str, weights.Row]
) -> dict[str, Any]:
  """The weights, by path, with their floating arrays in `dtype`.

  Magnitudes and what is declared to be kept in another dtype stay as they are.
  """

  def one(keys, x):
    x = value_of(x)
    is_own = rows[keys[0].key].kept_in or getattr(keys[-1], 'name', '') == 'm_O'
    is_floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if is_floating and not is_own else x

  return jax.tree_util.tree_map_with_path(one, dict(values))


def value_of(weight: Any) -> Any:
  """The array or weight kind inside an nnx variable, or the thing itself."""
  return weight.get_value() if isinstance(weight, nnx.Variable) else weight


def project(spec: str, x: jax.Array, weight: Any) -> jax.Array:
  """x contracted with a weight of any kind: `project('BTD,DF->BTF', x, w)`."""
  weight = value_of(weight)
  if isinstance(weight, Lora):
    return _project_lora(spec, x, weight)
  if isinstance(weight, Dora):
    return _project_dora(spec, x, weight)
  if isinstance(weight, Adapters):
    return _project_adapters(spec, x, weight)
  return contract(spec, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """einsum of x and an array, with its gradients stated as einsums, too.

  JAX's own rule makes the weight's gradient transposed; XLA:CPU then computes
  everything that leads to it column by column (measured: 55 ms where 2 would
  do).
  """
  return jnp.einsum(spec, x, weight)


def _contract_forward(spec, x, weight):
  return jnp.einsum(spec, x, weight), (x, weight)


def _contract_backward(spec, residuals, d_out):
  x, weight = residuals
  operands, result = spec.split('->')
  xs, ws = operands.split(',')
  d_x = jnp.einsum(f'{result},{ws}->{xs}', d_out, weight)
  d_weight = jnp.einsum(f'{xs},{result}->{ws}', x, d_out)
  return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def _project_lora(spec: str, x: jax.Array, weight: Lora) -> jax.Array:
  operands, result = spec.split('->')
  xs, ws = operands.split(',')
  inputs = ''.join(d for d in ws if d not in result)
  outputs = ''.join(d for d in ws if d in result)
  inner = ''.join(d for d in xs if d not in inputs) + 'R'
  dropped = x
  if weight.key is not None and weight.rate > 0:
    keep = jax.random.bernoulli(weight.key, 1 - weight.rate, x.shape)
    dropped = jnp.where(keep, x / (1 - weight.rate), 0).astype(x.dtype)
  low = contract(f'{xs},R{inputs}->{inner}', dropped, weight.a_RI)
  delta = contract(f'{inner},R{outputs}->{result}', low, weight.b_RO)
  return project(spec, x, weight.base) + layers.scaled(delta, weight.scale)


def _project_dora(spec: str, x: jax.Array, weight: Dora) -> jax.Array:
  operands, result = spec.split('->')
  ws = operands.split(',')[1]
  inputs = ''.join(d for d in ws if d not in result)
  outputs = ''.join(d for d in ws if d in result)
  norm_O = lengths(weight.direction, ws, '', inputs, outputs)
  factor_O = weight.m_O.astype(jnp.float32) / jax.lax.stop_gradient(norm_O)
  out = project(spec, x, weight.direction)
  order = [outputs.index(d) for d in result if d in outputs]
  shape = [n if d in outputs else 1 for d, n in zip(result, out.shape)]
  return (out * factor_O.transpose(order).reshape(shape)).astype(out.dtype)


def _project_adapters(spec: str, x: jax.Array, weight: Adapters) -> jax.Array:
  operands, result = spec.split('->')
  xs, ws = operands.split(',')
  assert xs[0] == result[0] == 'B' and len(weight.row_B) == len(x), spec
  inputs = ''.join(d for d in ws if d not in result)
  outputs = ''.join(d for d in ws if d in result)
  inner = ''.join(d for d in xs if d not in inputs) + 'R'
  is_own_BR = weight.row_B[:, None] == jnp.array(weight.owners)
  share_BR = jnp.where(is_own_BR, jnp.array(weight.scales), 0)
  low = contract(f'{xs},R{inputs}->{inner}', x, weight.a_RI)
  share = share_BR.reshape(len(x), *[1] * (low.ndim - 2), -1)
  low = (low * share).astype(x.dtype)
  delta = contract(f'{inner},R{outputs}->{result}', low, weight.b_RO)
  out = project(spec, x, weight.base) + delta
  if weight.factors_AO is None:
    return out
  factor = weight.factors_AO[weight.row_B]
  order = [outputs.index(d) + 1 for d in result if d in outputs]
  shape = [n if d in 'B' + outputs else 1 for d, n in zip(result, out.shape)]
  return (out * factor.transpose(0, *order).reshape(shape)).astype(out.dtype)


def for_rows(model: Any, adapter_B: jax.Array) -> Any:
  """The model whose rows go each by its adapter; only `Adapters` change."""

  def one(weight):
    if not isinstance(weight, Adapters):
      return weight
    lead = weight.row_B.shape[:-1]
    rows = jnp.broadcast_to(adapter_B, (*lead, len(adapter_B)))
    return dataclasses.replace(weight, row_B=rows)

  is_kind = lambda x: isinstance(x, Adapters)
  return jax.tree.map(one, model, is_leaf=is_kind)


def lengths(
  weight: Lora | jax.Array, dims: str, lead: str, inputs: str, outputs: str
) -> jax.Array:
  """float32 |W + s a^T b| over the inputs of each output, [lead, outputs].

  |W|^2 + 2 s <W, a^T b> + s^2 |a^T b|^2, so that nothing of W's size is made,
  and a zero b leaves |W| to the bit. Of an array: |W|.
  """
  sum_of = functools.partial(
    jnp.einsum, precision='highest', preferred_element_type=jnp.float32
  )
  base = value_of(weight.base if isinstance(weight, Lora) else weight)
  read = tuple(dims.index(d) for d in inputs)
  square = jnp.sum(jnp.square(base.astype(jnp.float32)), read)
  if not isinstance(weight, Lora):
    return jnp.sqrt(square)
  a, b = weight.a_RI, weight.b_RO.astype(jnp.float32)
  low, high = f'{lead}R{inputs}', f'{lead}R{outputs}'
  of_base = sum_of(f'{dims},{low}->{high}', base, a)
  # A second name for R, which no letter of the alphabet in `dims` has.
  other = next(letter for letter in 'PQU' if letter not in dims)
  of_a = sum_of(f'{low},{lead}{other}{inputs}->{lead}R{other}', a, a)
  of_both = sum_of(f'{lead}R{other},{lead}{other}{outputs}->{high}', of_a, b)
  change = 2 * weight.scale * of_base + weight.scale**2 * of_both
  added = jnp.sum(b * change, len(lead))
  return jnp.sqrt(jnp.maximum(square + added, 0))


def grouped(x: jax.Array, weight: Any, group_sizes: jax.Array) -> jax.Array:
  """[N, outputs...]: rows x [N, inputs], each by the matrix of its group.

  weight: an array [E, inputs, outputs...] or a Lora without dropout over one;
    the first group_sizes[0] rows meet weight[0], and so on, see `ragged`.
  """
  weight = value_of(weight)
  assert not isinstance(weight, Dora), 'refused by tuner.adapt'
  if not isinstance(weight, Lora):
    flat = weight.reshape(*weight.shape[:2], -1)
    out = ragged.product(x, flat, group_sizes)
    return out.reshape(-1, *weight.shape[2:])
  assert weight.key is None or not weight.rate, 'refused by tuner.adapt'
  low = ragged.product(x, weight.a_RI, group_sizes, 2)
  delta = grouped(low, weight.b_RO, group_sizes)
  base = grouped(x, weight.base, group_sizes)
  return base + layers.scaled(delta, weight.scale)


def grouped_bias(bias: Any, group_sizes: jax.Array, rows: int) -> jax.Array:
  """[N, outputs...]: the bias [E, outputs...] of each row's group; else 0."""
  bias = value_of(bias)
  group_N = ragged.group_of_rows(group_sizes, rows)
  is_of_NE = jax.nn.one_hot(group_N, len(bias), dtype=bias.dtype)
  out = contract('NE,EO->NO', is_of_NE, bias.reshape(len(bias), -1))
  return out.reshape(rows, *bias.shape[1:])


def merged(weight: Any, row: weights.Row) -> jax.Array:
  """A plain array that projects as `weight` does; row: its declaration."""
  if isinstance(weight, Dora):
    return _merged_dora(weight, row)
  if not isinstance(weight, Lora):
    return weight
  return _sum(weight, row).astype(merged(weight.base, row).dtype)


def _merged_dora(weight: Dora, row: weights.Row) -> jax.Array:
  direction, lead = weight.direction, row.lead
  norm_O = lengths(direction, row.dims, lead, row.inputs, row.outputs)
  factor_O = weight.m_O.astype(jnp.float32) / norm_O
  spec = f'{row.dims},{lead}{row.outputs}->{row.dims}'
  scaled = jnp.einsum(spec, _sum(direction, row), factor_O)
  return scaled.astype(weight.base.dtype)


def _sum(weight: Lora, row: weights.Row) -> jax.Array:
  """base + scale * a^T b, in float32."""
  lead = row.lead
  spec = f'{lead}R{row.inputs},{lead}R{row.outputs}->{row.dims}'
  # Widened first: XLA:CPU has no product of bfloat16 in every order of axes.
  a_RI, b_RO = (x.astype(jnp.float32) for x in (weight.a_RI, weight.b_RO))
  delta = jnp.einsum(spec, a_RI, b_RO, precision='highest')
  base = merged(weight.base, row)
  return base.astype(jnp.float32) + weight.scale * delta


def adapters(
  rows: Mapping[str, weights.Row],
  base: Mapping[str, Any],
  attached: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  """The base's weights with all adapters attached, by path.

  rows: the model's declared weights. base: its arrays. attached: of each
  adapter, numbered from 1, the weights that its adaptation's `attach` makes of
  the same arrays. Raises ValueError for weights that differ otherwise than by
  an adapter of low rank, and for adapters of experts.
  """
  found = dict(base)
  for path, own in base.items():
    kinds = [one[path] for one in attached]
    if any(kind is not own for kind in kinds):
      found[path] = _side_by_side(rows[path], own, kinds)
  return found


def _side_by_side(row: weights.Row, base, kinds) -> Adapters:
  a, b, owners, scales, factors = [], [], [], [], []
  ones = jnp.ones([base.shape[row.dims.index(d)] for d in _lead_outputs(row)])
  for number, kind in enumerate(kinds, 1):
    is_low = isinstance(kind, Lora | Dora) and kind.base is base
    if kind is not base and (not is_low or 'E' in row.lead):
      what = 'an adapter of experts' if is_low else 'no adapter of the base'
      raise ValueError(
        f'{row.path}: adapter {number} has {what} there; only low-rank '
        'adapters of dense matrices can share a batch. Use one at a time.'
      )
    factor = ones
    if isinstance(kind, Dora):
      norm = lengths(
        kind.direction, row.dims, row.lead, row.inputs, row.outputs
      )
      factor = kind.m_O.astype(jnp.float32) / norm
    factors.append(factor)
    if is_low:
      a.append(kind.a_RI)
      b.append(kind.b_RO)
      rank = kind.a_RI.shape[len(row.lead)]
      owners += [number] * rank
      scales += [kind.scale] * rank
  axis = len(row.lead)
  has_factors = any(isinstance(kind, Dora) for kind in kinds)
  return Adapters(
    base,
    jnp.concatenate(a, axis),
    jnp.concatenate(b, axis),
    jnp.stack([ones, *factors], axis) if has_factors else None,
    jnp.zeros((*base.shape[:axis], 0), jnp.int32),
    tuple(owners),
    tuple(scales),
    len(kinds),
  )


def _lead_outputs(row: weights.Row) -> str:
  return row.lead + row.outputs


def count_adapters(model: Any) -> int:
  """How many adapters the model's rows may go by, the base not counted."""
  is_kind = lambda x: isinstance(x, Adapters)
  leaves = jax.tree.leaves(model, is_leaf=is_kind)
  return max((x.count for x in leaves if is_kind(x)), default=0)
