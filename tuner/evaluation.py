"""Base and tuned side by side: the one record, its page, and what is printed.

All of it is made of what the suites have written; nothing is measured here.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tuner import ledger, ranges, rundir, select, summary
from tuner import suites as suites_lib
from tuner.evals import compare
from tuner.report import evaluate_page, evaluate_text

RECORD = 'evaluation.json'
PAGE = 'evaluation.html'
SAMPLES = 3

System = suites_lib.System


def report(
  suites: suites_lib.Suites,
  side: str,
  base: System | None,
  tuned: System | None,
  alphas: Sequence[tuple[float, System]] = (),
  harness: Mapping[str, Any] | None = None,
) -> None:
  """Writes eval/evaluation.json and evaluation.html, and prints the table."""
  if jax.process_index():
    return
  record = made(suites, side, base, tuned, alphas, harness)
  before, after = (_predictions(suites, side, s) for s in (base, tuned))
  text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
  rundir.write_whole(suites.folder / RECORD, text + '\n')
  title = f'{record["base"]}: base and tuned on held-out rows'
  page = evaluate_page.html(record, before, after, title)
  rundir.write_whole(suites.workdir / PAGE, page)
  columns = max(60, min(rundir.terminal_width(), 100))
  is_terminal = sys.stdout.isatty()
  text = evaluate_text.lines(record, before, after, is_terminal, columns)
  print(f'\n{text}\npage:  {suites.workdir / PAGE}', flush=True)
  print(f'files: {suites.folder}', flush=True)


def _predictions(suites, side, system) -> list[dict[str, Any]] | None:
  if system is None:
    return None
  return summary.predictions(suites.folder, f'{side}.{system.name}')


def made(
  suites: suites_lib.Suites,
  side: str,
  base: System | None,
  tuned: System | None,
  alphas: Sequence[tuple[float, System]] = (),
  harness: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The record, whose parts are None where they were not measured."""
  experiment = suites.experiment
  own, step = experiment.config, tuned.step if tuned else None
  found = {name: _found(suites, side, s) for name, s in _named(base, tuned)}
  general = {
    name: _metrics(suites.found(suites_lib.RETENTION, s))
    for name, s in _named(base, tuned)
    if s is not None and suites.retention is not None
  }
  shown = _shown(own, found)
  curve = select.curve(select.read(suites.workdir), own.select, shown, step)
  record = {
    'base': experiment.base_dir.name,
    'step': 0 if step is None else step,
    'split': side,
    'n': len(suites.held[side].rows),
    'answered': len(suites.held[side].answered),
    'reads': None,
    'metric': shown,
    'systems': {name: _metrics(one) for name, one in found.items()},
    'comparison': _compared(suites, side, base, tuned),
    'retention': general or None,
    'checkpoints': curve,
    'max_nats_increase': own.select.max_nats_increase,
    'retention_share': own.retention.share,
    'alphas': _alphas(suites, side, alphas, shown),
    'samples': _samples(suites, side, base, tuned),
    'confusion': _confusion(found),
    'harness': harness,
    'suites': {n: f'{side}.{s.name}' for n, s in _named(base, tuned) if s},
  }
  if side == 'test':
    record['reads'] = ledger.reads(suites.workdir, suites.digest)
  return record


def _named(base, tuned) -> list[tuple[str, System | None]]:
  return [('base', base), ('tuned', tuned)]


def _found(suites, side, system) -> dict[str, Any] | None:
  return None if system is None else suites.found(side, system)


def _metrics(found: Mapping[str, Any] | None) -> Any:
  return None if found is None else found['metrics']


def _shown(own, found: Mapping[str, Any]) -> str:
  """The metric that the record is about: chosen by, or the first of content.

  Of rows without answers it is the loss.
  """
  measured = [one['metrics'] for one in found.values() if one]
  names = ranges.metric_names(own.evaluate.metrics)
  there = [n for n in names if all(n in one for one in measured)]
  # The form of answers is soon learnt, and says little.
  there.sort(key=lambda n: measured[0][n]['kind'] != 'content')
  if own.select.metric and all(own.select.metric in one for one in measured):
    return own.select.metric
  return there[0] if there else 'nats_per_token'


def _compared(suites, side, base, tuned) -> dict[str, Any] | None:
  """Both row by row, written beside them; None where there are no two."""
  if base is None or tuned is None:
    return None
  held = suites.held[side]
  found: dict[str, Any] = {'n': 0, 'metrics': {}, 'flips': {}}
  one, other = (_predictions(suites, side, s) for s in (base, tuned))
  if one and other:
    found = compare.pair(one, other, held.metrics, held.asked())
  names = f'{side}.{base.name}', f'{side}.{tuned.name}'
  one, other = (summary.losses(suites.folder, name) for name in names)
  if one is not None and other is not None:
    found['n'] = found['n'] or len(one)
    found['metrics']['nats_per_token'] = compare.losses(one, other)
  if not found['metrics']:
    return None
  compare.write(suites.folder, *names, found)
  return found


def _alphas(suites, side, alphas, metric) -> list[dict[str, Any]]:
  """One point for each alpha; one that was not measured has none."""
  points = []
  for alpha, system in alphas:
    score = suites.found(side, system)['metrics'][metric]
    point = {'alpha': alpha, **{k: score[k] for k in ('value', 'low', 'high')}}
    general = _metrics(suites.found(suites_lib.RETENTION, system)) or {}
    rise = general.get(select.INCREASE)
    point[select.INCREASE] = None if rise is None else float(rise['value'])
    points.append(point)
  return points


def _samples(suites, side, base, tuned) -> list[dict[str, Any]]:
  """A few rows, evenly spaced, with the answers of both."""
  both = [_predictions(suites, side, system) for system in (base, tuned)]
  rows = both[1] or both[0] or []
  found = []
  for i in summary.spread(len(rows), SAMPLES):
    prompt, reference = summary.asked(rows[i]), rows[i]['reference']
    outputs = [None if own is None else own[i]['output'] for own in both]
    found.append(
      {
        'prompt': prompt,
        'reference': reference,
        'base': outputs[0],
        'tuned': outputs[1],
      }
    )
  return found


def _confusion(found: Mapping[str, Any]) -> dict[str, Any] | None:
  """The tables of both systems under the labels of all."""
  tables = {
    name: ((own or {}).get('tables') or {}).get('confusion')
    for name, own in found.items()
  }
  return tables if any(tables.values()) else None
