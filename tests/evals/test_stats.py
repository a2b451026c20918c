"""Intervals: that they cover what they claim, and never a false certainty."""

import itertools
import math

import numpy as np
import pytest

from tuner.evals import stats

SETS = 1000


def of_many(draw, truth, n, tails='equal'):
  """The part of SETS intervals that hold the truth.

  draw(rng, (sets, n)) gives (scores, weights). Sets are drawn again 20 at a
  time, so that no one draw decides all of them.
  """
  rng, held = np.random.default_rng(0), 0
  for seed in range(SETS // 20):
    values, weights = draw(rng, (20, n))
    _, low, high = stats.studentised(
      values, weights, seed, samples=2000, tails=tails
    )
    held += ((low <= truth) & (truth <= high)).sum()
  return held / SETS


def plain(draw):
  return lambda rng, size: (draw(rng, size), np.ones(size))


def mostly_right(rng, size):
  """As F1 of a good model: 9 of 10 rows are right, the others anything."""
  return np.where(rng.random(size) < 0.9, 1.0, rng.random(size))


def half_right(rng, size):
  return np.where(rng.random(size) < 0.5, 1.0, rng.random(size))


def weighted(rng, size):
  """Nats a token of rows of very different lengths."""
  return rng.gamma(2, 0.5, size), np.ceil(rng.lognormal(3, 0.6, size))


def longer_is_easier(rng, size):
  tokens = np.ceil(rng.lognormal(3, 0.8, size))
  return rng.gamma(2, 0.5, size) * (tokens / 20) ** -0.3, tokens


def skewed_gain(rng, size):
  return rng.exponential(1, size) - rng.exponential(0.5, size)


def rare_gain(rng, size):
  """One row in three differs, and more of those are won."""
  gain = rng.choice([-1, 0.5, 1], size=size, p=[0.3, 0.2, 0.5])
  return np.where(rng.random(size) < 1 / 3, gain, 0)


def better(rng, size):
  before = half_right(rng, size)
  return np.where(rng.random(size) < 0.7, 1.0, before) - before


LONGER_IS_EASIER = (
  math.exp(3 * 0.7 + 0.5 * (0.8 * 0.7) ** 2) * 20**0.3 / math.exp(3 + 0.32)
)
COVERAGE = {
  'exponential': (plain(lambda r, s: r.exponential(1, s)), 1.0),
  'beta': (plain(lambda r, s: r.beta(2, 1, s)), 2 / 3),
  'half right': (plain(half_right), 0.75),
  'weighted': (weighted, 1.0),
  'longer is easier': (longer_is_easier, LONGER_IS_EASIER),
}
GAINS = {
  'skewed': (skewed_gain, 0.5),
  'rare': (rare_gain, 0.1),
  'from half right to mostly': (better, 0.175),
  'none': (lambda r, s: mostly_right(r, s) - mostly_right(r, s), 0.0),
}


@pytest.mark.parametrize('n', [50, 150])
@pytest.mark.parametrize('name', COVERAGE)
def test_95_of_100_intervals_hold_the_truth(name, n):
  draw, truth = COVERAGE[name]
  assert 0.93 <= of_many(draw, truth, n) <= 0.97


@pytest.mark.parametrize('n', [50, 150])
@pytest.mark.parametrize('name', GAINS)
def test_paired_intervals_hold_the_truth(name, n):
  draw, truth = GAINS[name]
  held = of_many(plain(draw), truth, n, 'symmetric')
  # Between two equal systems of which few rows differ it is too wide, if so.
  assert 0.93 <= held <= (0.99 if name == 'none' else 0.97)


@pytest.mark.parametrize(
  ('draw', 'truth', 'n', 'least', 'most'),
  [
    (lambda r, s: r.lognormal(0, 1, s), math.exp(0.5), 50, 0.91, 0.94),
    (lambda r, s: r.lognormal(0, 1, s), math.exp(0.5), 150, 0.93, 0.96),
    (mostly_right, 0.95, 50, 0.95, 0.98),
    (mostly_right, 0.95, 150, 0.95, 0.985),
  ],
)
def test_where_other_than_95_of_100_hold_the_truth(draw, truth, n, least, most):
  """One row that outweighs all others may be missing; five rows say little.

  Of 10,000 sets: 92.8, 94.3, 96.8 and 97.4 %.
  """
  assert least <= of_many(plain(draw), truth, n) <= most


def test_percentiles_would_hold_less():
  """Why the interval is studentised: 50 skewed scores, the same draws."""
  rng, held = np.random.default_rng(0), 0
  for seed in range(SETS // 20):
    values = rng.lognormal(0, 1, (20, 50))
    means = np.concatenate(list(stats.draws(50, seed, 2000))) @ values.T / 50
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    held += ((low <= math.exp(0.5)) & (math.exp(0.5) <= high)).sum()
  assert held / SETS < 0.9


def choices(n, k):
  return np.array([math.comb(n, i) for i in range(k + 1)], float)


# Exactly, by the binomial distribution: n, the truth, and what is covered.
WILSON = [
  (50, 0.05, 0.9622),
  (50, 0.5, 0.9351),
  (50, 0.9, 0.9703),
  (150, 0.05, 0.9433),
  (150, 0.5, 0.9591),
  (150, 0.9, 0.9603),
]


@pytest.mark.parametrize(('n', 'truth', 'wanted'), WILSON)
def test_intervals_of_0_and_1_hold_the_truth(n, truth, wanted):
  """What no interval of a count can do better than: it has n + 1 values."""
  k = np.arange(n + 1)
  chance = choices(n, n) * truth**k * (1 - truth) ** (n - k)
  ends = [stats.bootstrap([1] * i + [0] * (n - i), 0) for i in range(n + 1)]
  holds = [low <= truth <= high for _, low, high in ends]
  assert chance[holds].sum() == pytest.approx(wanted, abs=5e-5)


def test_intervals_of_0_and_1_hold_every_truth():
  """Exactly, by the binomial distribution: 95 % on average over proportions."""
  n = 100
  ends = [stats.bootstrap([1] * k + [0] * (n - k), 0)[1:] for k in range(n + 1)]
  low_K, high_K = np.array(ends).T
  choose_K = np.array([math.comb(n, k) for k in range(n + 1)], float)
  truth_P = np.arange(1, 100) / 100
  held = []
  for truth in truth_P:
    chance_K = truth ** np.arange(n + 1) * (1 - truth) ** np.arange(n, -1, -1)
    hold_K = (low_K <= truth) & (truth <= high_K)
    held.append((choose_K * chance_K * hold_K).sum())
  assert 0.94 < np.mean(held) < 0.96 and min(held) > 0.91


def held_by_pairs(cells, n):
  """The part of SETS paired intervals of 0 and 1 that hold the truth.

  cells: chances that both, ours, theirs and neither are right.
  """
  rng, held, known = np.random.default_rng(0), 0, {}
  for counts in map(tuple, rng.multinomial(n, cells, SETS).tolist()):
    if counts not in known:
      ours = np.repeat([1, 1, 0, 0], counts)
      theirs = np.repeat([1, 0, 1, 0], counts)
      _, low, high = stats.paired(ours, theirs, 0)
      known[counts] = low <= cells[1] - cells[2] <= high
    held += known[counts]
  return held / SETS


@pytest.mark.parametrize('n', [50, 150])
@pytest.mark.parametrize(
  'cells',
  [(0.4, 0.1, 0.1, 0.4), (0.6, 0.2, 0.05, 0.15), (0.3, 0.5, 0.05, 0.15)],
)
def test_paired_intervals_of_0_and_1_hold_the_truth(cells, n):
  assert 0.93 <= held_by_pairs(cells, n) <= 0.97


def test_rare_flips_of_few_rows_are_held_more_often():
  """50 rows of which 5 flip: Newcombe's interval is wide there."""
  assert 0.95 < held_by_pairs((0.85, 0.05, 0.05, 0.05), 50) < 0.99


def test_of_equal_systems_mcnemar_calls_few_different():
  """At most 5 % at 0.05, for every number of rows that flip."""
  for n in range(120):
    p_K = np.array([stats.mcnemar(k, n - k) for k in range(n + 1)])
    assert (choices(n, n) * 0.5**n)[p_K <= 0.05].sum() <= 0.05
  assert stats.mcnemar(1, 5) == stats.mcnemar(5, 1) == pytest.approx(14 / 64)
  assert stats.mcnemar(0, 0) == stats.mcnemar(3, 3) == 1
  assert stats.mcnemar(70_000, 69_000) == pytest.approx(0.0073724138)


@pytest.mark.parametrize('one', ['skewed', 'equal but for some', 'right'])
def test_of_equal_systems_few_are_called_different(one):
  """A/A: both answers of a row are draws of one distribution of its own.

  Of 1,000 at one in twenty, two standard errors above 50 are 64.
  """
  rng, called, apart = np.random.default_rng(1), 0, 0
  for seed in range(SETS):
    hard = rng.random(50)
    both = rng.exponential(1, (2, 50)) * hard
    if one == 'equal but for some':
      both = np.where(rng.random(50) < 0.2, both, both[0])
    if one == 'right':
      both = rng.random((2, 50)) < hard
    found = stats.compare(*both, seed, samples=400)
    called += found.p <= 0.05
    apart += not found.difference.low <= 0 <= found.difference.high
  assert called <= 64 and apart <= 50


def test_of_all_signs_of_a_gain_one_in_twenty_is_called_different():
  """Exactly: of equal systems, the ways to change them are equally likely."""
  rng = np.random.default_rng(0)
  for n in (5, 8, 10):
    gain = rng.exponential(1, n)
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    p = [stats.compare(s * gain, np.zeros(n), 0, 2000).p for s in signs]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 1e-12
    assert n == 5 or np.mean(np.array(p) <= 0.05) > 0.04


def test_a_real_difference_is_called_one():
  rng = np.random.default_rng(0)
  hard = rng.random(150)
  found = stats.compare(hard + 0.1 * rng.random(150), hard, 0)
  assert found.p == pytest.approx(1 / 10_001)
  assert (found.wins, found.ties, found.losses) == (150, 0, 0)
  found = stats.compare([1, 1, 1, 0, 1], [0, 0, 1, 1, 1], 0)
  assert (found.wins, found.ties, found.losses) == (2, 2, 1)
  assert found.p == 1 and found.difference == stats.paired(
    [1, 1, 1, 0, 1], [0, 0, 1, 1, 1], 0
  )
  same = stats.compare(hard, hard, 0)
  assert (same.p, same.ties) == (1, 150) and same.difference == (0, 0, 0)


def test_the_randomisation_test_counts_all_signs():
  """Against every one of the 2 ** 10 ways to change the systems."""
  gain = np.random.default_rng(2).normal(0.4, 1, 10)
  signs = np.array(list(itertools.product([-1, 1], repeat=10)))
  wanted = (abs(signs @ gain) >= abs(gain.sum()) - 1e-12).mean()
  found = stats.compare(gain, np.zeros(10), 0).p
  assert found == pytest.approx(wanted) and 0.05 < wanted < 0.95
  drawn = stats.compare(gain, np.zeros(10), 0, samples=1000).p
  assert drawn != found and drawn == pytest.approx(wanted, abs=0.05)


def test_nothing_right_and_everything_right_keep_an_interval():
  mean, low, high = stats.bootstrap([0] * 150, seed=0)
  assert (mean, low) == (0, 0) and high == pytest.approx(0.02497, abs=1e-5)
  mean, low, high = stats.bootstrap([1.0] * 150, seed=0)
  assert (mean, high) == (1, 1) and low == pytest.approx(0.97503, abs=1e-5)
  assert stats.bootstrap([1], seed=0).low == pytest.approx(0.2065, abs=1e-4)


def test_wilson_is_the_published_one():
  """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)."""
  _, low, high = stats.bootstrap([1] * 81 + [0] * 182, seed=0)
  assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
  ('cells', 'wanted'),
  [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292))],
)
def test_newcombe_is_the_published_one(cells, wanted):
  """Rows that both, one, the other and neither got right; 1998, table II."""
  both, ours, theirs, neither = cells
  scores = [1] * (both + ours) + [0] * (theirs + neither)
  baseline = [1] * both + [0] * ours + [1] * theirs + [0] * neither
  mean, low, high = stats.paired(scores, baseline, seed=0)
  assert mean == pytest.approx(0.2)
  assert (round(low, 4), round(high, 4)) == wanted


