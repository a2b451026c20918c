"""The chunked divergence is the plain one, and its gradient the plain one's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner.models import decoder, divergence, policy, weights

B, T, D, V = 2, 21, 8, 13
HEAD = functools.partial(decoder.head_logits, tied=False)
TIED = functools.partial(decoder.head_logits, tied=True)


def make(masked='some', dtype=np.float32):
  """(policy's head and x, the reference's, wanted)."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  wanted = np.zeros((B, T), np.float32)
  if masked == 'some':  # Few: chunks of 4 without one in either row.
    wanted[0, [0, 3, 17]], wanted[1, 20] = 1, 0.5
  elif masked == 'all':
    wanted[:] = 1
  return normal(D, V), normal(B, T, D), normal(D, V), normal(B, T, D), wanted


def chunked(params, x, others, y, wanted, chunk=4, head=HEAD):
  own = divergence.Side(params, x, head)
  return divergence.kl(own, divergence.Side(others, y, head), wanted, chunk)


def naive(params, x, others, y, wanted):
  """The definition: sum over v of p log(p / q), by softmax."""
  p = jax.nn.softmax(jnp.einsum('btd,dv->btv', x, params))
  q = jax.nn.softmax(jnp.einsum('btd,dv->btv', y, others))
  return jnp.where(wanted != 0, (p * jnp.log(p / q)).sum(-1), 0.0)


def total(fn, params, x, others, y, wanted):
  """A weighted sum, so that every token's gradient is its own."""
  out = fn(params, x, others, y, wanted)
  return (out * jnp.sin(1.0 + jnp.arange(out.size).reshape(out.shape))).sum()


@pytest.mark.parametrize('masked', ['some', 'all', 'none'])
@pytest.mark.parametrize('chunk', [4, 128])
def test_values_and_gradients_equal_those_of_the_definition(masked, chunk):
  """In float64 for the definition; by the hidden states and by the head."""
  given = make(masked)
  fn = functools.partial(chunked, chunk=chunk)
  run = lambda fn: jax.value_and_grad(functools.partial(total, fn), (0, 1))
  value, grads = jax.jit(run(fn), compiler_options=support.QUICK)(*given)
  with jax.enable_x64(True):
    exact = [np.asarray(x, np.float64) for x in given]
    expected, expected_grads = run(naive)(*exact)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
  for found, wanted in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert (masked == 'none') == (value == 0)


def test_a_tied_head_is_read_the_other_way_round():
  params, x, others, y, wanted = make('all')
  found = chunked(params.T, x, others.T, y, wanted, head=TIED)
  expected = chunked(params, x, others, y, wanted)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_reference_gets_no_gradient():
  given = make('all')
  by_reference = jax.grad(functools.partial(total, chunked), (2, 3))(*given)
  assert not any(np.asarray(grad).any() for grad in by_reference)


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e4])
def test_it_is_never_below_zero_and_zero_of_the_same(scale):
  """At logits that are all alike, and at ones that leave one token alone."""
  params, x, others, y, wanted = make('all')
  found = chunked(params * scale, x, others * scale, y, wanted)
  assert np.isfinite(found).all() and (np.asarray(found) >= 0).all()
  assert (np.asarray(found) > 0).any()
  same = chunked(params * scale, x, params * scale, x, wanted)
  assert (np.asarray(same) == 0).all()
  grads = jax.grad(functools.partial(total, chunked), (0, 1))(
    params * scale, x, params * scale, x, wanted
  )
  assert not any(np.asarray(grad).any() for grad in grads)


def test_what_is_not_wanted_may_be_infinite():
  params, x, others, y, wanted = make()
  x[0, 1], y[1, 2] = np.inf, np.nan
  run = jax.value_and_grad(functools.partial(total, chunked), (0, 1))
  found = run(params, x, others, y, wanted)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_agreement_is_of_the_most_likely_tokens():
  params, x, others, y, wanted = make()
  kl, agrees = divergence.compare(
    divergence.Side(params, x, HEAD),
    divergence.Side(others, y, HEAD),
    wanted,
    4,
  )
  np.testing.assert_allclose(
    kl, chunked(params, x, others, y, wanted), rtol=1e-6
  )
  expected = (x @ params).argmax(-1) == (y @ others).argmax(-1)
  np.testing.assert_array_equal(agrees, expected & (wanted != 0))
  x[0, 0] = y[0, 0]
  own = divergence.Side(others, x, HEAD)
  _, agrees = divergence.compare(own, divergence.Side(others, y, HEAD), wanted)
  assert agrees[0, 0]


def test_the_head_s_gradient_is_added_in_float32():
  """Of a head in bfloat16 over many chunks, each too small to be seen beside
  the sum before it."""
  params, x, others, y, wanted = make('all', jnp.bfloat16)
  many = lambda a: jnp.tile(a, (1, 40, *[1] * (a.ndim - 2)))
  x, y, wanted = many(x), many(y), many(wanted)
  sums = lambda *given: chunked(*given, chunk=1).sum()
  found = jax.jit(jax.grad(sums), compiler_options=support.QUICK)(
    params, x, others, y, wanted
  )
  wide = [a.astype(jnp.float32) for a in (params, x, others, y)]
  expected = jax.grad(lambda *given: naive(*given).sum())(*wide, wanted)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected, rtol=0.02,
    atol=0.01 * np.abs(expected).max(),
  )  # fmt: skip


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  return support.load_model(tiny_dir)


def test_a_step_holds_no_logits_of_a_row(tiny):
  """No buffer of [.., T, V] in the compiled program, forward or backward."""
  model, values = tiny
  rng = np.random.default_rng(0)
  batch = support.pack([[(rng.integers(0, 320, 200), 0)]] * 2, 208)

  def loss(values, reference):
    own, other = (
      policy.Policy(weights.fill(model, v), remat='full', chunk=16)
      for v in (values, reference)
    )
    sides = [divergence.Side.of(p, p.hidden(batch)) for p in (own, other)]
    return divergence.kl(*sides, batch['mask'], 16).sum()

  step = jax.jit(jax.value_and_grad(loss), compiler_options=support.QUICK)
  text = step.lower(values, values).compile().as_text()
  shapes = {
    tuple(map(int, found.split(',')))
    for found in re.findall(r'\bf32\[([\d,]+)\]', text)
  }
  vocabulary = model.config.V
  sizes = [np.prod(s) // vocabulary for s in shapes if vocabulary in s]
  assert any({2, 16, vocabulary} <= set(s) for s in shapes), 'no chunk seen'
  assert max(sizes) <= 2 * 16
