"""Banded attention equals full attention, and both equal plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner.models import attention

N, K, H = 4, 2, 4
# length, longest segment, window. Rows end in a little padding; blocks are of
# 64 or more, so that only the lengths past 128 are banded.
CASES = [
  (200, 40, None),
  (257, 70, None),
  (130, 60, 9),
  (320, 320, 33),
  (200, 50, 500),
  (50, 20, None),
]


def make(length, longest, seed=0):
  """(q, k, v, segments): two rows of random segments and some padding."""
  rng = np.random.default_rng(seed)
  segments = np.zeros((2, length), np.int32)
  for row in segments:
    start, segment = 0, 1
    while start < length - 7:
      size = min(rng.integers(longest // 2, longest, endpoint=True), longest)
      row[start : min(start + size, length - 7)] = segment
      start, segment = start + size, segment + 1
  q, k, v = (
    rng.standard_normal((2, length, n, H)).astype(np.float32) for n in (N, K, K)
  )
  return q, k, v, segments


def reference(q, k, v, segments, window, cap=None, sinks=None):
  """Softmax attention, one query at a time, in float64."""
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    first = 0 if window is None else max(0, t - window + 1)
    seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
    head = n // (N // K)
    scores = k[b, seen, head].astype(float) @ q[b, t, n] / np.sqrt(H)
    if cap is not None:
      scores = cap * np.tanh(scores / cap)
    probs = np.exp(scores)
    rest = 0 if sinks is None else np.exp(sinks[n])
    out[b, t, n] = probs @ v[b, seen, head] / (probs.sum() + rest)
  return out


@functools.partial(
  jax.jit,
  static_argnames=('window', 'reach', 'cap'),
  compiler_options=support.QUICK,
)
def run(q, k, v, segments, window, reach, cap=None, sinks=None):
  """(out at real tokens, gradients of a weighted sum of them)."""

  look = attention.Look(H**-0.5, window, cap)

  def total(q, k, v):
    out = attention.packed(q, k, v, segments, look, sinks, reach)
    out = jnp.where((segments > 0)[..., None, None], out, 0.0)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

  grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return out, grads


@pytest.mark.parametrize('length, longest, window', CASES)
def test_banded_equals_full_and_numpy(length, longest, window):
  """Values and gradients, at every real token."""
  q, k, v, segments = make(length, longest)
  out, grads = run(q, k, v, segments, window, longest)
  full, full_grads = run(q, k, v, segments, window, None)
  np.testing.assert_allclose(out, full, rtol=1e-5, atol=1e-5)
  for grad, full_grad in zip(grads, full_grads, strict=True):
    np.testing.assert_allclose(grad, full_grad, rtol=1e-5, atol=1e-5)
  expected = reference(q, k, v, segments, window)
  real = segments > 0
  np.testing.assert_allclose(
    np.asarray(out)[real], expected[real], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('window', [None, 9])
@pytest.mark.parametrize('name', ['cap', 'sinks', 'both'])
def test_caps_and_sinks(name, window):
  """Banded and full equal the formula; each changes what comes out."""
  q, k, v, segments = make(300, 40)
  cap = None if name == 'sinks' else 0.5
  rng = np.random.default_rng(2)
  sinks = None if name == 'cap' else rng.standard_normal(N).astype(np.float32)
  real = segments > 0
  expected = reference(q, k, v, segments, window, cap, sinks)
  for reach in (40, None):
    out, _ = run(q, k, v, segments, window, reach, cap, sinks)
    np.testing.assert_allclose(
      np.asarray(out)[real], expected[real], rtol=1e-5, atol=1e-5
    )
  plain = reference(q, k, v, segments, window)
  assert np.abs(plain - expected).max() > 0.05


def test_banded_multiplies_fewer_keys():
  """Else the test above would compare full attention with itself."""
  q, k, v, segments = make(512, 40)

  def flops(reach):
    compiled = run.lower(q, k, v, segments, None, reach).compile()
    return compiled.cost_analysis()['flops']

  assert flops(40) < 0.5 * flops(None)


def test_gradients_equal_differences():
  """Of the full form: against a step in a random direction, in float64."""
  q, k, v, segments = make(12, 6)
  _, grads = run(q, k, v, segments, 4, None)
  rng = np.random.default_rng(1)
  real = (segments > 0)[..., None, None]
  cos = np.cos(np.arange(q.size).reshape(q.shape)) * real
  for i in range(3):
    step = rng.standard_normal((q, k, v)[i].shape)
    ahead, back = [q, k, v], [q, k, v]
    ahead[i], back[i] = ahead[i] + 1e-5 * step, back[i] - 1e-5 * step
    change = reference(*ahead, segments, 4) - reference(*back, segments, 4)
    slope = (change * cos).sum() / 2e-5
    found = (np.asarray(grads[i]) * step).sum()
    np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('reach', [None, 40])
def test_padding_gives_no_nan(reach):
  """A row that is all padding, and padding beside examples."""
  q, k, v, segments = make(200, 40)
  segments[1] = 0
  out = attention.packed(
    q, k, v, segments, attention.Look(H**-0.5), reach=reach
  )
  assert np.isfinite(out).all()
  _, grads = run(q, k, v, segments, None, reach)
  assert all(np.isfinite(grad).all() for grad in grads)
  assert not np.asarray(grads[0])[segments == 0].any()


@pytest.mark.parametrize('length, window', [(1, None), (5, 1), (300, 1)])
def test_a_query_that_sees_only_itself(length, window):
  """Softmax over one key is that key's value."""
  q, k, v, segments = make(300, 300)
  q, k, v, segments = (x[:, :length] for x in (q, k, v, segments))
  out = attention.packed(q, k, v, segments, attention.Look(H**-0.5, window))
  np.testing.assert_allclose(out, np.repeat(v, N // K, axis=2), rtol=1e-6)


@pytest.mark.parametrize('reach', [1, 2, 63, 64, 65, 100, 511, 512, 513, 4096])
def test_blocks_are_powers_of_two(reach):
  block = attention.block_size(reach)
  assert 64 <= block <= 512
  assert block & (block - 1) == 0


def test_a_scale_is_not_rounded_to_the_dtype_of_the_queries():
  """0.1 is no bfloat16, which would make a score of -20 another by 0.02."""
  q = jnp.zeros((1, 1, 1, H), jnp.bfloat16).at[..., 0].set(64)
  k = jnp.zeros((1, 1, 2, H), jnp.bfloat16).at[0, 0, 0, 0].set(-200 / 64)
  v = jnp.zeros((1, 1, 2, 1), jnp.bfloat16).at[0, 0, 0].set(1)
  mask = jnp.ones((1, 1, 2), bool)
  out = attention.weighted_values(q, k, v, mask, attention.Look(0.1))
  expected = 1 / (1 + np.exp(20))
  # The probability and the output are rounded, each by half of eps at most.
  eps = float(jnp.finfo(jnp.bfloat16).eps)
  np.testing.assert_allclose(out.astype(np.float32).item(), expected, eps)
