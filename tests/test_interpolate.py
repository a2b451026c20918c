"""Laws of weights between the base and the tuned model."""

import jax
import numpy as np
import pytest
import support

from tuner import adapt, interpolate
from tuner.adapters import low_rank
from tuner.models import weights

KINDS = {
  'lora': (adapt.lora, dict(rank=4, modules_to_save=('norm',))),
  'dora': (adapt.dora, dict(rank=4)),
  'full': (adapt.full, {}),
}


@pytest.fixture(scope='module', params=KINDS)
def moved(request, tiny_dir):
  """(adaptation, base, a trainable tree that has left its start)."""
  model, base = support.load_model(tiny_dir)
  make, given = KINDS[request.param]
  adaptation = make(weights.rows(model), **given)
  _, trainable = adaptation.split(base)
  key, sizes = jax.random.key(0), model.config.sizes
  start = {**trainable, **adaptation.initial(sizes, key, base)}
  rng = np.random.default_rng(0)
  tuned = {
    path: x * (1 + 0.1 * rng.standard_normal(x.shape).astype(np.float32))
    + 0.01 * rng.standard_normal(x.shape).astype(np.float32)
    for path, x in start.items()
  }
  return adaptation, base, tuned


def merged(moved, alpha):
  """Plain weights of the model at alpha, by path."""
  adaptation, base, tuned = moved
  tree = interpolate.between(adaptation, base, tuned, alpha)
  frozen, _ = adaptation.split(base)
  attached = adaptation.attach(frozen, tree)
  rows = adaptation.rows
  return {path: np.asarray(adapt.merge(rows, attached, path)) for path in rows}


def test_the_ends_are_base_and_tuned(moved):
  """To the bit; DoRA's base has its lengths divided by themselves."""
  adaptation, base, tuned = moved
  start, end = merged(moved, 0.0), merged(moved, 1.0)
  is_exact = getattr(adaptation, 'kind', '') != 'dora'
  for path, value in base.items():
    np.testing.assert_allclose(
      start[path], value, rtol=0 if is_exact else 1e-6, err_msg=path
    )
  assert interpolate.between(adaptation, base, tuned, 1.0) == tuned
  assert any(not np.array_equal(end[path], base[path]) for path in base)


def test_between_them_it_is_linear_but_for_dora(moved):
  adaptation, base, _ = moved
  end, middle = merged(moved, 1.0), merged(moved, 0.3)
  is_dora = isinstance(adaptation, low_rank.LowRank) and (
    adaptation.kind == 'dora'
  )
  gaps = [
    np.abs(middle[path] - (0.7 * np.asarray(base[path]) + 0.3 * end[path]))
    for path in base
  ]
  assert (max(gap.max() for gap in gaps) > 1e-4) == is_dora
