"""Two systems on the same held-out rows: what was won, what was lost."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tuner import rundir
from tuner.evals import corpus, generative, stats

COUNTS = ('wins', 'ties', 'losses')


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
  predictions; they have no COUNTS and no flips. Raises ValueError for other
  rows.
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
      own = _record(_of_sets(metric, base, tuned, rows))
      found['metrics'][name] = {k: own[k] for k in own if k not in COUNTS}
  return found


def losses(
  base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """As a score of `pair`: the difference in nats a target token.

  Of each row 'id', 'nats' and 'targets', as measure writes them. Rows weigh by
  their targets, so that it is the difference of the two means; p is of the
  rows' nats. wins: rows whose nats fell. Raises ValueError for other rows.
  """
  keys = [[(x['id'], x['targets']) for x in side] for side in (base, tuned)]
  if keys[0] != keys[1] or not keys[0]:
    raise ValueError(
      f'{len(keys[0])} rows of the base and {len(keys[1])} of the tuned model '
      'do not have the same targets in the same order; measure both again'
    )
  theirs, ours = (
    np.array([x['nats'] for x in side], float) for side in (base, tuned)
  )
  targets = np.array([x['targets'] for x in tuned], float)
  mean, low, high = stats.studentised(
    ((ours - theirs) / targets)[None], targets[None], stats.SEED,
    tails='symmetric',
  )  # fmt: skip
  by_row = stats.compare(theirs, ours, stats.SEED)  # Fewer nats win.
  difference = stats.Interval(float(mean[0]), float(low[0]), float(high[0]))
  return _record(by_row._replace(difference=difference))


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
    'low': stats.as_json(low),
    'high': stats.as_json(high),
    'p': compared.p,
    'wins': compared.wins,
    'ties': compared.ties,
    'losses': compared.losses,
  }
