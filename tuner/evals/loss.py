"""Held-out loss: nats a target token, with the interval over rows."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from tuner.evals import stats


def sums_by_row(logprobs_BT: jax.Array, batch: Mapping, width: int):
  """(nats_BS, targets_BS): sums over each segment 1..width of each row."""
  segments = batch['segments'].reshape(-1, batch['segments'].shape[-1])
  mask = batch['mask'].reshape(segments.shape)
  member_BTS = segments[..., None] == np.arange(1, width + 1)
  weighted = logprobs_BT.reshape(segments.shape) * mask
  nats = -(weighted[..., None] * member_BTS).sum(1)
  return nats, (mask[..., None] * member_BTS).sum(1)


def by_example(
  sums_of: Callable[[Mapping], tuple], source, n: int
) -> tuple[np.ndarray, np.ndarray]:
  """(nats_N, targets_N) of the n examples of a source, a sources.Once.

  sums_of(batch) gives `sums_by_row` of the batch.
  """
  nats_N, targets_N = np.zeros((2, n))
  for i in range(len(source)):
    nats_BS, targets_BS = map(np.asarray, sums_of(source[i]))
    for b, ids in enumerate(source.ids(i)):
      nats_N[ids] = nats_BS[b, : len(ids)]
      targets_N[ids] = targets_BS[b, : len(ids)]
  return nats_N, targets_N


def by_row(
  nats_N: np.ndarray, targets_N: np.ndarray, row_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(rows with a target in order, their nats, their targets).

  row_N names the row of each example: a row may have given several.
  """
  names_R, row_N = np.unique(row_N, return_inverse=True)
  nats_R, targets_R = (np.bincount(row_N, x) for x in (nats_N, targets_N))
  there = targets_R > 0
  return names_R[there], nats_R[there], targets_R[there]


def held_out(
  nats_N: np.ndarray, targets_N: np.ndarray, row_N: np.ndarray, seed: int
) -> tuple[stats.Interval, int]:
  """(nats a target token with its interval, number of rows); see `by_row`.

  The interval resamples rows, each weighed by its targets.
  """
  _, nats_R, targets_R = by_row(nats_N, targets_N, row_N)
  interval = stats.bootstrap(nats_R / targets_R, seed, weights=targets_R)
  return interval, len(nats_R)
