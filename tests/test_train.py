"""Laws of the training step, on a tiny model: what must not matter does not."""

import json
import math

import jax
import numpy as np
import pytest

from tuner import commands, named, optim, train
from tuner import experiment as experiment_lib
from tuner.data import sources

pytestmark = pytest.mark.usefixtures('quick_compiles')

# An eps this large keeps Adam from turning rounding into whole steps where a
# gradient is about zero.
ADAMW = dict(name='adamw', eps=1e-3)
MESHES = {
  'data': dict(data=8, devices=8),
  'fsdp': dict(data=1, fsdp=8, devices=8),
  'all': dict(data=2, fsdp=2, tensor=2, devices=8),
}


@pytest.fixture
def config(tiny_config):
  """Eight rows a step, so that eight devices can share them."""
  tiny_config.optimizer = dict(ADAMW)
  tiny_config.batch.rows = 8
  return tiny_config


def changed(config, **sections):
  """A copy with keys of sections set; a section with a name is replaced."""
  copy = config.copy_and_resolve_references()
  for name, values in sections.items():
    copy[name] = values if 'name' in values else {**copy[name], **values}
  return copy


def begin(config):
  """(experiment, frozen, state before step 0); call it in no mesh."""
  experiment = experiment_lib.prepare(config)
  with jax.set_mesh(experiment.mesh):
    frozen, state = experiment.start(experiment.load_base())
  return experiment, frozen, state


_compiled = {}
_finished = {}


def compiled_step(config, experiment, frozen, state):
  """commands.compile_step, once for a config of this file."""
  key = config.to_json()
  if key not in _compiled:
    with jax.set_mesh(experiment.mesh):
      batch = experiment.put(experiment.source(0))
      _compiled[key] = commands.compile_step(experiment, frozen, state, batch)
  return _compiled[key]


def run(config, steps=3):
  """(state, metrics of each step) of training without a disk."""
  key = config.to_json(), steps
  if key not in _finished:
    experiment, frozen, state = begin(config)
    step = compiled_step(config, experiment, frozen, state)
    metrics = []
    with jax.set_mesh(experiment.mesh):
      for i in range(steps):
        batch = experiment.put(experiment.source(i))
        state, found = step(state, frozen, batch)
        metrics.append({name: float(x) for name, x in found.items()})
    _finished[key] = state, metrics
  return _finished[key]


def assert_near(a, b, rtol, what=''):
  """Each array of two flat trees, by the norm of the difference."""
  assert a.keys() == b.keys()
  for path in a:
    x, y = (np.asarray(tree[path], np.float32) for tree in (a, b))
    gap, size = np.linalg.norm(x - y), np.linalg.norm(y)
    assert gap <= rtol * size, f'{what}{path}: {gap} of {size}'


def assert_same_run(one, other, loss_rtol, rtol):
  """Loss, gradient norm and counts of every step, and the trained weights."""
  for a, b in zip(one[1], other[1], strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=loss_rtol)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=10 * loss_rtol)
    for name in ('tokens', 'target_tokens', 'weight', 'learning_rate'):
      assert a[name] == b[name]
  assert_near(one[0].trainable, other[0].trainable, rtol)


def test_one_times_eight_equals_four_times_two(config):
  """Sum over sum: the mean of the micro-batches' means would differ."""
  experiment = experiment_lib.prepare(changed(config, batch={'accumulate': 4}))
  targets = experiment.source(0)['mask'].sum((1, 2))
  assert len(targets) == 4 and len(set(targets)) > 1  # of unequal weight
  accumulated = run(changed(config, batch={'accumulate': 4}))
  assert_same_run(accumulated, run(config), 1e-6, 1e-5)


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('adapt', ['lora', 'full'])
def test_eight_devices_equal_one(config, adapt, mesh):
  if adapt == 'full':
    config.adapt = dict(name='full')
  sharded = changed(config, mesh=MESHES[mesh])
  assert_same_run(run(sharded), run(config), 1e-5, 1e-4)


@pytest.mark.parametrize('adapt', ['lora', 'full'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'adafactor'])
def test_optimizer_state_is_sharded_as_its_weight(config, adapt, optimizer):
  if adapt == 'full':
    config.adapt = dict(name='full')
  config.optimizer = dict(name=optimizer)
  experiment, _, state = begin(changed(config, mesh=MESHES['all']))
  assert any(not x.is_fully_replicated for x in state.trainable.values())
  moments = 0
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
    path = next(
      (k.key for k in keys if getattr(k, 'key', None) in state.trainable), None
    )
    if path is None or leaf.shape != state.trainable[path].shape:
      assert leaf.size < 1000 and leaf.is_fully_replicated
      continue
    moments += 1
    wanted = state.trainable[path].sharding
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
    assert wanted == experiment.shardings()[path]
  assert moments >= len(state.trainable)


