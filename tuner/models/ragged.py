"""Products of rows with the matrix of each row's group, as experts need them.

Rows are sorted by group: the first sizes_E[0] rows meet matrix 0, the next
sizes_E[1] matrix 1, and so on; rows after the last group give 0. Nothing is
dropped and no group has a capacity.

On accelerators this is `jax.lax.ragged_dot`. XLA:CPU computes that by masking,
every matrix with every row; so on CPU blocks of rows are multiplied in a loop.
Measured on two cores for 4096 rows, 8 matrices of 512 x 1024: ragged_dot
289 ms, and 954 ms with both gradients; an einsum with a mask 280 and 944, a
scan over the matrices 222 and 764; the blocks 29 and 88, where one matrix for
all rows, the least that it could be, takes 12 and 41.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

LEAST_BLOCK, MOST_BLOCK = 8, 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
  x_NI: jax.Array, w: jax.Array, sizes_E: jax.Array, inputs: int = 1
) -> jax.Array:
  """[N, O]: each row by the matrix of its group.

  w: [E, I, O], or [E, O, I] with inputs = 2, the axis that rows are
    contracted with.
  """
  return _product(x_NI, w, sizes_E, inputs)


def _forward(x_NI, w, sizes_E, inputs):
  return _product(x_NI, w, sizes_E, inputs), (x_NI, w, sizes_E)


def _backward(inputs, residuals, d_NO):
  x_NI, w, sizes_E = residuals
  d_x = _product(d_NO, w, sizes_E, 3 - inputs)
  sides = (x_NI, d_NO) if inputs == 1 else (d_NO, x_NI)
  d_w = _on_cpu(_outer_blocks, _outer_ragged)(*sides, sizes_E)
  return d_x, d_w.astype(w.dtype), None


product.defvjp(_forward, _backward)


def group_of_rows(sizes_E: jax.Array, rows: int) -> jax.Array:
  """The group of each row; E for those after the last group."""
  ends_E = jnp.cumsum(sizes_E)
  return (jnp.arange(rows)[:, None] >= ends_E).sum(-1)


def _product(x_NI, w, sizes_E, inputs):
  cpu = functools.partial(_product_blocks, inputs=inputs)
  default = functools.partial(_product_ragged, inputs=inputs)
  return _on_cpu(cpu, default)(x_NI, w, sizes_E)


def _on_cpu(cpu: Callable, default: Callable) -> Callable:
  """`cpu` where the program is compiled for one, else `default`."""
  return lambda *args: jax.lax.platform_dependent(
    *args, cpu=cpu, default=default
  )


def _product_ragged(x_NI, w, sizes_E, inputs):
  w = w if inputs == 1 else jnp.swapaxes(w, 1, 2)
  return jax.lax.ragged_dot(x_NI, w, sizes_E)


def _outer_ragged(x_NI, y_NO, sizes_E):
  numbers = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  return jax.lax.ragged_dot_general(x_NI, y_NO, sizes_E, numbers)


def _product_blocks(x_NI, w, sizes_E, inputs):
  """Blocks in order: what one writes past its group, the next overwrites."""
  block = _block(len(x_NI), len(w))
  x = jnp.pad(x_NI, ((0, block), (0, 0)))
  spec = 'NI,IO->NO' if inputs == 1 else 'NI,OI->NO'

  def one(out, group, start, end):
    here = jax.lax.dynamic_slice_in_dim(x, start, block)
    matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
    y = jnp.einsum(spec, here, matrix)
    y = jnp.where(_within(start, end, block), y, 0)
    return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

  out = jnp.zeros((len(x), w.shape[3 - inputs]), x.dtype)
  return _over_blocks(one, _varying_as(out, x), sizes_E, block)[: len(x_NI)]


def _outer_blocks(x_NI, y_NO, sizes_E):
  """[E, I, O]: the sum of x^T y over each group's rows."""
  block = _block(len(x_NI), len(sizes_E))
  x, y = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_NI, y_NO))

  def one(out, group, start, end):
    here = jax.lax.dynamic_slice_in_dim(x, start, block)
    here = jnp.where(_within(start, end, block), here, 0)
    there = jax.lax.dynamic_slice_in_dim(y, start, block)
    return out.at[group].add(jnp.einsum('NI,NO->IO', here, there))

  out = jnp.zeros((len(sizes_E), x.shape[1], y.shape[1]), x.dtype)
  return _over_blocks(one, _varying_as(out, x), sizes_E, block)


def _block(rows: int, groups: int) -> int:
  """Rows a block: a power of two, about the rows of a group."""
  share = max(rows // groups, 1)
  return min(MOST_BLOCK, max(LEAST_BLOCK, 1 << (share - 1).bit_length()))


def _over_blocks(one, out, sizes_E, block):
  """one(out, group, its first row, the group's end) for every block of rows.

  A group without rows has no block.
  """
  ends_E = jnp.cumsum(sizes_E)
  blocks_E = -(-sizes_E // block)
  last_E = jnp.cumsum(blocks_E)

  def body(i, out):
    group = (i >= last_E).sum()
    end = ends_E[group]
    before = i - (last_E[group] - blocks_E[group])
    return one(out, group, end - sizes_E[group] + before * block, end)

  return jax.lax.fori_loop(0, last_E[-1], body, out)


def _within(start, end, block):
  return (start + jnp.arange(block) < end)[:, None]


def _varying_as(x: jax.Array, other: jax.Array) -> jax.Array:
  """x, said to differ between the devices of a shard_map as `other` does."""
  axes = jax.typeof(other).manual_axis_type.varying
  return jax.lax.pcast(x, tuple(axes), to='varying')
