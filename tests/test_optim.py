"""Optimizers against their papers' formulas in numpy, and their laws."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tuner import optim

DIMS = {'norm': 'LD', 'q': 'LDNH', 'embed': 'VD', 'q.a': 'LDR', 'q.b': 'LRNH'}
SHAPES = {
  'norm': (3, 8),
  'q': (3, 8, 2, 4),
  'embed': (16, 8),
  'q.a': (3, 8, 2),
  'q.b': (3, 2, 2, 4),
}
MATRIX = {
  'embed': ('V', 'D'),
  'q': ('D', 'NH'),
  'q.a': ('D', 'R'),
  'q.b': ('R', 'NH'),
}
DECAYED = ('q', 'embed', 'q.a', 'q.b')
NAMES = ('adafactor', 'adamw', 'lion', 'muon', 'sgd')


@functools.cache
def tree(seed):
  rng = np.random.default_rng(seed)
  return {
    path: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for path, shape in SHAPES.items()
  }


def make(name='adamw', dims=None, matrix=None, peak=0.1, **kwargs):
  own = {k: kwargs.pop(k) for k in list(kwargs) if k not in ('clip_norm',)}
  ratio = own.pop('lr_ratio', 1.0)
  return optim.make(
    dict(name=name, **own),
    dict(name='constant', peak=peak),
    10,
    dims or DIMS,
    matrix=matrix or MATRIX,
    lr_ratio=ratio,
    **kwargs,
  ).transform


def run(transform, params, steps=3, grads=lambda step: tree(step + 1)):
  """The params after each step, under jit."""
  return list(walk(transform, jax.jit(transform.update), params, steps, grads))


def walk(transform, update, params, steps, grads):
  state = jax.jit(transform.init)(params)
  for step in range(steps):
    updates, state = update(grads(step), state, params)
    params = {path: x + updates[path] for path, x in params.items()}
    yield params


@functools.cache
def plain(name):
  return run(make(name), tree(0))


def assert_follows(transform, reference, tolerance=1e-6):
  """`reference(x, grads, decay)` yields one parameter's value a step."""
  trace = run(transform, tree(0))
  for path, start in tree(0).items():
    grads = [np.float64(tree(step + 1)[path]) for step in range(3)]
    decay = 0.1 if path in DECAYED else 0.0
    wanted = reference(np.float64(start), grads, decay)
    for step, (got, want) in enumerate(zip(trace, wanted)):
      np.testing.assert_allclose(
        got[path], want, atol=tolerance, err_msg=f'{path}, step {step}'
      )


def test_adamw_is_the_papers():
  def reference(x, grads, decay, b1=0.8, b2=0.9, eps=1e-6):
    m = v = 0
    for t, g in enumerate(grads, 1):
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
      x = x - 0.1 * (direction + decay * x)
      yield x

  adamw = make('adamw', b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1)
  assert_follows(adamw, reference)


def test_lion_is_the_papers():
  def reference(x, grads, decay, b1=0.9, b2=0.95):
    m = 0
    for g in grads:
      x = x - 0.1 * (np.sign(b1 * m + (1 - b1) * g) + decay * x)
      m = b2 * m + (1 - b2) * g
      yield x

  lion = make('lion', b2=0.95, weight_decay=0.1)
  assert_follows(lion, reference)


@pytest.mark.parametrize(
  ('momentum', 'nesterov'), [(0.0, False), (0.9, False), (0.9, True)]
)
def test_sgd_is_the_papers(momentum, nesterov):
  def reference(x, grads, decay):
    m = 0
    for g in grads:
      m = momentum * m + g
      direction = momentum * m + g if nesterov else m
      x = x - 0.1 * (direction + decay * x)
      yield x

  sgd = make('sgd', momentum=momentum, nesterov=nesterov, weight_decay=0.1)
  assert_follows(sgd, reference)


def adafactor_matrix(x, grads, min_factored):
  """Algorithm 4 of arXiv:1804.04235 on one matrix, lr 0.1."""
  row = column = full = 0
  rms = lambda a: np.sqrt(np.mean(a**2))
  for t, g in enumerate(grads, 1):
    b = 1 - t**-0.8
    row = b * row + (1 - b) * np.mean(g**2, 1)
    column = b * column + (1 - b) * np.mean(g**2, 0)
    full = b * full + (1 - b) * g**2
    factored = row[:, None] * column[None] / row.mean()
    u = g / np.sqrt(factored if min(x.shape) >= min_factored else full)
    x = x - 0.1 * max(1e-3, rms(x)) * u / max(1, rms(u))
    yield x


