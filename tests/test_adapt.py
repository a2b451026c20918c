"""LoRA: where it starts, what it targets, what trains, and merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner import adapt
from tuner.models import linear, policy, weights

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 16))
ALL = ('k', 'o', 'q', 'v', 'down', 'gate', 'up')

PATHS = tuple(
  f'{part}.{name}'
  for part, group in (('attention', ALL[:4]), ('mlp', ALL[4:]))
  for name in group
)


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  """With smaller norms: those of 5 enlarge float32's rounding."""
  model, values = support.load_model(tiny_dir)
  return model, {k: v / 4 if 'norm' in k else v for k, v in values.items()}


def lora(model, **kwargs):
  return adapt.lora(weights.rows(model), **{'rank': 4, 'alpha': 8.0, **kwargs})


def factors(model, adaptation, scale=0.3):
  """Random a and b, so that the adapter changes something."""
  sizes = model.config.sizes
  rng = np.random.default_rng(1)
  return {
    path: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    for path, shape in adaptation.shapes(sizes).items()
  }


def logits(model, values):
  return np.asarray(support.logits(weights.fill(model, values), TOKENS))


def names(chosen):
  return tuple(path.rpartition('.')[2] for path in chosen)


def test_lora_starts_equal_to_the_base(tiny):
  model, values = tiny
  adaptation = lora(model)
  fresh = support.fresh_factors(model, adaptation)
  assert all(np.asarray(x).any() == p.endswith('.a') for p, x in fresh.items())
  found = logits(model, adaptation.attach(values, fresh))
  np.testing.assert_allclose(found, logits(model, values), rtol=1e-6, atol=1e-6)


def test_the_start_is_that_of_peft(tiny):
  """a uniform in +-1/sqrt(inputs): o reads N x H = 32, down reads F = 48."""
  model, _ = tiny
  fresh = support.fresh_factors(model, lora(model, rank=16))
  for path, inputs in (('attention.o', 32), ('mlp.down', 48)):
    a = np.abs(np.asarray(fresh[f'blocks.0.{path}.a']))
    bound = 1 / np.sqrt(inputs)
    assert a.max() <= bound
    assert a.max() > 0.98 * bound
    assert abs(a.mean() - bound / 2) < 0.05 * bound


@pytest.mark.parametrize('scaling', ['lora', 'rslora'])
def test_merged_equals_attached(tiny, scaling):
  """Over all matrices, the stacked NHD of o_proj among them."""
  model, values = tiny
  adaptation = lora(model, scaling=scaling)
  attached = adaptation.attach(values, factors(model, adaptation, 0.05))
  rows = adaptation.rows
  merged = {path: adapt.merge(rows, attached, path) for path in rows}
  assert all(merged[path].shape == values[path].shape for path in rows)
  found = logits(model, attached)
  assert np.abs(found - logits(model, values)).max() > 0.1
  np.testing.assert_allclose(logits(model, merged), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'targets, expected',
  [
    ('all-linear', ALL),
    ('q', ('q',)),
    ('o_proj', ('o',)),
    ('blocks.0.mlp.down', ('down',)),
    (['v_proj', 'q'], ('q', 'v')),
    ('N', ('o', 'q')),
    ('K', ('k', 'v')),
    ('F', ('down', 'gate', 'up')),
    (['K', 'up_proj', 'k'], ('k', 'v', 'up')),
    ('D', ALL),
  ],
)
def test_targets(tiny, targets, expected):
  """By our names, Hugging Face names, paths and letters, in model order."""
  model, _ = tiny
  chosen = lora(model, targets=targets).targets
  assert names(chosen) == expected
  assert all(path.startswith('blocks.') for path in chosen)


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (
      dict(targets='q_prj'),
      "config.adapt.targets: 'q_prj' names no matrix of the blocks; did you "
      "mean 'q_proj'? Names are down, gate, k, o, q, up, v; letters are those "
      'of their dims.',
    ),
    (
      dict(targets=['q', 'gat']),
      "config.adapt.targets: 'gat' names no matrix of the blocks; did you mean "
      "'gate'? Names are down, gate, k, o, q, up, v; letters are those of "
      'their dims.',
    ),
    (
      dict(targets='L'),
      "config.adapt.targets: 'L' names no matrix of the blocks. Names are "
      'down, gate, k, o, q, up, v; letters are those of their dims.',
    ),
    (
      dict(targets=()),
      'config.adapt.targets: () names no matrix of the blocks. Names are down, '
      'gate, k, o, q, up, v; letters are those of their dims.',
    ),
    (dict(rank=0), 'config.adapt.rank: 0; it must be at least 1.'),
    (dict(dropout=1.0), 'config.adapt.dropout: 1.0; it must be in [0, 1).'),
    (
      dict(scaling='dora'),
      "config.adapt.scaling: 'dora'; allowed are lora, rslora.",
    ),
  ],
)
def test_errors(tiny, kwargs, message):
  with pytest.raises(ValueError) as error:
    lora(tiny[0], **kwargs)
  assert str(error.value) == message


def test_norms_and_embeddings_are_no_targets(tiny):
  with pytest.raises(ValueError, match='names no matrix'):
    lora(tiny[0], targets='embed')
  with pytest.raises(ValueError, match='names no matrix'):
    lora(tiny[0], targets='attention_norm')


