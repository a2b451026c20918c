"""Generated answers on held-out rows, scored and written down."""

import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuner import named, rundir
from tuner.data import rows as rows_lib
from tuner.evals import corpus, stats
from tuner.evals import metrics as metrics_lib
from tuner.evals.metrics import declare

TAKES = ('prediction', 'reference', 'row')
CORPUS_TAKES = ('predictions', 'references', 'rows')
WHERE = 'config.evaluate.metrics'
NEAR_ONE = 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric of the config, its arguments bound.

  is_of_set: of all rows at once, not of each. resolved: its section with every
  default, for what depends on it.
  """

  function: named.Bound
  facts: declare.Facts
  is_of_set: bool = False

  @property
  def kind(self) -> declare.Kind:
    return self.facts.kind

  @property
  def resolved(self) -> Mapping[str, Any]:
    return self.function.resolved

  @property
  def is_ours(self) -> bool:
    """Whether it is of this package, and so keeps to its bounds."""
    return self.function.function.__module__.startswith(metrics_lib.__name__)

  def __call__(
    self, prediction: str, reference: str, row: rows_lib.Row
  ) -> float:
    """The score of one row; of a metric of sets, were it the only one."""
    if self.is_of_set:
      return float(self.function([prediction], [reference], [row]))
    return float(self.function(prediction, reference, row))

  def check(self, reference: str, row: rows_lib.Row) -> None:
    """Raises ValueError for a reference that it cannot score."""
    value = self(reference, reference, row)
    # What a user's own metric gives for it is the user's business.
    # The form of an answer is asked for whatever form the reference has.
    is_held = self.is_ours and not self.is_of_set and self.kind == 'content'
    if is_held and value < NEAR_ONE:
      raise ValueError(
        f'the reference scores {value:.3g} against itself: {reference[:80]!r}'
      )

  def drawn(self, predictions, references, rows) -> corpus.Drawn:
    """The score of a set, to be drawn from."""
    args = [list(predictions), list(references), list(rows)]
    facts, own = self.facts, self.function.bound
    if facts.sums is not None:
      return corpus.Drawn(len(rows), facts.sums(*args, **own), facts.of_sums)

    def of_rows(chosen):
      return self.function(*([part[i] for i in chosen] for part in args))

    return corpus.Drawn(len(rows), of_rows=of_rows)

  def tables(self, predictions, references, rows) -> dict[str, Any]:
    """What it tells beside its score, by name."""
    if self.facts.table is None:
      return {}
    name, make = self.facts.table
    return {name: make(predictions, references, rows, **self.function.bound)}


@dataclasses.dataclass(frozen=True)
class Result:
  """Predictions of one system and the score of each, row by row.

  intervals: of the metrics of sets, too. kinds: of each metric.
  """

  predictions: list[dict[str, Any]]
  scores: dict[str, list[float]]
  intervals: dict[str, stats.Interval]
  kinds: dict[str, declare.Kind] = dataclasses.field(default_factory=dict)
  tables: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def n(self) -> int:
    return len(self.predictions)


def find(sections: Sequence[str | Mapping[str, Any]]) -> dict[str, Metric]:
  """The metrics of config.evaluate.metrics by name, dotted ones imported.

  A section may say what its scores are `called`, as two of one name must. A
  dotted function is of sets where its first parameter is `predictions`. Raises
  ValueError, also for a library that is not installed.
  """
  found: dict[str, Metric] = {}
  for section in sections:
    own = {'name': section} if isinstance(section, str) else dict(section)
    called = str(own.pop('called', own.get('name')))
    metric = _bound(own)
    declare.check_installed(metric.function.function, WHERE)
    if called in found:
      raise ValueError(
        f"{WHERE}: two are called {called!r}; add called='another name'."
      )
    found[called] = metric
  return found


def _bound(section: Mapping[str, Any]) -> Metric:
  takes = CORPUS_TAKES if _is_of_set(section.get('name')) else TAKES
  bound = named.bind(section, metrics_lib, where=WHERE, takes=takes)
  facts = declare.of(bound.function)
  first = next(iter(inspect.signature(bound.function).parameters))
  return Metric(bound, facts, first == CORPUS_TAKES[0])


def _is_of_set(name: Any) -> bool:
  """Whether a metric of this name is one of ours for sets."""
  if not isinstance(name, str) or '.' in name:
    return False
  try:
    named.bind({'name': name}, metrics_lib, where=WHERE, takes=CORPUS_TAKES)
  except ValueError:
    return False
  return True


def score(
  rows: Sequence[Any],
  references: Sequence[str],
  answers: Sequence[Sequence[int]],
  decode: Callable[[Sequence[int]], str],
  stop_ids: Sequence[int],
  metrics: Mapping[str, Metric],
  seed: int,
  logprobs: Sequence[Sequence[float]] | None = None,
) -> Result:
  """Scores answers (token ids) to the rows against the references.

  An answer that was cut before a stop token is scored as it stands, and
  `stopped` says so. Stop rate is a metric, too. logprobs: of the answers'
  tokens; their sum goes with each prediction.
  """
  predictions = []
  of_rows = {n: m for n, m in metrics.items() if not m.is_of_set}
  for i, (row, reference, ids) in enumerate(
    zip(rows, references, answers, strict=True)
  ):
    stopped = bool(ids) and ids[-1] in stop_ids
    output = decode(ids[:-1] if stopped else ids)
    own = {n: metric(output, reference, row) for n, metric in of_rows.items()}
    own['stopped'] = float(stopped)
    prediction = {
      'id': row.where,
      'prompt': list(row.prompt),
      'reference': reference,
      'output': output,
      'tokens': len(ids),
      'scores': own,
    }
    if logprobs is not None:
      prediction['logprob'] = float(sum(logprobs[i]))
    predictions.append(prediction)
  scores = {
    name: [p['scores'][name] for p in predictions]
    for name in (*of_rows, 'stopped')
  }
  outputs = [prediction['output'] for prediction in predictions]
  return _result(predictions, scores, metrics, seed, outputs, references, rows)


def _result(predictions, scores, metrics, seed, *texts) -> Result:
  """The Result: intervals in the order of the metrics, `stopped` last."""
  intervals: dict[str, stats.Interval] = {}
  tables: dict[str, Any] = {}
  kinds: dict[str, declare.Kind] = {'stopped': 'format'}
  for name, metric in metrics.items():
    kinds[name] = metric.kind
    tables = metric.tables(*texts) | tables  # The first of a name stays.
    if metric.is_of_set:
      intervals[name] = corpus.interval(metric.drawn(*texts), seed)
    else:
      own = metric.facts.bounds if metric.is_ours else stats.UNBOUNDED
      intervals[name] = stats.bootstrap(scores[name], seed, bounds=own)
  intervals['stopped'] = stats.bootstrap(scores['stopped'], seed)
  return Result(predictions, scores, intervals, kinds, tables)


def write(
  folder: pathlib.Path,
  suite: str,
  result: Result,
  others: dict[str, tuple[stats.Interval, int]],
  key: str,
) -> None:
  """Writes <suite>.predictions.jsonl, then <suite>.json, each as a whole.

  others: metrics that were not scored answer by answer but by the likelihood of
  the reference, with their n. key: what the numbers depend on; a reader may
  compare it. JSON has no NaN: where a single row gives no interval its ends are
  'nan', which float() reads.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(p, ensure_ascii=False) for p in result.predictions]
  text = ''.join(line + '\n' for line in lines)
  rundir.write_whole(folder / f'{suite}.predictions.jsonl', text)
  scored = {name: (i, result.n) for name, i in result.intervals.items()}
  metrics = {
    name: {
      'value': i.mean,
      'low': stats.as_json(i.low),
      'high': stats.as_json(i.high),
      'n': n,
      'kind': result.kinds.get(name, 'likelihood'),
    }
    for name, (i, n) in {**scored, **others}.items()
  }
  summary = {
    'suite': suite,
    'key': key,
    'metrics': metrics,
    'tables': result.tables,
  }
  rundir.write_whole(
    folder / f'{suite}.json',
    json.dumps(summary, indent=2, allow_nan=False) + '\n',
  )
