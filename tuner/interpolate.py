"""Weights between the base and a tuned model, without training again."""

import jax
import jax.numpy as jnp

from tuner import adapt
from tuner.models import linear

Tree = dict[str, jax.Array]


def between(
  adaptation: adapt.Adaptation, base: Tree, trainable: Tree, alpha: float
) -> Tree:
  """The trainable tree of the base at alpha 0, of the tuned model at 1.

  What trains whole, and what LoRA adds, is base + alpha (tuned - base)
  (Wortsman et al. 2022, WiSE-FT). Of DoRA the low-rank part and the lengths are
  each interpolated, which is another curve between the same ends.
  """
  if alpha == 1:  # To the bit.
    return trainable
  found = {}
  for path, tuned in trainable.items():
    start = _start(adaptation, base, path)
    if start is None:
      found[path] = tuned
      continue
    wide = jnp.asarray(start, jnp.float32)
    moved = wide + alpha * (tuned.astype(jnp.float32) - wide)
    found[path] = moved.astype(tuned.dtype)
  return found


def _start(adaptation: adapt.Adaptation, base: Tree, path: str):
  """What stands at a trainable path in the base; None: whatever it is."""
  if path in base:
    return base[path]
  target, _, part = path.rpartition('.')
  if part == 'b':  # b a is added to the base, so that a may stay.
    return 0.0
  if part == 'm':
    row = adaptation.rows[target]
    return linear.lengths(
      base[target], row.dims, row.lead, row.inputs, row.outputs
    )
  return None