def test_every_row_better_is_still_no_certainty():
  mean, low, high = stats.paired([1] * 30, [0] * 30, seed=0)
  assert (mean, high) == (1, 1) and 0.8 < low < 0.9


def test_pairing_is_sharper_than_two_intervals():
  rng = np.random.default_rng(0)
  hard = rng.random(200)
  better = np.clip(hard + 0.02 + 0.01 * rng.random(200), 0, 1)
  mean, low, high = stats.paired(better, hard, seed=0)
  assert 0 < low < mean < high < 0.04
  assert stats.bootstrap(better, 0).low < stats.bootstrap(hard, 0).high
  swapped = stats.paired(hard, better, seed=0)
  np.testing.assert_allclose(swapped, (-mean, -high, -low), rtol=1e-9)


def test_the_bootstrap_is_that_of_a_plain_loop():
  """Efron and Tibshirani 1993, section 12.5, a row of average spread added."""
  scores, n = np.random.default_rng(3).gamma(1.0, size=40), 40
  rng = np.random.default_rng(5)
  error = scores.std(ddof=1) / n**0.5
  ts = []
  for _ in range(20_000):
    drawn = rng.choice(scores, n)
    own = drawn.std(ddof=1) ** 2 / n
    shift = drawn.mean() - scores.mean()
    ts.append(shift / ((n * own + error**2) / (n + 1)) ** 0.5)
  low, high = scores.mean() - np.quantile(ts, [0.95, 0.05]) * error
  got = stats.bootstrap(scores, seed=0, samples=20_000, level=0.9)
  np.testing.assert_allclose(got[1:], [low, high], rtol=0.01)