@pytest.mark.parametrize('min_factored', [2, 128])
def test_adafactor_is_the_papers_on_every_layer(min_factored):
  """Stacked along L, its rms and its factors stay one layer's."""
  layers_of = {'embed': [...], 'q.a': range(3)}
  only = lambda seed: {path: tree(seed)[path] for path in layers_of}
  adafactor = make('adafactor', min_factored=min_factored)
  trace = run(adafactor, only(0), grads=lambda step: only(step + 1))
  for path, layers in layers_of.items():
    for layer in layers:
      grads = [np.float64(tree(s + 1)[path][layer]) for s in range(3)]
      start = np.float64(tree(0)[path][layer])
      wanted = adafactor_matrix(start, grads, min_factored)
      for step, (got, want) in enumerate(zip(trace, wanted, strict=True)):
        np.testing.assert_allclose(
          got[path][layer], want, atol=2e-6, err_msg=f'{path} {step}'
        )


def test_adafactor_keeps_rows_and_columns_only():
  params = {'w': jnp.zeros((4, 256, 512))}
  state = make('adafactor', dims={'w': 'LDF'}).init(params)
  sizes = sum(x.size for x in jax.tree.leaves(state))
  assert sizes < 4 * (256 + 512) + 100


def test_muon_moves_each_layer_by_an_orthogonal_matrix():
  """All singular values are near 1, before the scale by shape."""
  only = lambda seed: {'q': tree(seed)['q']}
  muon = make('muon', {'q': DIMS['q']}, rms=None, peak=1.0)
  moved = run(muon, only(0), 1, lambda step: only(step + 1))[0]
  for layer in range(3):
    moved_DNH = np.array(moved['q'][layer] - only(0)['q'][layer])
    values = np.linalg.svd(moved_DNH.reshape(8, 8), compute_uv=False)
    assert values.max() < 1.3 and np.median(values) > 0.6
    before = np.linalg.svd(tree(1)['q'][layer].reshape(8, 8), compute_uv=False)
    assert before.max() / np.median(before) > values.max() / np.median(values)


def test_muon_scales_to_one_rms():
  rng = np.random.default_rng(0)
  shapes = {'wide': (2, 16, 128), 'tall': (2, 128, 16)}
  grads = {k: jnp.asarray(rng.standard_normal(s)) for k, s in shapes.items()}
  dims = {k: 'LDF' for k in shapes}
  muon = make('muon', dims, {k: ('D', 'F') for k in shapes}, peak=1.0, rms=0.2)
  start = jax.tree.map(jnp.zeros_like, grads)
  moved = run(muon, start, 1, lambda step: grads)[0]
  for path, x in moved.items():
    assert 0.15 < float(jnp.sqrt(jnp.mean(x**2))) < 0.25, path


def test_muon_gives_the_rest_to_adam():
  adam = run(make('adamw', weight_decay=0.1), tree(0))[-1]
  muon = run(make('muon', weight_decay=0.1, steps=1), tree(0))[-1]
  for path in DIMS:
    same = np.allclose(adam[path], muon[path], atol=1e-6)
    assert same == (path in ('norm', 'embed')), path


def test_muon_refuses_what_is_no_matrix():
  with pytest.raises(ValueError, match='no trained parameter is a matrix'):
    optim.make(
      dict(name='muon'), dict(name='constant', peak=1.0), 10, {'norm': 'D'}
    )
  for matrix in [{'q': ('D', 'F')}, {'q': ('', 'D')}, {'q': ('DN', 'NH')}]:
    with pytest.raises(ValueError, match='^q: '):
      make('muon', matrix=matrix)


@pytest.mark.parametrize('name', NAMES)
def test_a_stack_of_layers_is_each_layer_alone(name):
  """What sets the shape of the code never changes a number."""
  dims = {p: d.removeprefix('L') for p, d in DIMS.items() if d[0] == 'L'}
  transform = make(name, dims)
  update = jax.jit(transform.update)
  for layer in range(3):
    cut = lambda seed, i=layer: {p: tree(seed)[p][i] for p in dims}
    grads = lambda step, c=cut: c(step + 1)
    *_, alone = walk(transform, update, cut(0), 3, grads)
    for path in dims:
      np.testing.assert_allclose(
        plain(name)[-1][path][layer], alone[path], atol=2e-6, err_msg=path
      )


