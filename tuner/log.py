"""What a run says while it runs: metrics.jsonl, TensorBoard, a progress line.

metrics.jsonl is the record that the rest of the program reads: one JSON object
a line, no step twice. A run resumed from step k first cuts off what was logged
after k, and a line torn by a kill. JSON has no NaN: numbers that are not
finite are written as the strings 'nan', 'inf' and '-inf', which Python's
float() reads back. Everything shown on a terminal is stripped of control
characters, as a model or a data set may have written it.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

from tuner import progress, rundir


class Log:
  """Writes the metrics of a run; a context manager.

  writers: names out of WRITERS. resumed: the step that the run goes on from,
  None for a run from its start. Only process 0 writes. `now` is the clock,
  in seconds. stream: where progress goes, stderr by default: one line redrawn
  on a terminal, else a line at most every 5 s, and always the last one.
  """

  def __init__(
    self,
    workdir,
    writers=('jsonl', 'tensorboard'),
    total_steps=None,
    resumed=None,
    process=0,
    stream=None,
    now=time.monotonic,
  ):
    names = writers if process == 0 else ()
    for name in names:
      if name not in WRITERS:
        raise ValueError(f'log writer {name!r}: there are {", ".join(WRITERS)}')
    self._writers = [WRITERS[n](pathlib.Path(workdir), resumed) for n in names]
    self._progress = None
    if process == 0:
      self._progress = progress.start(stream or sys.stderr, total_steps, now)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.ExitStack() as stack:  # closes all, though one may raise
      for part in [*self._writers, self._progress]:
        if part is not None:
          stack.callback(part.close)

  def write(self, step, metrics):
    """Logs the training metrics of one step: numbers, 0-d arrays or text."""
    if self._progress is None:
      return
    line = {'step': int(step)} | _plain(metrics)
    for writer in self._writers:
      writer.write(line)
    self._progress.write(line)

  def write_eval(self, step, suite, metric, value, n, low, high):
    """Logs a held-out score with its count and its 95 % interval.

    A score that a resumed run computes again for the very step that it was
    resumed from is written once.
    """
    if self._progress is None:
      return
    numbers = {'value': value, 'n': n, 'low': low, 'high': high}
    line = {'step': int(step), 'eval': suite, 'metric': metric}
    line |= _plain(numbers)
    for writer in self._writers:
      writer.write_eval(line)
    value, low, high = (
      progress.number(line[k]) for k in ('value', 'low', 'high')
    )
    self.say(
      f'step {step} {suite} {metric} {value} [{low}, {high}] n={line["n"]}'
    )

  def write_samples(self, step, suite, samples):
    """Shows answers beside what was wanted: (prompt, reference, output) each.

    All of it is untrusted text, cut to 79 columns. metrics.jsonl has none of
    it, as the predictions lie in eval/.
    """
    if self._progress is None:
      return
    for writer in self._writers:
      writer.write_samples(step, suite, samples)
    for prompt, reference, output in samples:
      for name, text in (
        (f'step {step} {suite}', prompt),
        ('  wanted', reference),
        ('  got', output),
      ):
        self.say(_cut(f'{name}: {progress.clean(text)}'))

  def say(self, text):
    """Shows one line above the progress line, without control characters."""
    if self._progress is not None:
      self._progress.say(progress.clean(text))


class Jsonl:
  """Appends to workdir/metrics.jsonl, each line at once."""

  def __init__(self, workdir, resumed):
    path = workdir / 'metrics.jsonl'
    self._steps, self._evals = cut(path, resumed)
    # Unbuffered: what a full disk refuses is not tried again at closing.
    self._file = open(path, 'ab', buffering=0)

  def write(self, line):
    assert line['step'] not in self._steps, f'step {line["step"]} logged twice'
    self._steps.add(line['step'])
    self._append(line)

  def write_eval(self, line):
    key = _eval_key(line)
    if key not in self._evals:
      self._evals.add(key)
      self._append(line)

  def write_samples(self, step, suite, samples):
    """Nothing: eval/<suite>.<step>.predictions.jsonl has all of them."""

  def _append(self, line):
    # allow_nan: _plain has turned every NaN into text; hold it to that.
    data = json.dumps(line, allow_nan=False).encode() + b'\n'
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as error:
      raise RuntimeError(
        f'cannot write to {self._file.name}: {error.strerror}\n'
        'make room and run the same command: it goes on from its checkpoint'
      ) from error

  def close(self):
    os.fsync(self._file.fileno())
    self._file.close()


class TensorBoard:
  """Writes workdir/tensorboard through tensorboardX."""

  def __init__(self, workdir, resumed):
    module = _optional('tensorboardX', 'tensorboardX')
    # It warns at every NaN, through the progress line.
    logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)
    # purge_step hides what an earlier, killed run logged after that step.
    self._writer = module.SummaryWriter(
      str(workdir / 'tensorboard'),
      purge_step=0 if resumed is None else resumed + 1,
      # Event files are named after the second: two of one must not meet.
      filename_suffix=f'.after{resumed}',
      flush_secs=10,
    )

  def write(self, line):
    for key, value in _numbers(line).items():
      self._writer.add_scalar(f'train/{key}', value, line['step'])

  def write_eval(self, line):
    key = f'{line["eval"]}/{line["metric"]}'
    self._writer.add_scalar(key, float(line['value']), line['step'])

  def write_samples(self, step, suite, samples):
    for i, sample in enumerate(samples):
      self._writer.add_text(f'{suite}/sample_{i}', _verbatim(sample), step)

  def close(self):
    self._writer.close()


class Board:
  """Writes to a service with the interface of Weights & Biases.

  The run is named after the workdir, so that resuming goes on with it.
  """

  def __init__(self, name, workdir, resumed):
    self._module = _optional(name, f'tuner[{name}]')
    run = workdir.absolute().name
    self._module.init(
      project='tuner',
      name=run,
      resume='never' if resumed is None else 'allow',
      **({'id': run, 'dir': str(workdir)} if name == 'wandb' else {}),
    )

  def write(self, line):
    self._module.log(_numbers(line), step=line['step'])

  def write_eval(self, line):
    key = f'{line["eval"]}/{line["metric"]}'
    values = {f'{key}/{k}': line[k] for k in ('value', 'low', 'high', 'n')}
    self._module.log(_numbers(values), step=line['step'])

  def write_samples(self, step, suite, samples):
    """Nothing: a service is not sent the user's data unasked."""

  def close(self):
    self._module.finish()