def test_sets_together_are_as_each_alone():
  rng = np.random.default_rng(0)
  values, weights = rng.gamma(1, size=(3, 20)), rng.integers(1, 9, (3, 20))
  together = stats.studentised(values, weights, 7)
  for i, (one, own) in enumerate(zip(values, weights)):
    alone = stats.bootstrap(one, 7, weights=own)
    np.testing.assert_allclose([end[i] for end in together], alone, rtol=1e-9)
  mean, low, high = stats.studentised(values, weights, 7, tails='symmetric')
  np.testing.assert_allclose(high - mean, mean - low)
  pair = stats.paired(values[0], values[1], 7)
  gain = (values[:1] - values[1:2], np.ones((1, 20)), 7, 10_000, 0.95)
  wanted = stats.studentised(*gain, 'symmetric')
  np.testing.assert_allclose(pair, np.squeeze(wanted))


def test_ends_stay_within_what_a_score_can_be():
  scores = [1.0] * 18 + [0.9, 0.2]
  free = stats.bootstrap(scores, 0)
  held = stats.bootstrap(scores, 0, bounds=(0, 1))
  assert free.high > 1 == held.high and free[:2] == held[:2]
  assert np.isnan(stats.bootstrap([0.5], 0, bounds=(0, 1)).low)


