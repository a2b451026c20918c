"""Intervals: that they cover what they claim, and never a false certainty."""

import math

import numpy as np
import pytest

from tuner.evals import stats


def covered(draw, truth, interval, sets=1000):
  """The part of `sets` intervals that hold `truth`."""
  rng = np.random.default_rng(0)
  hits = 0
  for seed in range(sets):
    _, low, high = interval(draw(rng), seed)
    hits += low <= truth <= high
  return hits / sets


def quick(scores, seed):
  return stats.bootstrap(scores, seed, samples=1000)


@pytest.mark.parametrize(
  ('draw', 'truth'),
  [
    (lambda rng: rng.beta(2, 1, 100), 2 / 3),
    (lambda rng: rng.integers(0, 5, 100) / 4, 0.5),
    (lambda rng: rng.random(100) < 0.3, 0.3),
  ],
)
def test_95_of_100_intervals_hold_the_truth(draw, truth):
  assert 0.93 <= covered(draw, truth, quick) <= 0.97


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


def test_paired_intervals_hold_the_truth():
  def draw(rng):
    hard = rng.random(100)
    return hard * 0.5 + rng.random(100) * 0.5, hard

  def interval(pair, seed):
    return stats.paired(*pair, seed, samples=1000)

  assert 0.93 <= covered(draw, 0.0, interval) <= 0.97


def test_paired_intervals_of_0_and_1_hold_the_truth():
  def draw(rng):
    hard = rng.random(100)
    return hard < 0.6, hard + rng.normal(0, 0.1, 100) < 0.5

  rng = np.random.default_rng(1)
  hard = rng.random(1_000_000)
  truth = 0.6 - np.mean(hard + rng.normal(0, 0.1, 1_000_000) < 0.5)
  interval = lambda pair, seed: stats.paired(*pair, seed)
  assert 0.93 <= covered(draw, truth, interval) <= 0.98


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
  scores = np.random.default_rng(3).gamma(1.0, size=40)
  rng = np.random.default_rng(5)
  means = [np.mean(rng.choice(scores, 40)) for _ in range(20_000)]
  got = stats.bootstrap(scores, seed=0, samples=20_000, level=0.9)
  np.testing.assert_allclose(
    got[1:], np.quantile(means, [0.05, 0.95]), rtol=0.02
  )


def test_the_seed_decides_the_interval():
  scores = np.random.default_rng(0).random(1000)
  assert stats.bootstrap(scores, 1) == stats.bootstrap(scores, 1)
  assert stats.bootstrap(scores, 1) != stats.bootstrap(scores, 2)


def test_weights_make_a_mean_over_tokens_with_rows_drawn():
  losses, tokens = np.array([1.0, 3.0, 2.0]), np.array([1, 1, 2])
  mean, low, high = stats.bootstrap(losses, 0, weights=tokens)
  assert mean == 2.0 and 1.0 <= low < mean < high <= 3.0
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