WRITERS: dict[str, Callable] = {
  'jsonl': Jsonl,
  'tensorboard': TensorBoard,
  'wandb': lambda workdir, resumed: Board('wandb', workdir, resumed),
  'trackio': lambda workdir, resumed: Board('trackio', workdir, resumed),
}


def cut(path, resumed):
  """Removes from a metrics file what a run resumed at that step writes again.

  resumed None: everything. Lines that are no JSON object go as well: a kill
  tears the last one. Returns the steps that have a training line, and the
  keys of the evaluation lines that are kept.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  text = path.read_bytes() if path.exists() else b''
  kept, steps, evals = [], set(), set()
  for row in text.splitlines(keepends=True):
    line = _parse(row)
    if line is None or resumed is None or line['step'] > resumed:
      continue
    kept.append(row)
    if 'eval' in line:
      evals.add(_eval_key(line))
    else:
      steps.add(line['step'])
  if b''.join(kept) != text:
    rundir.write_whole(path, b''.join(kept))
  return steps, evals


def _parse(row):
  """The line as a dict, or None: torn, or not one of ours."""
  try:
    line = json.loads(row)
  except ValueError:
    return None
  is_ours = isinstance(line, dict) and isinstance(line.get('step'), int)
  return line if is_ours and row.endswith(b'\n') else None


def _eval_key(line):
  return line['step'], line['eval'], line.get('metric')


def _verbatim(sample):
  """A sample as Markdown that shows it as it is: an indented block of code."""
  names = 'prompt', 'wanted', 'got'
  lines = []
  for name, text in zip(names, sample, strict=True):
    lines += [f'{name}:', *map(progress.clean, str(text).split('\n')), '']
  return '\n'.join(f'    {line}' for line in lines)


def _cut(text, columns=79):
  return text if len(text) <= columns else f'{text[: columns - 4]} ...'


def _optional(module, package):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"log writer {module!r} is not installed: pip install '{package}', or "
      'leave it out of the config'
    ) from error


def _plain(metrics):
  """Values that JSON has: Python numbers, text in place of NaN and inf."""
  plain = {}
  for key, value in metrics.items():
    if not isinstance(value, str | bool | int | float | None):
      if np.size(value) != 1 or not hasattr(value, 'dtype'):
        raise ValueError(
          f'metric {key!r} is {type(value).__name__} of shape '
          f'{np.shape(value)}; a log takes numbers and text'
        )
      value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
      value = str(value)
    plain[key] = value
  return plain


def _numbers(line):
  """{key: float} of all but the step and texts; 'nan' becomes NaN again."""
  numbers = {}
  for key, value in line.items():
    if value in ('nan', 'inf', '-inf') or (
      isinstance(value, int | float) and key != 'step'
    ):
      numbers[key] = float(value)
  return numbers