def test_scales():
  """alpha / rank; alpha / sqrt(rank) for rsLoRA."""
  row = weights.Row('blocks.q', 'DF', 'q', 'FD', 'normal', 0.02, 'D', ())
  rows = {row.path: row}
  assert adapt.lora(rows, 16, 32.0).scale == 2.0
  assert adapt.lora(rows, 16, 32.0, scaling='rslora').scale == 8.0


class TestDropout:
  """On the adapter's input only, with a key only."""

  def project(self, key, rate=0.5):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 8)).astype(np.float32)
    base, a, b = (
      rng.standard_normal(shape).astype(np.float32)
      for shape in ((8, 5), (2, 8), (2, 5))
    )
    weight = linear.Lora(base, a, b, key, 1.0, rate)
    return linear.project('BTD,DF->BTF', x, weight)

  def test_a_key_changes_the_output_and_is_all_that_does(self):
    out = self.project(jax.random.key(0))
    np.testing.assert_array_equal(out, self.project(jax.random.key(0)))
    assert np.abs(out - self.project(jax.random.key(1))).max() > 0.1
    assert np.abs(out - self.project(None)).max() > 0.1

  def test_without_key_or_rate_there_is_none(self):
    plain = self.project(None, rate=0.0)
    np.testing.assert_array_equal(self.project(None), plain)
    np.testing.assert_array_equal(self.project(jax.random.key(0), 0.0), plain)

  def test_its_mean_is_no_dropout(self):
    """Over 4,000 keys, within five standard errors."""
    keys = jax.random.split(jax.random.key(0), 4000)
    outs = np.asarray(jax.vmap(self.project)(keys), np.float64)
    error = outs.std(0) / np.sqrt(len(keys))
    assert (np.abs(outs.mean(0) - self.project(None)) < 5 * error).all()
    assert error.min() > 0

  def test_each_layer_and_matrix_has_its_own_key(self, tiny):
    model, values = tiny
    adaptation = lora(model, dropout=0.5)
    trainable = factors(model, adaptation)
    attached = adaptation.attach(values, trainable, jax.random.key(0))
    keys = [attached[path].key for path in adaptation.targets]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(ALL) * model.config.L
    plain = adaptation.attach(values, trainable)
    assert np.abs(logits(model, attached) - logits(model, plain)).max() > 0.1


def loss(model, adaptation, frozen, trainable):
  batch = support.pack([[(row, 5)] for row in TOKENS], TOKENS.shape[1])
  values = adaptation.attach(frozen, trainable)
  tuned = policy.Policy(weights.fill(model, values), chunk=8)
  return -tuned.logprobs(batch).sum()


def test_only_the_adapter_trains(tiny):
  """Every factor gets a gradient; the frozen tree is no part of it."""
  model, values = tiny
  adaptation = lora(model)
  frozen, start = adaptation.split(values)
  assert frozen.keys() == values.keys() and not start
  trainable = factors(model, adaptation)
  own = functools.partial(loss, model, adaptation)
  step = jax.jit(jax.grad(own, 1), compiler_options=support.QUICK)
  grads = step(frozen, trainable)
  assert grads.keys() == {f'blocks.0.{p}.{f}' for p in PATHS for f in 'ab'}
  assert all(np.abs(grad).max() > 1e-4 for grad in grads.values())
  assert all(grads[p].shape == trainable[p].shape for p in grads)


def test_full_trains_everything_and_has_no_reference(tiny):
  model, values = tiny
  adaptation = adapt.full(weights.rows(model))
  frozen, trainable = adaptation.split(values)
  assert not frozen and trainable.keys() == values.keys()
  assert adaptation.dims.keys() == values.keys()
  assert adaptation.attach(frozen, trainable) == values
  with pytest.raises(ValueError, match='keeps no untuned reference; use lora'):
    adaptation.base(frozen)


def test_matrices_name_inputs_and_outputs(tiny):
  """What the optimizers read: which letters a matrix contracts."""
  model, _ = tiny
  adaptation = lora(model, targets=['q', 'down'])
  assert adaptation.matrices == {
    'blocks.0.attention.q.a': ('D', 'R'),
    'blocks.0.attention.q.b': ('R', 'NH'),
    'blocks.0.mlp.down.a': ('F', 'R'),
    'blocks.0.mlp.down.b': ('R', 'D'),
  }
  assert adaptation.dims['blocks.0.attention.q.b'] == 'LRNH'


@pytest.mark.parametrize(
  'spec, x_shape, weight_shape',
  [
    ('BTD,DNH->BTNH', (2, 3, 8), (8, 2, 4)),
    ('BTNH,NHD->BTD', (2, 3, 2, 4), (2, 4, 8)),
    ('BTF,FD->BTD', (2, 3, 5), (5, 8)),
    ('BTD,RD->BTR', (2, 3, 8), (2, 8)),
    ('BTD,VD->BTV', (2, 3, 8), (7, 8)),
  ],
)
def test_contract_has_the_gradients_of_einsum(spec, x_shape, weight_shape):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(x_shape).astype(np.float32)
  weight = rng.standard_normal(weight_shape).astype(np.float32)

  def total(fn, x, weight):
    return jnp.sin(fn(spec, x, weight)).sum()

  grads = (
    jax.grad(functools.partial(total, fn), (0, 1))(x, weight)
    for fn in (linear.contract, jnp.einsum)
  )
  for found, expected in zip(*grads, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
