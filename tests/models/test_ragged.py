"""Products of sorted rows equal a loop over groups, and so do gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner.models import linear, ragged

ROWS, I, O = 40, 6, 5
SIZES = {
  'all': (10, 7, 23),
  'a group without rows': (17, 0, 23),
  'one group': (0, 0, 40),
  'rows after the last': (9, 4, 2),
  'no rows': (0, 0, 0),
}
# What CPUs compute, and what others do.
WAYS = {
  'blocks': (ragged._product_blocks, ragged._outer_blocks),
  'ragged': (ragged._product_ragged, ragged._outer_ragged),
}


def operands(rows=ROWS):
  rng = np.random.default_rng(0)
  shapes = (rows, I), (3, I, O), (rows, O)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def spans(sizes):
  ends = np.cumsum(sizes)
  return [slice(e - n, e) for n, e in zip(sizes, ends, strict=True)]


def looped(x, w, sizes):
  out = np.zeros((len(x), w.shape[2]), np.float32)
  for group, span in enumerate(spans(sizes)):
    out[span] = x[span] @ w[group]
  return out


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('case', SIZES)
def test_products_equal_a_loop(case, way):
  sizes = SIZES[case]
  x, w, y = operands()
  product, outer = WAYS[way]
  found = product(x, w, jnp.array(sizes), 1)
  np.testing.assert_allclose(found, looped(x, w, sizes), 1e-4, 1e-5)
  turned = product(x, w.swapaxes(1, 2), jnp.array(sizes), 2)
  np.testing.assert_allclose(turned, found, 1e-4, 1e-5)
  expected = [x[span].T @ y[span] for span in spans(sizes)]
  found = outer(x, y, jnp.array(sizes))
  np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


@pytest.mark.parametrize('rows', [1, 7, 600])
def test_blocks_of_any_size(rows):
  """A row alone, fewer than a block, more than the largest block."""
  x, w, _ = operands(rows)
  sizes = (rows // 3, 0, rows - rows // 3)
  found = ragged._product_blocks(x, w, jnp.array(sizes), 1)
  np.testing.assert_allclose(found, looped(x, w, sizes), 1e-4, 1e-5)


@pytest.mark.parametrize('inputs', [1, 2])
@pytest.mark.parametrize('case', ['all', 'rows after the last'])
def test_gradients_equal_those_of_an_einsum(case, inputs):
  x, w, y = operands()
  sizes = jnp.array(SIZES[case])
  w = w if inputs == 1 else w.swapaxes(1, 2)
  is_of_NE = jax.nn.one_hot(ragged.group_of_rows(sizes, ROWS), 3)
  spec = 'NI,NE,EIO->NO' if inputs == 1 else 'NI,NE,EOI->NO'

  def own(x, w):
    return (ragged.product(x, w, sizes, inputs) * y).sum()

  def dense(x, w):
    return (jnp.einsum(spec, x, is_of_NE, w) * y).sum()

  found, expected = (
    jax.jit(jax.grad(f, (0, 1)), compiler_options=support.QUICK)(x, w)
    for f in (own, dense)
  )
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def test_gradients_keep_each_dtype():
  x, w, _ = operands()
  w = jnp.asarray(w, jnp.bfloat16)
  sizes = jnp.array(SIZES['all'])

  def total(x, w):
    return ragged.product(x, w, sizes).sum()

  d_x, d_w = jax.grad(total, (0, 1))(jnp.asarray(x, jnp.bfloat16), w)
  assert d_x.dtype == d_w.dtype == jnp.bfloat16


def test_an_adapter_of_groups_equals_the_whole_matrices():
  """Values and gradients, with outputs of two letters."""
  x, w, _ = operands()
  rng = np.random.default_rng(1)
  a = rng.standard_normal((3, 2, I), np.float32)
  b = rng.standard_normal((3, 2, 2, O), np.float32)
  base = np.stack([w, 2 * w], axis=2)
  sizes = jnp.array(SIZES['a group without rows'])
  y = rng.standard_normal((ROWS, 2, O), np.float32)

  def attached(x, base, a, b):
    weight = linear.Lora(base, a, b, scale=0.5)
    return (linear.grouped(x, weight, sizes) * y).sum()

  def whole(x, base, a, b):
    w = base + 0.5 * jnp.einsum('ERI,ERCO->EICO', a, b)
    return (linear.grouped(x, w, sizes) * y).sum()

  args = x, base, a, b
  found = jax.value_and_grad(attached, (0, 1, 2, 3))(*args)
  expected = jax.value_and_grad(whole, (0, 1, 2, 3))(*args)
  np.testing.assert_allclose(found[0], expected[0], 1e-4)
  for one, other in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(one, other, 1e-4, 1e-4)


def test_biases_are_those_of_each_rows_group():
  bias = np.arange(6.0, dtype=np.float32).reshape(3, 2)
  found = linear.grouped_bias(bias, jnp.array([1, 0, 2]), 4)
  expected = [bias[0], bias[2], bias[2], [0, 0]]
  np.testing.assert_array_equal(found, expected)
