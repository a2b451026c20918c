"""Two systems on the same held-out rows: what was won, what was lost."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tuner import rundir
from tuner.evals import corpus, generative, stats


def pair(
  base: Sequence[Mapping[str, Any]],
  tuned: Sequence[Mapping[str, Any]],
  metrics: Mapping[str, generative.Metric] | None = None,
  rows: Sequence[Any] = (),
) -> dict[str, Any]:
  """{'n', 'metrics', 'flips'} of two systems' predictions, as written.

  Each score of a row, under its name: 'difference' (tuned - base) with 'low'
  and 'high', 'p', and the rows that are 'wins', 'ties' and 'losses'; see
  stats.compare. flips: ids of the rows that were 'won' and 'lost'. Ends that
  are no numbers are text.

  metrics: those of sets among these are compared, too, with `rows` to the
  predictions; they have no wins or flips. Raises ValueError for other rows.
  """
  _check_same_rows(base, tuned)
  found: dict[str, Any] = {'n': len(tuned), 'metrics': {}, 'flips': {}}
  for name in tuned[0]['scores'] if tuned else ():
    ours, theirs = (
      np.array([p['scores'][name] for p in side], float)
      for side in (tuned, base)
    )
    compared = stats.compare(ours, theirs, stats.SEED)
    found['metrics'][name] = _record(compared)
    ids = [p['id'] for p in tuned]
    gains = list(zip(ids, ours - theirs, strict=True))
    found['flips'][name] = {
      'won': [where for where, gain in gains if gain > 0],
      'lost': [where for where, gain in gains if gain < 0],
    }
  for name, metric in (metrics or {}).items():
    if metric.is_of_set and tuned:
      found['metrics'][name] = _record(_of_sets(metric, base, tuned, rows))
  return found


def write(
  folder: pathlib.Path, one: str, other: str, found: Mapping[str, Any]
) -> pathlib.Path:
  """Writes what `pair` found as <one>.vs.<other>.json; the file."""
  file = folder / f'{one}.vs.{other}.json'
  text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
  rundir.write_whole(file, text + '\n')
  return file


def _check_same_rows(base, tuned) -> None:
  ids = [[p['id'] for p in side] for side in (base, tuned)]
  if ids[0] != ids[1]:
    raise ValueError(
      f'{len(ids[0])} rows of the base and {len(ids[1])} of the tuned model '
      'are not the same in the same order; measure both again'
    )
  names = [list(side[0]['scores']) if side else [] for side in (base, tuned)]
  if names[0] != names[1]:
    raise ValueError(
      f'the base has the scores {names[0]} and the tuned model {names[1]}; '
      'measure both with the same config.evaluate.metrics'
    )


def _of_sets(metric, base, tuned, rows) -> stats.Comparison:
  """The comparison of a metric of sets."""
  references = [p['reference'] for p in tuned]
  ours, theirs = ([p['output'] for p in side] for side in (tuned, base))
  one, other = (metric.drawn(x, references, rows) for x in (ours, theirs))

  def swapped(heads_SN):
    if one.sums is not None:
      moved = heads_SN @ (other.sums - one.sums)
      of_sums = metric.facts.of_sums
      ours_SK, theirs_SK = one.sums.sum(0) + moved, other.sums.sum(0) - moved
      return of_sums(ours_SK) - of_sums(theirs_SK)
    gains = [
      metric.function(corpus.swap(heads, ours, theirs), references, rows)
      - metric.function(corpus.swap(heads, theirs, ours), references, rows)
      for heads in heads_SN
    ]
    return np.array(gains)

  return corpus.compare(one, other, swapped, stats.SEED)


def _record(compared: stats.Comparison) -> dict[str, Any]:
  mean, low, high = compared.difference
  return {
    'difference': mean,
    'low': _number(low),
    'high': _number(high),
    'p': compared.p,
    'wins': compared.wins,
    'ties': compared.ties,
    'losses': compared.losses,
  }


def _number(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)
