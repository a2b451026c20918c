"""Measurements while a run trains: loss, answers, retention, samples, choice.

They are those of the end, on the dev split. A measurement is written before its
step is committed; a run resumed at a step that was stopped before it was
measured measures it first. So what is logged, and chosen, is what a run without
interruption would have.
"""

import pathlib

import jax

from tuner import experiment as experiment_lib
from tuner import log as log_lib
from tuner import select, summary
from tuner import suites as suites_lib

SAMPLES = 2


class Periodic:
  """The measurements of one run, up to the step that it goes on from."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    suites: suites_lib.Suites,
    workdir: pathlib.Path,
    step: int,
  ):
    self._experiment = experiment
    self._suites = suites
    self._workdir = workdir
    self._own = experiment.config.select
    self._every = experiment.config.evaluate.every
    self.lines = select.until(select.read(workdir), step)

  def is_due(self, step: int) -> bool:
    """Whether that step is measured; where one is chosen, so is the last."""
    if not self._every:
      return False
    is_last = step == self._experiment.total_steps
    return step % self._every == 0 or (is_last and self._own.metric is not None)

  def is_missing(self, step: int) -> bool:
    """Whether that step is to be measured and was not."""
    return step > 0 and self.is_due(step) and not self._has(step)

  @property
  def is_over(self) -> bool:
    """Whether training ends before its last step."""
    return select.is_over(self.lines, self._own)

  @property
  def chosen(self) -> int | None:
    """The step that no later one has bettered: it must stay."""
    return select.nearest(self.lines, self._own)

  def begin(self, log: log_lib.Log, base: suites_lib.System) -> None:
    """Leaves out what is measured again, and starts from the base."""
    if not self._every:
      return
    found = self._suites.found('dev', base)
    if found is not None and not self._has(0):
      retained = self._suites.found(suites_lib.RETENTION, base)
      self._add(log, 0, found, retained)
    self._write()

  def measure(
    self, log: log_lib.Log, tuned: suites_lib.System, base: suites_lib.System
  ) -> float:
    """Measures a step; its loss on the dev split, which keep_best ranks."""
    assert tuned.step is not None
    task = self._suites.task('dev', tuned)
    retained = self._suites.general(tuned, base)
    if not self._has(tuned.step):
      self._add(log, tuned.step, task, retained)
      self._write()
    rows = summary.predictions(self._suites.folder, f'dev.{tuned.name}')
    log.write_samples(tuned.step, 'dev', summary.samples(rows, SAMPLES))
    if self.is_over:
      log.say(
        f'step {tuned.step}: {self._own.patience} measurements without a '
        f'better {self._own.metric} than at step {self.chosen}; training ends'
      )
    return float(task['metrics']['nats_per_token']['value'])

  def _has(self, step: int) -> bool:
    return any(line['step'] == step for line in self.lines)

  def _write(self) -> None:
    if jax.process_index() == 0:
      select.write(self._workdir, self.lines)

  def _add(self, log, step: int, task, retained) -> None:
    self.lines.append(suites_lib.line(step, task, retained))
    _write(log, step, 'dev', task)
    if retained is not None:  # Kinds of text are in eval/ alone.
      whole = {n: x for n, x in retained['metrics'].items() if '.' not in n}
      _write(log, step, 'retention', {'metrics': whole})


def _write(log: log_lib.Log, step: int, suite: str, found) -> None:
  for name, score in found['metrics'].items():
    numbers = (score[key] for key in ('value', 'n', 'low', 'high'))
    log.write_eval(step, suite, name, *numbers)