def test_trained_state_stays_where_it_was(config):
  """A step neither gathers nor spreads: out as in."""
  config = changed(config, mesh=MESHES['all'])
  _, _, before = begin(config)
  after, _ = run(config)
  for (keys, x), y in zip(
    jax.tree_util.tree_leaves_with_path(before),
    jax.tree.leaves(after),
    strict=True,
  ):
    name = jax.tree_util.keystr(keys)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), name
    assert x.dtype == y.dtype, name


def test_lora_keeps_nothing_for_frozen_weights(config):
  """No optimizer state, no gradient, no change."""
  experiment, frozen, state = begin(config)
  adapters = set(experiment.adaptation.dims)
  assert adapters and all(name[-2:] in ('.a', '.b') for name in adapters)
  assert set(state.trainable) == adapters
  held = {
    key.key
    for keys, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)
    for key in keys
    if isinstance(key, jax.tree_util.DictKey)
  }
  assert held == adapters
  before = {name: np.asarray(x) for name, x in frozen.items()}
  step = compiled_step(config, experiment, frozen, state)
  with jax.set_mesh(experiment.mesh):
    after, _ = step(state, frozen, experiment.put(experiment.source(0)))
  assert set(after.trainable) == adapters
  for name, x in frozen.items():
    np.testing.assert_array_equal(x, before[name], err_msg=name)


def mean_loss_and_gradient(experiment, frozen):
  """(trainable, batch [B, T]) -> (loss, gradient), compiled once a shape."""

  def mean_loss(trainable, batch):
    policy, reference = experiment.policies(frozen, trainable, None)
    loss_sum, weight, _ = experiment.objective(policy, reference, batch)
    return loss_sum / weight

  return jax.jit(jax.value_and_grad(mean_loss))


def alone(experiment, ids, tokens):
  """The examples of these ids as a batch of one example a row."""
  bins = [np.array([i]) for i in ids]
  return sources.batch(experiment.data.examples, bins, tokens, (len(ids),))


def test_packed_equals_unpacked(config):
  config.adapt = dict(name='full')
  experiment, frozen, state = begin(config)
  packed = {k: v[0] for k, v in experiment.source(0).items()}
  ids = experiment.source.ids(0)
  assert packed['segments'].max() > 1 and len(ids) > 8
  apart = alone(experiment, ids, config.batch.tokens)
  # Rows of padding bring the packed batch to the same shape: one compile.
  packed = {
    k: np.pad(v, ((0, len(ids) - len(v)), (0, 0))) for k, v in packed.items()
  }
  both = mean_loss_and_gradient(experiment, frozen)
  loss, gradient = both(state.trainable, packed)
  wanted, wanted_gradient = both(state.trainable, apart)
  assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
  assert_near(gradient, wanted_gradient, 1e-5)


def test_sft_is_the_likelihood_of_the_targets(config):
  """Against log softmax of the logits, in float64, target by target."""
  experiment, frozen, state = begin(config)
  batch = {k: v[0] for k, v in experiment.source(0).items()}
  with jax.set_mesh(experiment.mesh):
    tuned = experiment.tuned(frozen, state.trainable)
    logits = np.asarray(jax.jit(tuned.logits)(batch), np.float64)
  nats = []
  for row in range(len(batch['tokens'])):
    for t in np.flatnonzero(batch['mask'][row]):
      before = logits[row, t - 1]
      total = math.log(np.exp(before - before.max()).sum()) + before.max()
      nats.append(total - before[batch['tokens'][row, t]])
  first = run(config)[1][0]
  assert first['loss'] == pytest.approx(np.mean(nats), rel=1e-6)
  assert first['target_tokens'] == first['weight'] == len(nats)
  assert first['tokens'] == (batch['segments'] > 0).sum()


@pytest.mark.parametrize('adapt', ['lora', 'full'])
def test_bfloat16_compute_keeps_float32_masters(config, adapt):
  if adapt == 'full':
    config.adapt = dict(name='full')
  half = changed(config, model={'dtype': 'bfloat16'})
  _, frozen, _ = begin(half)
  assert {x.dtype.name for x in frozen.values()} <= {'bfloat16'}
  state, metrics = run(half)
  floats = [x for x in jax.tree.leaves(state) if x.dtype.kind == 'f']
  assert len(floats) >= 3 * len(state.trainable)  # weights and two moments
  assert {x.dtype.name for x in floats} == {'float32'}
  for got, wanted in zip(metrics, run(config)[1], strict=True):
    assert got['loss'] == pytest.approx(wanted['loss'], rel=0.03)
    assert got['loss'] != wanted['loss']  # it did compute in bfloat16


@pytest.mark.parametrize('adapt', ['lora', 'full'])
def test_master_is_the_dtype_of_what_trains(config, adapt):
  config.adapt = dict(name=adapt)
  _, frozen, state = begin(changed(config, model={'master': 'bfloat16'}))
  assert {x.dtype.name for x in state.trainable.values()} == {'bfloat16'}
  assert {x.dtype.name for x in frozen.values()} <= {'float32'}


