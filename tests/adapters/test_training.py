"""Training goes on from an adapter: its values, its padding, its record."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import support

from tuner import adapt, experiment, optim
from tuner.adapters import low_rank
from tuner.models import policy, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def adapter(tiny_dir, tmp_path_factory):
  """A DoRA of unequal ranks that was trained with a saved embedding."""
  model, values = support.load_model(tiny_dir)
  rows = weights.rows(model)
  sizes = {
    'blocks.0.attention.q': low_rank.Size((3, 2), (6.0, 6.0)),
    'blocks.0.mlp.down': low_rank.Size((0, 4), (6.0, 6.0)),
  }
  adaptation = low_rank.LowRank(rows, sizes, kind='dora', saved=('embed',))
  tree = padded(adaptation, small.factors(model, adaptation, values))
  path = tmp_path_factory.mktemp('adapter') / 'adapter'
  small.write_adapter(path, tiny_dir, model, adaptation, tree)
  return path, tree


def padded(adaptation, tree):
  """The tree with zeros where a layer has no rank."""
  out = dict(tree)
  for path, size in adaptation.sizes.items():
    for layer, rank in enumerate(size.ranks):
      for kind in 'ab':
        name = f'{path}.{kind}'
        out[name] = out[name].at[layer, rank:].set(0.0)
      if adaptation.kind == 'dora' and not rank:
        out[f'{path}.m'] = out[f'{path}.m'].at[layer].set(0.0)
  return out


def started(config, **mesh):
  config.mesh.update(mesh)
  made = experiment.prepare(config)
  frozen, state = made.start(made.load_base())
  return made, frozen, state


@pytest.mark.parametrize(
  'mesh', [{}, dict(devices=8, data=2, fsdp=2, tensor=2)]
)
def test_it_starts_from_the_stored_values(tiny_config, adapter, mesh):
  """On any mesh, each where it will stay."""
  path, tree = adapter
  tiny_config.adapt = dict(name='peft', path=str(path))
  made, _, state = started(tiny_config, **mesh)
  places = made.shardings()
  assert state.trainable.keys() == tree.keys()
  for name, value in tree.items():
    np.testing.assert_array_equal(state.trainable[name], value, err_msg=name)
    assert state.trainable[name].sharding.is_equivalent_to(
      places[name], value.ndim
    )


def test_what_trains_whole_starts_as_a_copy(tiny_config):
  """Donated to the state, it must not take the reference's away."""
  tiny_config.adapt = dict(name='lora', targets='q', modules_to_save=('embed',))
  made, frozen, state = started(tiny_config)
  np.testing.assert_array_equal(frozen['embed'], state.trainable['embed'])
  attached = made.adaptation.attach(frozen, state.trainable)
  assert attached['embed'] is state.trainable['embed']
  assert made.adaptation.base(frozen)['embed'] is frozen['embed']


def test_another_start_is_another_run(tiny_config, adapter, tmp_path):
  """The facts that a resumed run must share name the adapter's hash."""
  copy = tmp_path / 'adapter'
  shutil.copytree(adapter[0], copy)
  tiny_config.adapt = dict(name='peft', path=str(copy))
  before = experiment.prepare(tiny_config).facts['adapt']
  assert experiment.prepare(tiny_config).facts['adapt'] == before
  config = json.loads((copy / 'adapter_config.json').read_text())
  (copy / 'adapter_config.json').write_text(
    json.dumps(config | {'task_type': None})
  )
  after = experiment.prepare(tiny_config).facts['adapt']
  changed = {key for key in before if before[key] != after[key]}
  assert changed == {'adapter'}


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_padding_stays_zero(tiny_dir, adapter, name):
  """Three steps with weight decay move all but what pads a layer's rank."""
  model, values = support.load_model(tiny_dir)
  made = small.read_adapter(adapter[0], tiny_dir, model)
  tree = {path: jnp.asarray(x) for path, x in made.given.items()}
  optimizer = optim.make(
    dict(name=name, weight_decay=0.1),
    dict(name='constant', peak=1e-2),
    3,
    made.dims,
    made.matrices,
  ).transform
  batch = support.pack([[(row, 1)] for row in small.TOKENS], 16)

  @functools.partial(jax.jit, compiler_options=support.QUICK)
  def step(tree, state):
    def loss(tree):
      filled = weights.fill(model, made.attach(values, tree))
      return -policy.Policy(filled, chunk=8).logprobs(batch).mean()

    updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
    return {p: x + updates[p] for p, x in tree.items()}, state

  before, state = tree, optimizer.init(tree)
  for _ in range(3):
    tree, state = step(tree, state)
  inert = padded(made, {p: jnp.ones_like(x) for p, x in tree.items()})
  for path, value in tree.items():
    pads = np.asarray(inert[path]) == 0
    assert not np.asarray(value)[pads].any(), path
    moved = np.asarray(value != before[path])
    assert moved[~pads].mean() > 0.9 or path == 'embed', path
  assert any((np.asarray(x) == 0).any() for x in inert.values())


def test_lora_starts_fresh_without_the_base(tiny_config):
  """adapt.lora alone needs no weight to start from."""
  made = experiment.prepare(tiny_config)
  fresh = support.fresh_factors(made.model, made.adaptation)
  assert fresh.keys() == made.adaptation.dims.keys()
  assert isinstance(made.adaptation, adapt.low_rank.LowRank)
