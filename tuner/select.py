"""Which checkpoint is measured, exported and kept, and when training ends.

Each measurement on the dev split adds a line to eval/checkpoints.jsonl: step,
metrics and, where it was measured, retention. Every choice is a function of
these lines and of config.select, so that a run that was stopped and resumed
chooses as one that was not, and another bound can be tried on them later.
Step 0 is the base: it is in the curve and is never chosen.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tuner import rundir, sections

FILE = 'eval/checkpoints.jsonl'
LOWER_IS_BETTER = ('nats_per_token',)
INCREASE = 'nats_increase'  # of tuner.evals.retention

Line = Mapping[str, Any]


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The measurements so far, by step; [] where there are none.

  Raises ValueError.
  """
  path = workdir / FILE
  if not path.is_file():
    return []
  text = path.read_text(encoding='utf-8')
  try:
    found = [json.loads(line) for line in text.split('\n') if line]
    return sorted(found, key=lambda line: line['step'])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} cannot be read: {type(error).__name__} {error}. Without that '
      'file nothing is known of the steps so far: mend it, or delete it and '
      'name a step, as --step=N.'
    ) from error


def write(workdir: pathlib.Path, lines: Sequence[Line]) -> None:
  """Writes all of the measurements."""
  rundir.make_folder((workdir / FILE).parent)
  text = ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines)
  rundir.write_whole(workdir / FILE, text)


def until(lines: Sequence[Line], step: int) -> list[Line]:
  """Those that a run resumed at that step does not take again."""
  return [line for line in lines if line['step'] <= step]


def chosen(lines: Sequence[Line], own: sections.Select) -> int | None:
  """The best step that is allowed, the earlier of equal ones; None: none is.

  None, too, where config.select names no metric.
  """
  best = nearest(lines, own)
  if best is None or not is_allowed(_at(lines, best), own):
    return None
  return best


def choice(workdir: pathlib.Path, own: sections.Select) -> int | None:
  """The step that a run is known by; None: its last, as nothing is chosen.

  Raises RuntimeError where no step is allowed, ValueError where config.select
  asks for what the run has not measured.
  """
  if own.metric is None:
    return None
  lines = read(workdir)
  if nearest(lines, own) is None:
    raise ValueError(
      f'config.select.metric: {own.metric!r}, but {workdir / FILE} has no '
      'measurement to choose by; name a step: --step=N.'
    )
  step = chosen(lines, own)
  if step is None:
    raise RuntimeError(refusal(lines, own))
  return step


def nearest(lines: Sequence[Line], own: sections.Select) -> int | None:
  """`chosen`, or where no step is allowed the one that forgot least."""
  candidates = _candidates(lines)
  if own.metric is None or not candidates:
    return None
  return max(candidates, key=lambda line: _rank(line, own))['step']


def is_over(lines: Sequence[Line], own: sections.Select) -> bool:
  """Whether config.select.patience is at its end."""
  if own.patience is None or (best := nearest(lines, own)) is None:
    return False
  later = [line for line in _candidates(lines) if line['step'] > best]
  return len(later) >= own.patience


def is_allowed(line: Line, own: sections.Select) -> bool:
  """Whether the step keeps within config.select.max_nats_increase."""
  if own.max_nats_increase is None:
    return True
  increase = _increase(line)
  return increase is not None and increase <= own.max_nats_increase


def refusal(lines: Sequence[Line], own: sections.Select) -> str:
  """What to say where no step is allowed."""
  step = nearest(lines, own)
  assert step is not None and own.metric is not None
  line = _at(lines, step)
  return (
    f'config.select.max_nats_increase: {own.max_nats_increase}; no checkpoint '
    f'keeps within it. The nearest is step {step}, whose nats a token on '
    f'general text rose by {_increase(line):.4g} ({own.metric} '
    f'{_value(line, own.metric):.4g}). Nothing is exported; the checkpoint is '
    'kept. Train with a lower config.schedule.peak or with replay, raise the '
    f'bound, or take it as it is: export --step={step}.'
  )


def reason(lines: Sequence[Line], own: sections.Select) -> str:
  """Why a step is chosen, in a line, and whether the base was as good."""
  step = chosen(lines, own)
  assert step is not None and own.metric is not None
  line = _at(lines, step)
  value = _value(line, own.metric)
  text = f'step {step} is chosen: {own.metric} {value:.4g} on the dev split'
  if (increase := _increase(line)) is not None:
    text += f', nats on general text {increase:+.4g}'
  base = [line for line in lines if line['step'] == 0]
  if base and _gain(base[0], own) >= _gain(line, own):
    text += (
      f'. The base is no worse: {_value(base[0], own.metric):.4g}; training '
      'has won nothing'
    )
  return text


def curve(
  lines: Sequence[Line], own: sections.Select, metric: str, step: int | None
) -> list[dict[str, Any]]:
  """Task against forgetting over the steps, for a report.

  metric: what is shown where config.select names none. step: the one taken.
  """
  name = own.metric or metric
  return [
    {
      'step': line['step'],
      'metric': name,
      **{k: line['metrics'][name][k] for k in ('value', 'low', 'high')},
      INCREASE: _increase(line),
      'chosen': line['step'] == step,
      'allowed': line['step'] > 0 and is_allowed(line, own),
    }
    for line in lines
    if name in line['metrics']
  ]


def _candidates(lines: Sequence[Line]) -> list[Line]:
  return [line for line in lines if line['step'] > 0]


def _at(lines: Sequence[Line], step: int) -> Line:
  return next(line for line in lines if line['step'] == step)


def _rank(line: Line, own: sections.Select) -> tuple[bool, float, int]:
  """Greater is better: allowed ones by their metric, others by their bound."""
  allowed = is_allowed(line, own)
  if allowed:
    value = _gain(line, own)
  else:
    increase = _increase(line)
    value = -math.inf if increase is None else -increase
  return allowed, -math.inf if math.isnan(value) else value, -line['step']


def _gain(line: Line, own: sections.Select) -> float:
  """The metric of config.select, greater is better."""
  assert own.metric is not None
  value = _value(line, own.metric)
  return -value if own.metric in LOWER_IS_BETTER else value


def _value(line: Line, metric: str) -> float:
  """Of a metric on the dev split. Raises ValueError where it is not there."""
  if metric not in line['metrics']:
    raise ValueError(
      f'config.select.metric: {metric!r} was not measured at step '
      f'{line["step"]}; {FILE} has {", ".join(sorted(line["metrics"]))}.'
    )
  return float(line['metrics'][metric]['value'])


def _increase(line: Line) -> float | None:
  """Nats a token on general text above the base's; None: not measured."""
  found = (line.get('retention') or {}).get(INCREASE)
  return None if found is None else float(found['value'])
