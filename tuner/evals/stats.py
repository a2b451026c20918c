"""How sure a mean over held-out rows is: intervals, and paired differences.

The rows are the sample: an interval says what another draw of as many rows
would give, for this one model. It says nothing of another training seed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SEED = 0  # Of every bootstrap: a number is the same when read again.


class Interval(NamedTuple):
  """A mean and the ends of its interval."""

  mean: float
  low: float
  high: float


def bootstrap(
  scores: Sequence[float] | np.ndarray,
  seed: int,
  samples: int = 10_000,
  level: float = 0.95,
  weights: Sequence[float] | np.ndarray | None = None,
) -> Interval:
  """The mean of `scores` and its interval.

  The percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13):
  the middle `level` of the means of `samples` draws of n rows with replacement.
  It collapses to a point where all scores are equal, as if 0 right of 150 meant
  that no row ever comes out right. So scores that are all 0 or 1 get Wilson's
  interval (1927) instead. Equal scores of another value do get a point, and a
  single one no interval: nan.

  Args:
    scores: one number a row.
    weights: of each row, such as its target tokens: the mean is
      sum(weights * scores) / sum(weights), and rows are drawn, not tokens.

  Raises:
    ValueError: no rows, or a score that is not finite.
  """
  values = _checked(scores)
  if weights is None and _is_binary(values):
    return _wilson(int(values.sum()), len(values), level)
  sizes = np.ones_like(values) if weights is None else _checked(weights)
  if len(sizes) != len(values) or (sizes < 0).any() or not sizes.any():
    raise ValueError('weights: wanted one >= 0 a score, and not all of them 0')
  return _percentile(values, sizes, seed, samples, level)


def paired(
  scores: Sequence[float],
  baseline: Sequence[float],
  seed: int,
  samples: int = 10_000,
  level: float = 0.95,
) -> Interval:
  """The mean of `scores - baseline`, row by row, and its interval.

  Rows are compared with themselves, so what makes a row hard for both falls
  out: an interval that leaves 0 out is a difference. The bootstrap over rows of
  the differences; where both are all 0 or 1, Newcombe's interval of paired
  proportions (1998, Statistics in Medicine 17, method 10), which does not
  collapse where every row improves, or none.

  Raises:
    ValueError: not the same number of rows, none, or a score not finite.
  """
  ours, theirs = _checked(scores), _checked(baseline)
  if len(ours) != len(theirs):
    raise ValueError(
      f'{len(ours)} scores and {len(theirs)} of the baseline; wanted the same '
      'rows in the same order'
    )
  if _is_binary(ours) and _is_binary(theirs):
    return _newcombe(ours > 0, theirs > 0, level)
  gain = ours - theirs
  return _percentile(gain, np.ones_like(gain), seed, samples, level)


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


def _percentile(values, weights, seed, samples, level) -> Interval:
  mean = float(np.average(values, weights=weights))
  n = len(values)
  if n == 1:
    return Interval(mean, math.nan, math.nan)
  rng = np.random.default_rng(seed)
  sums = np.empty((2, samples))
  block = max(1, 4_000_000 // n)  # 32 MB of indices at a time
  for start in range(0, samples, block):
    rows = rng.integers(n, size=(min(block, samples - start), n))
    drawn = slice(start, start + len(rows))
    sums[0, drawn] = (weights * values)[rows].sum(1)
    sums[1, drawn] = weights[rows].sum(1)
  means = sums[0, sums[1] > 0] / sums[1, sums[1] > 0]
  tail = (1 - level) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return Interval(mean, float(low), float(high))


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
