"""Held-out loss: nats a target token, with the interval over rows."""

from collections.abc import Callable, Iterable, Mapping

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


def held_out(
  nats_of: Callable[[Mapping], tuple], batches: Iterable, seed: int
) -> tuple[stats.Interval, int]:
  """(nats a target token with its interval, number of rows).

  nats_of(batch) gives `sums_by_row` of the batch. The interval resamples rows,
  each weighed by its targets.
  """
  nats, targets = [], []
  for batch in batches:
    row_nats, row_targets = (np.asarray(x).ravel() for x in nats_of(batch))
    there = row_targets > 0
    nats.append(row_nats[there])
    targets.append(row_targets[there])
  nats_N, targets_N = np.concatenate(nats), np.concatenate(targets)
  interval = stats.bootstrap(nats_N / targets_N, seed, weights=targets_N)
  return interval, len(nats_N)
