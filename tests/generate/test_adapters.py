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

pytestmark = pytest.mark.usefixtures('quick_compiles')


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
    attached(1, adapt.lora, rank=2),
    attached(2, adapt.lora, rank=5, alpha=8.0, targets=('q', 'down')),
    attached(3, adapt.dora, rank=3, targets=('v', 'gate')),
  ]


def side_by_side(tuned):
  model, values = kinds.declared('llama')
  found = linear.adapters(weights.rows(model), values, tuned)
  return weights.fill(model, found)


@pytest.mark.parametrize('begin', [(), tuple(range(40, 60))])
def test_side_by_side_equals_each_alone(tuned, begin, monkeypatch):
  """Base and tuned in one batch, also through a prefix of each one's own."""
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 1)
  model, values = kinds.declared('llama')
  asked = test_engine.requests(begin=begin)[:4]
  both = [
    dataclasses.replace(one, adapter=number)
    for one in asked
    for number in range(4)
  ]
  found = engine.generate(side_by_side(tuned), both, [], rows=8)
  answers = set()
  for number, own in enumerate([values, *tuned]):
    alone = engine.generate(weights.fill(model, own), asked, [])
    test_engine.assert_same(found[number::4], alone)
    answers.add(tuple(alone[0].ids))
  assert len(answers) > 2


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


def test_eight_devices_equal_one(tuned):
  """Rows over data and fsdp, heads over tensor; base and tuned in turn."""
  model, values = kinds.declared('llama')
  asked = test_engine.requests(begin=range(70, 90))
  asked = [
    dataclasses.replace(one, adapter=i % 2) for i, one in enumerate(asked)
  ]
  expected = engine.generate(side_by_side(tuned[:1]), asked, [])
  mesh = mesh_lib.make(data=2, fsdp=2, tensor=2)
  sizes, rows = model.config.sizes, weights.rows(model)
  put = {
    path: jax.device_put(
      x, mesh_lib.sharding(mesh, rows[path].dims, rows[path].shape(sizes))
    )
    for path, x in values.items()
  }
  own = {
    path: dataclasses.replace(x, base=put[path])
    if isinstance(x, linear.Lora)
    else put[path]
    for path, x in tuned[0].items()
  }
  both = weights.fill(model, linear.adapters(rows, put, [own]))
  with jax.set_mesh(mesh):
    found = engine.generate(both, asked, [])
  test_engine.assert_same(found, expected)
