"""How sure a mean over held-out rows is: intervals, and paired differences.

The rows are the sample: an interval says what another draw of as many rows
would give, for this one model. It says nothing of another training seed.

Scores of 0 and 1 have intervals of their own (Wilson, Newcombe); of all other
numbers a mean has the bootstrap-t interval. A difference is tested by changing
systems row by row, which is exact: of two equal systems at most 5 % are called
different at 0.05.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

SEED = 0  # Of every bootstrap: a number is the same when read again.
SAMPLES = 10_000
# Of more rows fewer samples are drawn: their quantiles are as steady.
MOST_DRAWN = 10_000_000
UNBOUNDED = (-math.inf, math.inf)


class Interval(NamedTuple):
  """A mean and the ends of its interval."""

  mean: float
  low: float
  high: float


class Comparison(NamedTuple):
  """Two systems on the same rows.

  difference: the mean gain a row. p: how often a gain so large comes about
  where the systems do not differ; see `compare`. wins, ties, losses: rows.
  """

  difference: Interval
  p: float
  wins: int
  ties: int
  losses: int


def bootstrap(
  scores: Sequence[float] | np.ndarray,
  seed: int,
  samples: int = SAMPLES,
  level: float = 0.95,
  weights: Sequence[float] | np.ndarray | None = None,
  bounds: tuple[float, float] = UNBOUNDED,
) -> Interval:
  """The mean of `scores` and its interval.

  The bootstrap-t interval over rows (Efron and Tibshirani 1993, chapter 12):
  as `samples` draws of n rows deviate from the mean, in units of their own
  standard error, so does the mean from the truth. Skewed scores need that;
  percentiles of the draws cover too little. A row of average spread is added
  to the variance of each draw, or draws of equal rows would have none.

  It collapses to a point where all scores are equal, as if 0 right of 150 meant
  that no row ever comes out right. So scores that are all 0 or 1 get Wilson's
  interval (1927) instead. Equal scores of another value do get a point, and a
  single one no interval: nan.

  Args:
    scores: one number a row.
    weights: of each row, such as its target tokens: the mean is
      sum(weights * scores) / sum(weights), and rows are drawn, not tokens.
    bounds: of what a score can be, which an end does not pass.

  Raises:
    ValueError: no rows, or a score that is not finite.
  """
  values = _checked(scores)
  if weights is None and _is_binary(values):
    return _wilson(int(values.sum()), len(values), level)
  sizes = np.ones_like(values) if weights is None else _checked(weights)
  if len(sizes) != len(values) or (sizes < 0).any() or not sizes.any():
    raise ValueError('weights: wanted one >= 0 a score, and not all of them 0')
  mean, low, high = _one(values, sizes, seed, samples, level, 'equal')
  # min and max of nan are what stands first: nan where there is no interval.
  return Interval(mean, max(low, bounds[0]), min(high, bounds[1]))


def paired(
  scores: Sequence[float] | np.ndarray,
  baseline: Sequence[float] | np.ndarray,
  seed: int,
  samples: int = SAMPLES,
  level: float = 0.95,
) -> Interval:
  """The mean of `scores - baseline`, row by row, and its interval.

  Rows are compared with themselves, so what makes a row hard for both falls
  out: an interval that leaves 0 out is a difference. The symmetric bootstrap-t
  interval (Hall 1988) of the differences: those of two systems hardly lean to
  one side, and where few rows differ its ends do not rest on their skewness.
  Where both are all 0 or 1, Newcombe's interval of paired proportions (1998,
  Statistics in Medicine 17, method 10), which does not collapse where every row
  improves, or none.

  Raises:
    ValueError: not the same number of rows, none, or a score not finite.
  """
  ours, theirs = _checked_pair(scores, baseline)
  if _is_binary(ours) and _is_binary(theirs):
    return _newcombe(ours > 0, theirs > 0, level)
  gain = ours - theirs
  own = np.ones_like(gain)
  return _one(gain, own, seed, samples, level, 'symmetric')


def compare(
  scores: Sequence[float] | np.ndarray,
  baseline: Sequence[float] | np.ndarray,
  seed: int,
  samples: int = SAMPLES,
) -> Comparison:
  """The difference of `paired`, its p, and how many rows were won and lost.

  p is two-sided and of the randomisation test (Fisher 1935): were the systems
  equal, each row's gain would as well have had the other sign. Of scores of 0
  and 1 that is McNemar's exact test. Ties say nothing; without wins and losses
  p is 1. Raises ValueError as `paired` does.
  """
  ours, theirs = _checked_pair(scores, baseline)
  wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
  if _is_binary(ours) and _is_binary(theirs):
    p = mcnemar(wins, losses)
  else:
    p = _sign_flips(ours - theirs, seed, samples)
  ties = len(ours) - wins - losses
  difference = paired(ours, theirs, seed, samples)
  return Comparison(difference, p, wins, ties, losses)


def mcnemar(wins: int, losses: int) -> float:
  """Two-sided p of as few of the fewer, were both as likely; exact."""
  n, fewer = wins + losses, min(wins, losses)
  k = np.arange(1, fewer + 1)
  log_choose = np.cumsum(np.log(n - k + 1) - np.log(k))
  log_terms = np.concatenate([[0.0], log_choose]) - n * math.log(2)
  return min(1.0, 2 * float(np.exp(log_terms).sum()))


def _sign_flips(gain: np.ndarray, seed: int, samples: int) -> float:
  """p of the randomisation test: all ways to sign the gains, or `samples`.

  Among drawn ones the signs as they are count, too, which keeps p above 0 and
  the test exact (Phipson and Smyth 2010).
  """
  gain = gain[gain != 0]
  n = len(gain)
  if not n:
    return 1.0
  wanted = abs(gain.sum()) * (1 - 1e-12)  # The order of a sum is no gain.
  if 2**n <= samples:
    heads = np.arange(2**n)[:, None] >> np.arange(n) & 1
    return float((abs((2 * heads - 1) @ gain) >= wanted).mean())
  rng = np.random.default_rng(seed)
  samples, as_large = drawn_samples(n, samples), 0
  for size in _blocks(samples, n):
    heads = rng.integers(2, size=(size, n), dtype=np.int8)
    as_large += int((abs((2 * heads - 1) @ gain) >= wanted).sum())
  return (1 + as_large) / (1 + samples)


def drawn_samples(n: int, samples: int) -> int:
  """How many draws of n rows are made where `samples` are wanted."""
  return min(samples, max(1000, MOST_DRAWN // n))


def _blocks(samples: int, n: int):
  """Sizes of the parts in which draws of n rows are made: 32 MB at a time."""
  block = max(1, 4_000_000 // n)
  for start in range(0, samples, block):
    yield min(block, samples - start)


def draws(n: int, seed: int, samples: int):
  """Yields float64 [some, n]: how often each row is in each of the draws."""
  rng = np.random.default_rng(seed)
  for size in _blocks(drawn_samples(n, samples), n):
    rows = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    counts = np.bincount(rows.ravel(), minlength=size * n)
    yield counts.reshape(size, n).astype(np.float64)


def studentised(
  values_RN: np.ndarray,
  weights_RN: np.ndarray,
  seed: int,
  samples: int = SAMPLES,
  level: float = 0.95,
  tails: Literal['equal', 'symmetric'] = 'equal',
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(mean_R, low_R, high_R): the bootstrap-t interval of each of R sets.

  tails: as many draws lie beyond each end, or the ends are as far from the
  mean. The same rows are drawn of every set, which says nothing of one of them.
  A set of one row has nan for ends, one of equal rows its mean.
  """
  sets, n = values_RN.shape
  weights_RN = weights_RN / weights_RN.mean(1, keepdims=True)
  mean_R = (weights_RN * values_RN).mean(1)
  if n == 1:
    return mean_R, mean_R * math.nan, mean_R * math.nan
  apart_RN = values_RN - mean_R[:, None]
  error_R = np.sqrt(((weights_RN * apart_RN) ** 2).sum(1) / (n * (n - 1)))
  divisor_R = np.where(error_R > 0, error_R, 1.0)
  squares_RN = weights_RN**2
  columns = [weights_RN, weights_RN * apart_RN, squares_RN,
             squares_RN * apart_RN, squares_RN * apart_RN**2]  # fmt: skip
  terms = np.stack(columns).transpose(2, 0, 1).reshape(n, -1)
  found = []
  for counts in draws(n, seed, samples):
    sums = (counts @ terms).reshape(len(counts), 5, sets)
    size, moved, q0, q1, q2 = sums.transpose(1, 0, 2)
    size = np.where(size > 0, size, math.nan)
    shift = moved / size
    spread = np.maximum(q2 - 2 * shift * q1 + shift**2 * q0, 0)
    own = spread * n / ((n - 1) * size**2)
    found.append(shift / np.sqrt((n * own + divisor_R**2) / (n + 1)))
  t_SR, tail = np.concatenate(found), (1 - level) / 2
  quantile = np.nanquantile if np.isnan(t_SR).any() else np.quantile
  if tails == 'symmetric':
    high_R = quantile(abs(t_SR), level, axis=0)
    low_R = -high_R
  else:
    low_R, high_R = quantile(t_SR, [tail, 1 - tail], axis=0)
  return mean_R, mean_R - high_R * error_R, mean_R - low_R * error_R