@pytest.mark.parametrize('name', NAMES)
def test_decay_moves_matrices_and_the_ratio_is_bs(name):
  """And the ratio is one of learning rates: it multiplies the decay, too."""
  start = tree(0)
  both = run(make(name, weight_decay=0.5, lr_ratio=16), start, 1)[0]
  for path, x in start.items():
    ratio = 16 if path == 'q.b' else 1
    decay = 0.1 * 0.5 * x if path in DECAYED else 0
    np.testing.assert_allclose(
      both[path] - x,
      ratio * (plain(name)[0][path] - x - decay),
      rtol=1e-4,
      atol=2e-5,
      err_msg=path,
    )


@pytest.mark.parametrize(
  ('dims', 'is_matrix'),
  [
    ('D', False),
    ('LD', False),
    ('LF', False),
    ('LH', False),
    ('LNH', False),
    ('LKH', False),
    ('LEF', False),
    ('', False),
    ('VD', True),
    ('DV', True),
    ('LDNH', True),
    ('LNHD', True),
    ('LDE', True),
    ('LEDF', True),
    ('LDR', True),
    ('LRKH', True),
    ('LRD', True),
  ],
)
def test_which_letters_are_a_matrix(dims, is_matrix):
  assert optim.decays(dims) == is_matrix


def test_clip_is_by_the_norm_of_everything():
  clipped, _ = optim.clip(1.0).update(tree(1), optax.EmptyState())
  assert float(optim.global_norm(clipped)) == pytest.approx(1.0, rel=1e-5)
  small = jax.tree.map(lambda g: g * 1e-4, tree(1))
  same, _ = optim.clip(1.0).update(small, optax.EmptyState())
  jax.tree.map(np.testing.assert_array_equal, same, small)
  zero = jax.tree.map(jnp.zeros_like, small)
  kept, _ = optim.clip(1.0).update(zero, optax.EmptyState())
  jax.tree.map(np.testing.assert_array_equal, kept, zero)


def test_norm_of_bfloat16_is_summed_in_float32():
  ones = {'w': jnp.ones(70_000, jnp.bfloat16)}
  assert optim.global_norm(ones).dtype == jnp.float32
  assert float(optim.global_norm(ones)) == pytest.approx(70_000**0.5, rel=1e-6)
  clipped, _ = optim.clip(1.0).update(ones, optax.EmptyState())
  assert clipped['w'].dtype == jnp.bfloat16


def test_make_clips_before_the_optimizer():
  sgd = make('sgd', momentum=0.0, clip_norm=1.0, peak=0.5)
  moved = jax.tree.map(jnp.subtract, run(sgd, tree(0), 1)[0], tree(0))
  assert float(optim.global_norm(moved)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize('name', ['adamw', 'lion', 'muon', 'sgd'])
def test_the_moment_has_the_dtype_asked_for(name):
  state = make(name, mu_dtype='bfloat16').init(tree(0))
  kinds = {x.dtype for x in jax.tree.leaves(state) if x.ndim > 1}
  assert jnp.dtype('bfloat16') in kinds


@pytest.mark.parametrize('name', ['adafactor', 'adamw'])
def test_a_rate_that_falls_to_zero_moves_nothing(name):
  """Decay included: it is scaled by the learning rate everywhere."""
  made = optim.make(
    dict(name=name, weight_decay=0.1),
    dict(name='linear', peak=0.1),
    2,
    DIMS,
    matrix=MATRIX,
  )
  trace = run(made.transform, tree(0), 4)
  jax.tree.map(np.testing.assert_array_equal, trace[1], trace[3])
  assert any((trace[0][p] != trace[1][p]).any() for p in DIMS)


def test_make_says_what_it_resolved():
  made = optim.make(
    dict(name='adamw', b2=0.95),
    dict(name='cosine', peak=1, warmup_steps=2),
    10,
    DIMS,
  )
  assert made.resolved == {
    'optimizer': dict(
      name='adamw', b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, mu_dtype=None
    ),
    'schedule': dict(name='cosine', peak=1.0, warmup_steps=2, end=0.0),
  }
  assert float(made.learning_rate(0)) == 0.5


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(learning_rte=1.0), 'set by the program|unknown key'),
    (dict(b1='0.9'), "config.optimizer.b1: '0.9' "),
    (dict(clip_norm=0.0), 'clip_norm: 0.0'),
    (dict(lr_ratio=0.0), 'lr_ratio: 0.0'),
    (dict(name='make'), "unknown function 'make'"),
    (dict(name='adam'), "did you mean 'adamw'"),
  ],
)
def test_make_refuses(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)


def test_the_public_optimizers_are_these():
  found = [
    name
    for name, value in vars(optim).items()
    if inspect.isfunction(value)
    and list(inspect.signature(value).parameters)[:2]
    == ['learning_rate', 'dims']
  ]
  assert sorted(found) == list(NAMES)
