"""Laws of sft with a divergence from the base in its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner import adapt, train
from tuner import experiment as experiment_lib
from tuner.models import policy, weights
from tuner.objectives import sft

pytestmark = pytest.mark.usefixtures('quick_compiles')

LENGTHS = (40, 5, 17, 26, 33, 12)


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  """(model, adaptation, frozen, trainable that has left its start)."""
  model, values = support.load_model(tiny_dir)
  adaptation = adapt.lora(weights.rows(model), rank=4)
  rng = np.random.default_rng(0)
  moved = {
    path: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    for path, x in support.fresh_factors(model, adaptation).items()
  }
  return model, adaptation, values, moved


def examples():
  rng = np.random.default_rng(1)
  return [(rng.integers(0, 320, n), n // 2) for n in LENGTHS]


def policies(tiny, trainable, reach=None):
  model, adaptation, frozen, _ = tiny
  own = adaptation.attach(frozen, trainable), adaptation.base(frozen)
  return [policy.Policy(weights.fill(model, v), reach, chunk=16) for v in own]


def chunked(policies, batch, kl):
  return sft.sft(*policies, batch, kl=kl)


def naive(policies, batch, kl):
  """The same by whole logits, and the definitions."""
  own, base = (
    jax.nn.log_softmax(one.logits(batch)[:, :-1]) for one in policies
  )
  mask, tokens = batch['mask'][:, 1:], jnp.asarray(batch['tokens'][:, 1:])
  chosen = jnp.take_along_axis(own, tokens[..., None], -1)[..., 0]
  divergence = (jnp.exp(own) * (own - base)).sum(-1)
  loss = ((kl * divergence - chosen) * mask).sum()
  return loss, mask.sum(), {'kl': (divergence * mask).sum()}


def run(tiny, fn, batch, kl, trainable=None, reach=None):
  """((loss, weight, metrics), gradient by the trainable tree), compiled."""

  def loss(trainable):
    loss_sum, *rest = fn(policies(tiny, trainable, reach), batch, kl)
    return loss_sum, (loss_sum, *rest)

  trainable = tiny[3] if trainable is None else trainable
  grads, out = jax.jit(jax.grad(loss, has_aux=True))(trainable)
  return out, grads


def assert_near(grads, expected, rtol):
  for path, grad in grads.items():
    atol = rtol * np.abs(expected[path]).max()
    np.testing.assert_allclose(
      grad, expected[path], rtol=0, atol=atol, err_msg=path
    )


@pytest.fixture(scope='module')
def packed():
  batch = support.pack([examples()[:3], examples()[3:]], 96)
  batch['mask'][1] *= 0.5  # Rows of another weight.
  return batch


def test_loss_and_gradient_are_those_of_the_definition(tiny, packed):
  out, grads = run(tiny, chunked, packed, 0.7)
  expected, expected_grads = run(tiny, naive, packed, 0.7)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), out, expected
  )
  assert out[2]['kl'] > 1
  assert_near(grads, expected_grads, 1e-4)


def test_packed_equals_unpacked(tiny, packed):
  alone = support.pack([[row] for row in examples()], 40)
  alone['mask'][3:] *= 0.5
  out, grads = run(tiny, chunked, packed, 0.7, reach=40)
  expected, expected_grads = run(tiny, chunked, alone, 0.7)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out, expected
  )
  assert_near(grads, expected_grads, 1e-4)


def test_a_lora_at_its_start_is_plain_sft(tiny, packed):
  """The divergence is 0 there to the bit, and so is its gradient."""
  model, adaptation, _, _ = tiny
  fresh = support.fresh_factors(model, adaptation)
  (loss, weight, metrics), grads = run(tiny, chunked, packed, 3.0, fresh)
  (plain, expected, _), plain_grads = run(tiny, chunked, packed, 0.0, fresh)
  assert metrics['kl'] == 0
  assert (loss, weight) == (pytest.approx(float(plain), rel=1e-6), expected)
  assert_near(grads, plain_grads, 1e-5)


def test_rows_without_weight_count_for_nothing(tiny, packed):
  """They may be anything: loss, weight and divergence are without them."""
  silent = {**packed, 'mask': packed['mask'] * [[1.0], [0.0]]}
  other = {**silent, 'tokens': silent['tokens'].copy()}
  other['tokens'][1] = 7
  for name, a in zip(
    ('loss', 'weight', 'kl'),
    jax.tree.leaves(run(tiny, chunked, silent, 0.7)[0]),
    strict=True,
  ):
    assert np.isfinite(a), name
  found, expected = (
    run(tiny, chunked, batch, 0.7) for batch in (silent, other)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert found[0][1] == packed['mask'][0].sum()


def trained(config, steps=3, **changes):
  """(metrics of each step, the trained tree)."""
  config = config.copy_and_resolve_references()
  for name, values in changes.items():
    config[name] = {**config[name], **values}
  experiment = experiment_lib.prepare(config)
  with jax.set_mesh(experiment.mesh):
    frozen, state = experiment.start(experiment.load_base())
    step, metrics = jax.jit(experiment.step()), []
    for i in range(steps):
      batch = experiment.put(experiment.source(i))
      state, found = step(state, frozen, batch)
      metrics.append({name: float(x) for name, x in found.items()})
  return metrics, jax.tree.map(np.asarray, state.trainable)


@pytest.fixture
def config(tiny_config):
  # An eps this large keeps Adam from turning rounding into whole steps.
  tiny_config.optimizer = dict(name='adamw', eps=1e-3)
  tiny_config.schedule.peak = 1e-2
  tiny_config.batch.rows = 8
  tiny_config.objective = dict(name='sft', kl=0.5)
  return tiny_config


def test_accumulation_and_devices_do_not_matter(config):
  """1 x 8 rows are 4 x 2, and eight devices are one."""
  metrics, tree = trained(config)
  assert metrics[0]['kl'] == 0 and metrics[2]['kl'] > 1e-3
  for changes in (
    {'batch': dict(accumulate=4)},
    {'mesh': dict(data=2, fsdp=2, tensor=2, devices=8)},
  ):
    others, other_tree = trained(config, **changes)
    for own, other in zip(metrics, others, strict=True):
      for name in ('loss', 'kl', 'weight'):
        assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)
    assert_near(tree, other_tree, 1e-3)


def test_the_divergence_stays_small_where_it_is_dear(config):
  free, _ = trained(config, 8, objective=dict(kl=1e-6))
  dear, _ = trained(config, 8, objective=dict(kl=10.0))
  assert dear[-1]['kl'] < 0.5 * free[-1]['kl']


def test_full_fine_tuning_has_no_base_to_diverge_from(config):
  config.adapt = dict(name='full')
  with pytest.raises(ValueError, match='full fine-tuning keeps no base to'):
    trained(config)


@pytest.mark.parametrize('name', ['kl', 'balance'])
def test_a_weight_below_zero_is_refused(name):
  with pytest.raises(ValueError, match=f'objective.{name}: -0.1; at least 0'):
    sft.sft(None, None, {}, **{name: -0.1})


def test_sum_over_adds_the_divergence(tiny, packed):
  """The step's own sum over micro-batches of one row each."""
  batch = {name: rows[:, None] for name, rows in packed.items()}

  def one(_, rows):
    return chunked(policies(tiny, tiny[3]), rows, 0.7)

  found = jax.jit(lambda batch: train.sum_over(one, batch))(batch)
  expected, _ = run(tiny, chunked, packed, 0.7)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
  )