def _one(values, weights, *how) -> Interval:
  """`studentised` of one set."""
  ends = studentised(values[None], weights[None], *how)
  return Interval(*(float(end[0]) for end in ends))


def _checked_pair(scores, baseline) -> tuple[np.ndarray, np.ndarray]:
  ours, theirs = _checked(scores), _checked(baseline)
  if len(ours) != len(theirs):
    raise ValueError(
      f'{len(ours)} scores and {len(theirs)} of the baseline; wanted the same '
      'rows in the same order'
    )
  return ours, theirs


def _checked(scores: Sequence[float] | np.ndarray) -> np.ndarray:
  values = np.asarray(scores, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f'no rows to score: shape {values.shape}')
  if not np.isfinite(values).all():
    row = int(np.flatnonzero(~np.isfinite(values))[0])
    raise ValueError(f'score of row {row} is {values[row]}, wanted a number')
  return values


def _is_binary(values: np.ndarray) -> bool:
  return bool(((values == 0) | (values == 1)).all())


def _wilson(right: int, n: int, level: float) -> Interval:
  """Proportions p with |p - right / n| <= z sqrt(p (1 - p) / n)."""
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  p = right / n
  middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z * math.sqrt(p * (1 - p) / n + (z / n) ** 2 / 4) / (1 + z**2 / n)
  low = 0.0 if right == 0 else middle - half
  high = 1.0 if right == n else middle + half
  return Interval(p, low, high)