@pytest.mark.parametrize('name', ['adamw', 'lion', 'muon', 'sgd'])
def test_a_bfloat16_master_keeps_every_dtype(config, name):
  """The compiled step takes what it gave: moments do not widen."""
  config.optimizer = dict(name=name)
  config.objective = dict(name='support.towards_one')
  config = changed(config, model={'master': 'bfloat16'})
  state, _ = run(config)
  _, _, first = begin(config)
  described = [
    jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, first)
  ]
  assert described[0] == described[1]


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_no_gradient(config, remat):
  again = changed(config, model={'remat': remat})
  assert_same_run(run(again), run(config), 1e-6, 1e-5)


def test_loss_goes_down(config):
  losses = [m['loss'] for m in run(config, steps=30)[1]]
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses


@pytest.mark.parametrize('name', ['adafactor', 'adamw', 'lion', 'muon', 'sgd'])
def test_each_optimizer_takes_a_step(config, name):
  config.optimizer = dict(name=name)
  config.objective = dict(name='support.towards_one')
  state, metrics = run(config)
  assert int(state.step) == 3
  assert metrics[-1]['loss'] < metrics[0]['loss']
  _, _, first = begin(config)
  for path, x in state.trainable.items():
    assert not np.array_equal(x, first.trainable[path]), path
    assert np.isfinite(x).all(), path


def test_each_optimizer_is_in_the_test_above():
  mark = test_each_optimizer_takes_a_step.pytestmark[0]
  there = named._public(optim, ('learning_rate', 'dims'))
  assert mark.args[1] == list(there)


def test_lora_plus_gives_b_its_own_rate(config):
  """16 x the update of b, 1 x that of a, from the config to the optimizer."""
  config.optimizer = dict(name='sgd', momentum=0.0)
  config.train.clip_norm = None
  updates = []
  for ratio in (1.0, 16.0):
    _, _, state = begin(changed(config, adapt={'lr_ratio': ratio}))
    experiment = experiment_lib.prepare(
      changed(config, adapt={'lr_ratio': ratio})
    )
    ones = jax.tree.map(np.ones_like, state.trainable)
    transform = experiment.optimizer.transform
    updates.append(transform.update(ones, state.optimizer, state.trainable)[0])
  for path, plain in updates[0].items():
    times = 16 if path.endswith('.b') else 1
    np.testing.assert_array_equal(updates[1][path], times * plain, path)


def test_the_step_is_compiled_and_takes_one_shape(config):
  experiment, frozen, state = begin(config)
  step = compiled_step(config, experiment, frozen, state)
  assert isinstance(step, jax.stages.Compiled)
  narrow = {k: v[..., :64] for k, v in experiment.source(0).items()}
  with pytest.raises(TypeError, match='compiled'):
    step(state, frozen, experiment.put(narrow))


def test_a_batch_without_targets_stops_the_run(config):
  experiment, frozen, state = begin(config)
  step = compiled_step(config, experiment, frozen, state)
  batch = experiment.source(2)
  batch['mask'] = np.zeros_like(batch['mask'])
  with jax.set_mesh(experiment.mesh):
    _, metrics = step(state, frozen, experiment.put(batch))
  ids = experiment.source.ids(2)[:20]
  with pytest.raises(RuntimeError) as caught:
    train.Meter(experiment.source.ids)(3, metrics)
  assert str(caught.value) == (
    f'step 3: no trained token in the batch; examples {ids}.'
  )


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
  config, tmp_path, monkeypatch
):
  """Step 3 is poisoned; step 2 is saved, and 3 and 4 are not."""
  made, traced = sources.Packed.__call__, []

  def poisoned(self, step, params=None):
    batch = made(self, step, params)
    if step == 2:
      batch['mask'] = batch['mask'] * np.float32(np.nan)
    return batch

  step_of = experiment_lib.Experiment.step

  def counted(self):
    step = step_of(self)

    def traced_step(*args):
      traced.append(1)
      return step(*args)

    return traced_step

  monkeypatch.setattr(sources.Packed, '__call__', poisoned)
  monkeypatch.setattr(experiment_lib.Experiment, 'step', counted)
  config.evaluate = dict(test='never')
  config.checkpoint = dict(every=2)
  ids = experiment_lib.prepare(config).source.ids(2)[:20]
  with pytest.raises(RuntimeError) as caught:
    commands.train(config, tmp_path)
  assert str(caught.value) == (
    f'step 3: loss is nan; examples {ids}. The last good checkpoint is kept; '
    'lower config.schedule.peak or look at these rows.'
  )
  assert [p.name for p in (tmp_path / 'commits').iterdir()] == ['2.json']
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2]
  assert traced == [1]  # compiled once


def test_a_loss_that_is_nan_from_the_start_is_no_matter_of_the_rate():
  meter = train.Meter(lambda step: ['rows.jsonl:1'])
  meter.restart()
  metrics = dict(weight=1, loss=np.nan, grad_norm=1, tokens=1, target_tokens=1)
  with pytest.raises(RuntimeError) as caught:
    meter(1, {name: np.float32(value) for name, value in metrics.items()})
  assert str(caught.value) == (
    "step 1: loss is nan; examples ['rows.jsonl:1']. Nothing has been trained "
    'yet; look at the base or at these rows.'
  )
