"""What adapters add, in the dtype that is computed in."""

import jax.numpy as jnp
import numpy as np
import pytest

from tuner.models import linear

THIRD = 1 / 3  # bfloat16 has 0.334.


@pytest.mark.parametrize('form', ['plain', 'experts'])
def test_a_scale_is_not_rounded_before_it_is_used(form):
  """Each output is rounded once; merged weights have theirs in float32."""
  numbers = jnp.arange(1, 257, dtype=jnp.bfloat16)  # All of them exact.
  x, a, b = numbers[:, None], jnp.ones((1, 1)), jnp.ones((1, 1))
  base = jnp.zeros((1, 1), jnp.bfloat16)
  a, b = a.astype(base.dtype), b.astype(base.dtype)
  if form == 'plain':
    weight = linear.Lora(base, a, b, scale=THIRD)
    out = linear.project('ND,DF->NF', x, weight)
  else:
    weight = linear.Lora(base[None], a[None], b[None], scale=THIRD)
    out = linear.grouped(x, weight, jnp.array([len(numbers)]))
  assert out.dtype == jnp.bfloat16
  expected = (np.float32(THIRD) * np.arange(1, 257, dtype=np.float32)).astype(
    jnp.bfloat16
  )
  np.testing.assert_array_equal(out[:, 0], expected)
