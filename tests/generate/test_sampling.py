"""Draws have the distribution that the settings define, row by row."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax.extend import core

from tuner.generate import sampling

V = 601  # Neither a multiple of a word nor of a block.
ROWS = 500
choose = jax.jit(sampling.choose, compiler_options=support.QUICK)
keys = jax.jit(sampling.keys, compiler_options=support.QUICK)
weights = jax.jit(sampling.weights, compiler_options=support.QUICK)
Sampling = sampling.Sampling

SETTINGS = {
  'plain': Sampling(1.0),
  'cold': Sampling(0.5),
  'hot': Sampling(2.5),
  'k': Sampling(1.0, top_k=7),
  'k beyond the vocabulary': Sampling(1.0, top_k=1000),
  'p': Sampling(1.0, top_p=0.8),
  'p of less than the most likely': Sampling(1.0, top_p=1e-3),
  'min_p': Sampling(1.0, min_p=0.1),
  'min_p of all': Sampling(1.0, min_p=1.0),
  'k and p': Sampling(0.8, top_k=20, top_p=0.7),
  'all': Sampling(1.7, top_k=30, top_p=0.9, min_p=0.2),
}


def random_logits(rows, vocabulary=V, seed=0):
  rng = np.random.default_rng(seed)
  return 3 * rng.standard_normal((rows, vocabulary), np.float32)


def chances(logits, row):
  """What `choose` draws by, normalised, for one Sampling."""
  weight_BV = weights(
    jnp.asarray(logits), sampling.settings([row] * len(logits))
  )
  assert (weight_BV.max(-1) == 1).all()
  return np.asarray(weight_BV / weight_BV.sum(-1, keepdims=True))


def draw(logits, rows, seeds, positions, allowed=None):
  row_keys = keys(np.asarray(seeds, np.uint32), np.asarray(positions, np.int32))
  settings = sampling.settings(rows)
  return np.asarray(choose(jnp.asarray(logits), settings, row_keys, allowed))


def draws(logits, row, n, allowed=None):
  """n tokens of one row of logits, each by a seed and position of its own."""
  logits = np.broadcast_to(logits, (ROWS, len(logits)))
  if allowed is not None:
    allowed = np.broadcast_to(allowed, (ROWS, len(allowed)))
  tokens = [
    draw(logits, [row] * ROWS, range(ROWS), [i] * ROWS, allowed)
    for i in range(n // ROWS)
  ]
  return np.concatenate(tokens)


def defined(logits, row):
  """Chances of one row by the definitions: sorted, cut, renormalised."""
  scaled = logits.astype(np.float64) / row.temperature
  order = np.argsort(-scaled, kind='stable')
  chance = np.exp(scaled - scaled.max())
  if row.top_k:
    least = scaled[order][min(row.top_k, len(logits)) - 1]
    chance = np.where(scaled >= least, chance, 0)
  if row.top_p < 1:
    # The smallest set of the most likely whose sum is at least top_p.
    sums = (chance / chance.sum())[order].cumsum()
    least = scaled[order][np.argmax(sums >= row.top_p)]
    chance = np.where(scaled >= least, chance, 0)
  chance = np.where(chance >= row.min_p * chance.max(), chance, 0)
  return chance / chance.sum()


def bitmask(ids, vocabulary=V):
  """uint32 words with the bits of these ids."""
  words = np.zeros(-(-vocabulary // 32), np.uint32)
  for i in ids:
    words[i // 32] |= np.uint32(1 << i % 32)
  return words


@pytest.mark.parametrize('name', SETTINGS)
def test_chances_are_those_of_the_definition(name):
  logits = random_logits(4)
  for got, row in zip(chances(logits, SETTINGS[name]), logits, strict=True):
    wanted = defined(row, SETTINGS[name])
    np.testing.assert_array_equal(got > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize('name', SETTINGS)
def test_chances_are_those_of_transformers(name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.set_num_threads(1)
  row, logits = SETTINGS[name], random_logits(16, seed=1)
  config = transformers.GenerationConfig(
    do_sample=True,
    temperature=row.temperature,
    top_k=row.top_k,
    top_p=row.top_p,
    min_p=row.min_p,
  )
  # The very list that its generate makes, in its order.
  processors = transformers.GenerationMixin()._get_logits_processor(config)
  names = [type(one).__name__ for one in processors]
  assert ('TopKLogitsWarper' in names) == (row.top_k > 0)
  scores = processors(None, torch.from_numpy(logits))
  theirs = torch.softmax(scores, dim=-1).numpy()
  ours = chances(logits, row)
  np.testing.assert_array_equal(ours > 0, theirs > 0)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
  'row', [Sampling(1.0), Sampling(1.7, 40, 0.95, 0.02)], ids=repr
)
def test_tokens_come_as_often_as_their_chance_says(row):
  """Pearson's chi-square, the tokens of few draws counted as one.

  Within five standard deviations of its mean, the degrees of freedom.
  """
  logits, n = random_logits(1)[0] / 2, 20_000
  chance = defined(logits, row)
  counts = np.bincount(draws(logits, row, n), minlength=V)
  assert not counts[chance == 0].any()
  is_rare = chance * n < 10
  seen = np.append(counts[~is_rare], counts[is_rare].sum())
  wanted = n * np.append(chance[~is_rare], chance[is_rare].sum())
  seen, wanted = seen[wanted > 0], wanted[wanted > 0]
  free = len(seen) - 1
  assert free > 10
  square = ((seen - wanted) ** 2 / wanted).sum()
  assert free - 5 * (2 * free) ** 0.5 < square < free + 5 * (2 * free) ** 0.5


def test_rare_tokens_of_a_flat_distribution_come_too():
  """2,000 draws of 5,000 alike: as many different ones as chance gives."""
  tokens = draws(np.zeros(5000, np.float32), Sampling(1.0), 2000)
  different = len(set(tokens.tolist()))
  wanted = 5000 * (1 - (1 - 1 / 5000) ** 2000)
  assert abs(different - wanted) < 5 * 20  # a deviation is 16.4
  assert abs(tokens.mean() - 2499.5) < 5 * 1443.4 / 2000**0.5


def test_draws_of_neighbouring_rows_and_positions_are_independent():
  """The share of equal draws is the sum of squared chances."""
  row = Sampling(1.0)
  logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
  tokens = draws(logits, row, 20_000).reshape(-1, ROWS)
  alike = 0.5**2 + 0.25**2 + 2 * 0.125**2
  for first, second in (
    (tokens[:, 1:], tokens[:, :-1]),
    (tokens[1:], tokens[:-1]),
  ):
    deviation = (alike * (1 - alike) / first.size) ** 0.5
    assert abs((first == second).mean() - alike) < 5 * deviation


def test_a_greedy_row_is_the_argmax_and_the_first_of_equals():
  logits = random_logits(6)
  logits[2, [3, 77]] = 100.0
  wanted = logits.argmax(-1)
  assert wanted[2] == 3
  rows = [Sampling()] * 6
  np.testing.assert_array_equal(draw(logits, rows, range(6), [0] * 6), wanted)
  # Beside rows that are sampled, too; cuts say nothing to a greedy row.
  rows = [Sampling(top_k=3, top_p=0.1), Sampling(2.0)] * 3
  got = draw(logits, rows, range(6), [0] * 6)
  np.testing.assert_array_equal(got[::2], wanted[::2])


def test_nothing_is_drawn_where_all_rows_are_greedy():
  """The draw and each cut stand in a branch of their own."""
  program = jax.make_jaxpr(sampling.choose)(
    jnp.zeros((2, V)),
    sampling.settings([Sampling()] * 2),
    sampling.keys(np.zeros(2, np.uint32), np.zeros(2, np.int32)),
  )
  always, sometimes = set(), set()
  _primitives(program.jaxpr, always, sometimes)
  costly = {'exp', 'div', 'cumsum', 'while', 'scan', 'random_bits'}
  assert not costly & always
  assert {'exp', 'cumsum', 'random_bits'} <= sometimes
  assert 'sort' not in always | sometimes


def _primitives(jaxpr, always, sometimes):
  """Names of the operations of a program, apart those that a cond may skip."""
  for equation in jaxpr.eqns:
    always.add(equation.primitive.name)
    inner = sometimes if equation.primitive.name == 'cond' else always
    for part in core.jaxprs_in_params(equation.params):
      _primitives(part, inner, sometimes)


def test_a_row_is_the_same_whatever_the_batch_holds():
  """Alone, in another place, beside rows of other settings: the same token."""
  logits, rows = random_logits(len(SETTINGS)), list(SETTINGS.values())
  n = len(rows)
  seeds, positions = 7 * np.arange(n), 3 + np.arange(n)
  together = draw(logits, rows, seeds, positions)
  for i in range(n):
    alone = draw(
      logits[[i] * n], [rows[i]] * n, [seeds[i]] * n, [positions[i]] * n
    )
    np.testing.assert_array_equal(alone, [together[i]] * n)
  order = np.random.default_rng(0).permutation(n)
  moved = draw(
    logits[order], [rows[i] for i in order], seeds[order], positions[order]
  )
  np.testing.assert_array_equal(moved, together[order])


def test_the_cuts_of_another_row_leave_no_trace():
  """Bit for bit, in tails whose weights vanish in the sum of all, too."""
  logits = np.stack([np.linspace(0, -30, V, dtype=np.float32)] * 2)
  rows = list(SETTINGS.values())
  for row in rows:
    alone = weights(jnp.asarray(logits), sampling.settings([row] * 2))[0]
    for other in rows:
      settings = sampling.settings([row, other])
      beside = weights(jnp.asarray(logits), settings)[0]
      np.testing.assert_array_equal(beside, alone)
  plain = weights(jnp.asarray(logits), sampling.settings([rows[0], rows[-1]]))
  assert (plain[0] > 0).all()


def test_seed_and_position_both_change_the_draw():
  logits, rows = np.zeros((ROWS, V), np.float32), [Sampling(1.0)] * ROWS
  base = draw(logits, rows, range(ROWS), [0] * ROWS)
  other = draw(logits, rows, range(ROWS, 2 * ROWS), [0] * ROWS)
  later = draw(logits, rows, range(ROWS), [1] * ROWS)
  assert (base == other).mean() < 0.02
  assert (base == later).mean() < 0.02
  again = draw(logits, rows, range(ROWS), [0] * ROWS)
  np.testing.assert_array_equal(base, again)


def test_equal_logits_are_kept_or_cut_together():
  logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
  for row in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
    np.testing.assert_array_equal(
      chances(logits, row)[0] > 0, [True, True, True, True, False]
    )


def test_the_least_difference_of_logits_is_one():
  """Cuts are exact to the last bit of a float32, near and far."""
  for far in (1.0, 30.0):
    below = np.nextafter(np.float32(-far), np.float32(-np.inf))
    below = np.nextafter(below, np.float32(-np.inf))
    logits = np.array([[0.0, below, -far]], np.float32)
    kept = chances(logits, Sampling(1.0, top_k=2))[0] > 0
    np.testing.assert_array_equal(kept, [True, False, True])


def test_a_low_temperature_is_the_argmax_and_never_nan():
  logits = random_logits(3)
  rows = [Sampling(1e-6), Sampling(1e-6, top_p=0.9), Sampling(1e-6, 5)]
  got = draw(logits, rows, range(3), [0] * 3)
  np.testing.assert_array_equal(got, logits.argmax(-1))


@pytest.mark.parametrize('row', [Sampling(), *SETTINGS.values()], ids=repr)
def test_only_what_is_allowed_is_chosen(row):
  """The cuts are made of what is allowed: as if the rest were not there."""
  logits = random_logits(1)[0]
  ids = np.random.default_rng(1).choice(V, 40, replace=False)
  ids = np.sort(np.append(ids, [V - 1]))
  tokens = draws(logits, row, ROWS, bitmask(ids))
  assert set(tokens.tolist()) <= set(ids.tolist())
  if not row.temperature:
    assert (tokens == ids[logits[ids].argmax()]).all()
    return
  masked = np.full((1, V), -np.inf, np.float32)
  masked[0, ids] = logits[ids]
  wanted = defined(logits[ids], row)
  np.testing.assert_allclose(chances(masked, row)[0, ids], wanted, atol=1e-6)
  assert (wanted[np.searchsorted(ids, tokens)] > 0).all()


def test_bits_beyond_the_vocabulary_are_no_tokens():
  full = np.full((1, -(-V // 32)), 0xFFFFFFFF, np.uint32)
  logits = -np.ones((1, V), np.float32)
  assert draw(logits, [Sampling()], [0], [0], full)[0] == 0
  assert draw(logits, [Sampling(1.0)], [0], [0], full)[0] < V


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_row_without_a_possible_token_is_told_not_chosen(temperature):
  logits = random_logits(4)
  logits[1] = np.nan
  logits[3, 5] = np.nan
  allowed = np.stack([bitmask([3])] * 2 + [bitmask([])] + [bitmask([5])])
  rows = [Sampling(temperature)] * 4
  got = draw(logits, rows, range(4), [0] * 4, allowed)
  np.testing.assert_array_equal(got, [3, -1, -1, -1])
  with pytest.raises(RuntimeError, match=re.escape('rows [1, 2, 3]')):
    sampling.checked(got)
  np.testing.assert_array_equal(sampling.checked(got[:1]), [3])


@pytest.mark.parametrize(
  'key, value',
  [
    ('temperature', -0.1),
    ('temperature', 1e-9),
    ('temperature', float('nan')),
    ('temperature', float('inf')),
    ('temperature', True),
    ('temperature', '1'),
    ('top_k', -1),
    ('top_k', 2.0),
    ('top_k', True),
    ('top_k', 2**31),
    ('top_p', 0),
    ('top_p', 1.01),
    ('top_p', float('nan')),
    ('min_p', -0.01),
    ('min_p', 1.5),
    ('min_p', None),
  ],
)
def test_a_setting_out_of_range_is_refused_by_name(key, value):
  message = re.escape(f'sampling.{key}: {value!r}; it must be ')
  with pytest.raises(ValueError, match=message):
    Sampling(**{key: value})


def test_settings_at_their_ends_are_taken():
  Sampling(0, 0, 1, 0)
  Sampling(1e-6, 1, 1e-9, 1)
  Sampling(np.float32(0.7), np.int64(4), np.float32(0.5), np.float64(0.5))
