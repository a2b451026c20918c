"""Generated answers on held-out rows, scored and written down."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuner import named, rundir
from tuner.data import rows as rows_lib
from tuner.evals import metrics as metrics_lib
from tuner.evals import stats
from tuner.evals.metrics import declare

TAKES = ('prediction', 'reference', 'row')
WHERE = 'config.evaluate.metrics'


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric of the config, its arguments bound.

  resolved: its section with every default, for what depends on it.
  """

  function: Callable[..., float]
  kind: declare.Kind
  resolved: Mapping[str, Any]

  def __call__(
    self, prediction: str, reference: str, row: rows_lib.Row
  ) -> float:
    return self.function(prediction, reference, row)

  def check(self, reference: str, row: rows_lib.Row) -> None:
    """Raises ValueError for a reference that it cannot score."""
    self(reference, reference, row)


@dataclasses.dataclass(frozen=True)
class Result:
  """Predictions of one system and the score of each, row by row."""

  predictions: list[dict[str, Any]]
  scores: dict[str, list[float]]
  intervals: dict[str, stats.Interval]

  @property
  def n(self) -> int:
    return len(self.predictions)


def find(sections: Sequence[str | Mapping[str, Any]]) -> dict[str, Metric]:
  """The metrics of config.evaluate.metrics by name, dotted ones imported.

  A section may say what its scores are `called`, as two of one name must.
  Raises ValueError, also for a library that is not installed.
  """
  found: dict[str, Metric] = {}
  for section in sections:
    own = {'name': section} if isinstance(section, str) else dict(section)
    called = str(own.pop('called', own.get('name')))
    bound = named.bind(own, metrics_lib, where=WHERE, takes=TAKES)
    declare.check_installed(bound.function, WHERE)
    if called in found:
      raise ValueError(
        f"{WHERE}: two are called {called!r}; add called='another name'."
      )
    kind = declare.of(bound.function).kind
    found[called] = Metric(bound, kind, bound.resolved)
  return found


def score(
  rows: Sequence[Any],
  references: Sequence[str],
  answers: Sequence[Sequence[int]],
  decode: Callable[[Sequence[int]], str],
  stop_ids: Sequence[int],
  metrics: Mapping[str, Metric],
  seed: int,
) -> Result:
  """Scores answers (token ids) to the rows against the references.

  An answer that was cut before a stop token is scored as it stands, and
  `stopped` says so. Stop rate is a metric, too.
  """
  predictions = []
  scores: dict[str, list[float]] = {name: [] for name in (*metrics, 'stopped')}
  for row, reference, ids in zip(rows, references, answers, strict=True):
    stopped = bool(ids) and ids[-1] in stop_ids
    output = decode(ids[:-1] if stopped else ids)
    own = {n: metric(output, reference, row) for n, metric in metrics.items()}
    own['stopped'] = float(stopped)
    for name, value in own.items():
      scores[name].append(value)
    predictions.append(
      {
        'id': row.where,
        'prompt': list(row.prompt),
        'reference': reference,
        'output': output,
        'tokens': len(ids),
        'scores': own,
      }
    )
  intervals = {n: stats.bootstrap(v, seed) for n, v in scores.items()}
  return Result(predictions, scores, intervals)


def write(
  folder: pathlib.Path,
  suite: str,
  result: Result,
  others: dict[str, tuple[stats.Interval, int]],
  key: str,
) -> None:
  """Writes <suite>.predictions.jsonl, then <suite>.json, each as a whole.

  others: metrics that were not scored answer by answer, with their n. key:
  what the numbers depend on; a reader may compare it. JSON has no NaN: where a
  single row gives no interval its ends are 'nan', which float() reads.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(p, ensure_ascii=False) for p in result.predictions]
  text = ''.join(line + '\n' for line in lines)
  rundir.write_whole(folder / f'{suite}.predictions.jsonl', text)
  scored = {name: (i, result.n) for name, i in result.intervals.items()}
  metrics = {
    name: {
      'value': i.mean,
      'low': _number(i.low),
      'high': _number(i.high),
      'n': n,
    }
    for name, (i, n) in {**scored, **others}.items()
  }
  summary = {'suite': suite, 'key': key, 'metrics': metrics}
  rundir.write_whole(
    folder / f'{suite}.json',
    json.dumps(summary, indent=2, allow_nan=False) + '\n',
  )


def _number(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)
