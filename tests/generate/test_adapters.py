"""Several adapters in one batch, and the cache on eight devices."""

import dataclasses

import jax
import kinds
import numpy as np
import pytest
import test_engine

from tuner import adapt
from tuner import mesh as mesh_lib
from tuner.generate import engine, prefix
from tuner.models import linear, weights

pytestmark = pytest.mark.usefixtures('quick_compiles', 'one_width')
BEGIN = tuple(range(40, 60))
ROWS = 4


@pytest.fixture(scope='module')
def one_width():
  """A program to prefill, one to decode."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, 'WIDTHS', (64,))
    patch.setattr(engine, 'FEW', 0)
    yield


def attached(seed, method, **own):
  """A random adapter over the tiny Llama."""
  model, values = kinds.declared('llama')
  adaptation = method(weights.rows(model), **own)
  rng = np.random.default_rng(seed)
  factors = {
    name: 0.2 * rng.standard_normal(shape, np.float32)
    for name, shape in adaptation.shapes(model.config.sizes).items()
  }
  return adaptation.attach(values, factors)


@pytest.fixture(scope='module')
def tuned():
  """Other ranks, scales, targets and kinds."""
  return [
    attached(1, adapt.lora, rank=2, alpha=8.0, targets=('q', 'down')),
    attached(2, adapt.dora, rank=3, targets=('v', 'gate')),
  ]


def requests():
  return test_engine.requests(begin=BEGIN)[:4]


@pytest.fixture(scope='module')
def alone(tuned, one_width):
  """[adapter][request]: the answers of the base and of each model by itself."""
  model, values = kinds.declared('llama')
  answers = [
    engine.generate(weights.fill(model, own), requests(), [], ROWS)
    for own in (values, *tuned)
  ]
  assert len({tuple(own[0].ids) for own in answers}) == 3
  return answers


def assert_each_alone(model, alone):
  """One batch of every request by every adapter."""
  both = [
    dataclasses.replace(one, adapter=number)
    for one in requests()
    for number in range(3)
  ]
  found = engine.generate(model, both, [], ROWS)
  for number, own in enumerate(alone):
    test_engine.assert_same(found[number::3], own)


def side_by_side(tuned, values):
  rows = weights.rows(kinds.declared('llama')[0])
  found = linear.adapters(rows, values, tuned)
  return weights.fill(kinds.declared('llama')[0], found)


def test_an_adapter_is_that_of_the_full_forward(tuned, alone):
  model, _ = kinds.declared('llama')
  filled = weights.fill(model, tuned[0])
  for request, answer in zip(requests(), alone[1], strict=True):
    test_engine.assert_follows_the_full_forward(filled, request, answer)


def test_side_by_side_equals_each_alone(tuned, alone, monkeypatch):
  """Base and tuned in one batch, through a prefix of each one's own."""
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 1)
  _, values = kinds.declared('llama')
  assert_each_alone(side_by_side(tuned, values), alone)


def test_what_no_batch_can_share_is_refused(tuned):
  model, values = kinds.declared('llama')
  rows = weights.rows(model)
  whole = {**values, 'norm': values['norm'] + 1}
  with pytest.raises(ValueError, match='norm: adapter 2 has no adapter of'):
    linear.adapters(rows, values, [tuned[0], whole])
  experts, held = kinds.declared('gpt_oss')
  adaptation = adapt.lora(weights.rows(experts), targets=('experts',), rank=2)
  rng = np.random.default_rng(0)
  factors = {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in adaptation.shapes(experts.config.sizes).items()
  }
  with pytest.raises(ValueError, match='adapter 1 has an adapter of experts'):
    linear.adapters(
      weights.rows(experts), held, [adaptation.attach(held, factors)]
    )


def test_eight_devices_equal_one(tuned, alone):
  """Rows over data and fsdp, heads over tensor; side by side, no prefix."""
  model, values = kinds.declared('llama')
  mesh = mesh_lib.make(data=2, fsdp=2, tensor=2)
  sizes, rows = model.config.sizes, weights.rows(model)
  put = {
    path: jax.device_put(
      x, mesh_lib.sharding(mesh, rows[path].dims, rows[path].shape(sizes))
    )
    for path, x in values.items()
  }
  placed = [
    {
      path: put[path]
      if isinstance(x, np.ndarray)
      else dataclasses.replace(x, base=put[path])
      for path, x in own.items()
    }
    for own in tuned
  ]
  with jax.set_mesh(mesh):
    assert_each_alone(side_by_side(placed, put), alone)
