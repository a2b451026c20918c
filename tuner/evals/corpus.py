"""Scores of a whole set that are no mean over rows, such as macro-F1.

Rows are drawn as for a mean, and the score is made of each draw anew: from sums
over rows where the metric has them, else from the texts.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from tuner.evals import stats

SAMPLES = 2000
SAMPLES_OF_TEXTS = 500  # Each calls the metric on all texts.


class Drawn:
  """A score of n rows, and of draws of them.

  sums: [n, K] and of_sums: [..., K] -> [...], where it is a function of sums;
  else of_rows: the score of some rows, by index.
  """

  def __init__(self, n, sums=None, of_sums=None, of_rows=None):
    self.n, self.sums, self._of_sums, self._of_rows = n, sums, of_sums, of_rows

  @property
  def samples(self) -> int:
    return SAMPLES if self.sums is not None else SAMPLES_OF_TEXTS

  def value(self) -> float:
    return float(self.of_counts(np.ones((1, self.n)))[0])

  def of_counts(self, counts_SN: np.ndarray) -> np.ndarray:
    """The score of each draw, in which row n is counts[n] times."""
    if self.sums is not None:
      return self._of_sums(counts_SN @ self.sums)
    rows = np.arange(self.n)
    return np.array(
      [self._of_rows(rows.repeat(own.astype(np.int64))) for own in counts_SN]
    )


def interval(drawn: Drawn, seed: int, level: float = 0.95) -> stats.Interval:
  """The score and its interval, bias-corrected percentiles (Efron 1987).

  A score that is no mean may come out lower on draws than on the rows that they
  are drawn from; the percentiles are moved by as much. nan of a single row.
  """
  found = [
    drawn.of_counts(counts)
    for counts in stats.draws(drawn.n, seed, drawn.samples)
  ]
  return _corrected(drawn.value(), np.concatenate(found), drawn.n, level)


def compare(ours: Drawn, theirs: Drawn, swapped, seed: int) -> stats.Comparison:
  """`stats.compare` of two systems' scores; there are no wins of rows.

  swapped(heads_SN) gives the gain of each draw, were the systems changed in
  rows where heads. p is of the randomisation test of that (Riezler and Maxwell
  2005).
  """
  gain = ours.value() - theirs.value()
  found = [
    ours.of_counts(counts) - theirs.of_counts(counts)
    for counts in stats.draws(ours.n, seed, ours.samples)
  ]
  difference = _corrected(gain, np.concatenate(found), ours.n, 0.95)
  rng = np.random.default_rng(seed)
  samples = stats.drawn_samples(ours.n, ours.samples)
  gains = swapped(rng.integers(2, size=(samples, ours.n), dtype=np.int8))
  # The order of a sum is no gain.
  as_large = int((abs(gains) >= abs(gain) - 1e-9).sum())
  p = (1 + as_large) / (1 + samples)
  return stats.Comparison(difference, p, 0, 0, 0)


def _corrected(
  value: float, found: np.ndarray, n: int, level: float
) -> stats.Interval:
  if n == 1:
    return stats.Interval(value, float('nan'), float('nan'))
  normal, size = statistics.NormalDist(), len(found)
  below = (found < value).mean() + (found == value).mean() / 2
  moved = normal.inv_cdf(float(np.clip(below, 1 / size, 1 - 1 / size)))
  z = normal.inv_cdf((1 + level) / 2)
  ends = [normal.cdf(2 * moved + side * z) for side in (-1, 1)]
  low, high = np.quantile(found, ends)
  return stats.Interval(value, float(low), float(high))


def swap(
  heads_N: np.ndarray, ours: Sequence[str], theirs: Sequence[str]
) -> list[str]:
  """Ours, but theirs where heads."""
  return [b if head else a for head, a, b in zip(heads_N, ours, theirs)]