def _newcombe(ours, theirs, level: float) -> Interval:
  n = len(ours)
  a = _wilson(int(ours.sum()), n, level)
  b = _wilson(int(theirs.sum()), n, level)
  phi = _phi(
    int((ours & theirs).sum()),
    int((ours & ~theirs).sum()),
    int((~ours & theirs).sum()),
    int((~ours & ~theirs).sum()),
  )

  def distance(x: float, y: float) -> float:
    return math.sqrt(max(0.0, x**2 - 2 * phi * x * y + y**2))

  gain = a.mean - b.mean
  low = gain - distance(a.mean - a.low, b.high - b.mean)
  high = gain + distance(a.high - a.mean, b.mean - b.low)
  return Interval(gain, max(-1.0, low), min(1.0, high))


def _phi(both: int, ours: int, theirs: int, neither: int) -> float:
  """Correlation of the two, corrected for continuity where it is positive."""
  n = both + ours + theirs + neither
  product = float(both * neither - ours * theirs)
  if product > 0:
    product = max(product - n / 2, 0.0)
  margins = (
    (both + ours) * (theirs + neither) * (both + theirs) * (ours + neither)
  )
  return product / math.sqrt(margins) if margins else 0.0


def as_json(value: float) -> float | str:
  """A number as JSON has it: 'nan', 'inf' and '-inf' are text."""
  return value if math.isfinite(value) else str(value)