def test_of_many_rows_fewer_samples_are_drawn():
  assert stats.drawn_samples(150, 10_000) == 10_000
  assert stats.drawn_samples(5000, 10_000) == 2000
  assert stats.drawn_samples(10**6, 10_000) == 1000
  assert stats.drawn_samples(10**6, 500) == 500
  assert sum(map(len, stats.draws(5000, 0, 10**6))) == 2000


def test_the_seed_decides_the_interval():
  scores = np.random.default_rng(0).random(1000)
  assert stats.bootstrap(scores, 1) == stats.bootstrap(scores, 1)
  assert stats.bootstrap(scores, 1) != stats.bootstrap(scores, 2)


def test_weights_make_a_mean_over_tokens_with_rows_drawn():
  losses, tokens = np.array([1.0, 3.0, 2.0]), np.array([1, 1, 2])
  mean, low, high = stats.bootstrap(losses, 0, weights=tokens)
  assert mean == 2.0 and low < mean < high
  twice = stats.bootstrap(losses.repeat(2), 0, weights=tokens.repeat(2))
  assert twice.high - twice.low < high - low
  even = stats.bootstrap(losses, 0, weights=[7, 7, 7])
  np.testing.assert_allclose(even, stats.bootstrap(losses, 0), rtol=1e-9)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: stats.bootstrap([], 0), 'no rows'),
    (lambda: stats.bootstrap([0.5, float('nan')], 0), 'score of row 1 is nan'),
    (lambda: stats.bootstrap([0.5, 1], 0, weights=[1]), 'weights: wanted one'),
    (lambda: stats.bootstrap([0.5, 1], 0, weights=[0, 0]), 'weights: wanted'),
    (lambda: stats.paired([1, 0], [1], 0), '2 scores and 1 of the baseline'),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_one_score_between_0_and_1_has_no_interval():
  mean, low, high = stats.bootstrap([0.5], 0)
  assert mean == 0.5 and np.isnan(low) and np.isnan(high)
