"""What a run is measured by, and each result written once.

A suite is a side of the data, or 'retention', and a system: test.base, dev.20,
retention.base. Its result is eval/<suite>.json; one that is there already, of
the same rows and system, is read. Training and `evaluate` come through here, so
that the one reads what the other has measured.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tuner import experiment as experiment_lib
from tuner import ledger as ledger_lib
from tuner import measure, opening, rundir, summary
from tuner.data import split as split_lib
from tuner.evals import plan, stats
from tuner.evals import retention as retention_lib
from tuner.models import policy, weights

BASE = 'base'
RETENTION = 'retention'
Found = dict[str, Any]
Make = Callable[[], policy.Policy]


@dataclasses.dataclass(frozen=True)
class System:
  """What is measured: the base, a step, or a step with its weights scaled.

  identity: what its numbers depend on. make() is the model, asked for only
  where a result is not there yet.
  """

  name: str
  step: int | None
  identity: Any
  make: Make


class Suites:
  """The suites of one run.

  sides: those of the data that will be measured. Raises ValueError for rows
  that cannot be measured, before a weight is loaded.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    workdir: pathlib.Path,
    command: str,
    sides: Sequence[str],
  ):
    self.experiment = experiment
    self.workdir = workdir
    self.folder = workdir / 'eval'
    self.ledger = ledger_lib.Ledger(workdir, command)
    answers = {'dev': experiment.config.evaluate.dev_answers, 'test': None}
    self.held = {
      side: measure.HeldOut(
        experiment, getattr(experiment.split, side), answers[side]
      )
      for side in sides
    }
    self.digest = split_lib.digest(experiment.split.test)
    # None: it is turned off, or there is nothing that it may cost.
    self.retention = _retention(experiment, self.folder)

  def base(self, make: Make) -> System:
    """The untuned model."""
    return System(BASE, None, ['base', self.experiment.facts['model']], make)

  def tuned(
    self, step: int, make: Make, facts: Mapping[str, Any], alpha: float = 1.0
  ) -> System:
    """The model of a step; facts: of its commit. alpha: see interpolate."""
    name, identity = str(step), ['tuned', facts, step]
    if alpha != 1:
      name, identity = f'{name}.alpha{alpha:g}', [*identity, alpha]
    return System(name, step, identity, make)

  def found(self, side: str, system: System) -> Found | None:
    """A result that is there already."""
    if side == RETENTION:
      return self._found_retention(system)
    return self.held[side].found(
      self.folder, f'{side}.{system.name}', system.identity
    )

  def task(self, side: str, system: System) -> Found:
    """Loss and answers on a side of the data."""
    found = self.found(side, system)
    if found is not None:
      return found
    suite = f'{side}.{system.name}'

    @contextlib.contextmanager
    def around():
      if side == 'test':
        what = BASE if system.step is None else 'tuned'
        self.ledger.read(suite, what, system.step, self.digest)
      with self.ledger.timed('evaluation', suite):
        yield

    return self.held[side].measure(
      self.folder, suite, system.make(), system.identity, around
    )

  def general(self, system: System, base: System) -> Found | None:
    """General ability beside the base's; None: it is not measured."""
    if self.retention is None:
      return None
    found = self.found(RETENTION, system)
    if found is not None:
      return found
    suite = f'{RETENTION}.{system.name}'
    with self.ledger.timed(RETENTION, suite):
      tuned = system.make()
      metrics = self.retention.measure(
        tuned, tuned if system.name == BASE else base.make()
      )
    found = {
      'suite': suite,
      'key': self._retention_key(system),
      'metrics': {
        name: {key: stats.as_json(x) for key, x in score.items()}
        for name, score in metrics.items()
      },
    }
    if jax.process_index() == 0:
      rundir.make_folder(self.folder)
      text = json.dumps(found, indent=2, allow_nan=False)
      rundir.write_whole(self.folder / f'{suite}.json', text + '\n')
    return found

  def _found_retention(self, system: System) -> Found | None:
    if self.retention is None:
      return None
    there = (
      summary.record(self.folder / f'{RETENTION}.{system.name}.json') or {}
    )
    return there if there.get('key') == self._retention_key(system) else None

  def _retention_key(self, system: System) -> str:
    assert self.retention is not None
    facts = self.experiment.facts['model']
    parts = [self.retention.key, facts, system.identity]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def line(step: int, task: Found, retained: Found | None) -> Found:
  """A measurement as tuner.select keeps it."""
  return {
    'step': step,
    'metrics': task['metrics'],
    RETENTION: None if retained is None else retained['metrics'],
  }


def measurements(experiment: experiment_lib.Experiment) -> int:
  """How often a run measures general ability, base and end among them."""
  own, steps = experiment.config, experiment.total_steps
  every = own.evaluate.every
  is_last_due = every and (steps % every == 0 or own.select.metric is not None)
  within = steps // every if every else 0
  if is_last_due and steps % every:
    within += 1
  return 1 + within + (0 if is_last_due else 1)


def _retention(
  experiment: experiment_lib.Experiment, folder: pathlib.Path
) -> retention_lib.Retention | None:
  """How general ability is measured; says what is, and what is not, and why."""
  own, source = experiment.config, experiment.source
  if not own.retention.share:
    return None
  tokens = experiment.total_steps * source.rows * source.tokens
  if own.data.access != 'stream':
    tokens = int(tokens * source.fill)
  budget = plan.allowance(own.retention.share, tokens, measurements(experiment))
  key = json.dumps(experiment.facts['model'], sort_keys=True)
  found = retention_lib.Retention(
    own.retention, experiment.tokenizer, experiment.stop_ids,
    experiment.model, budget, folder, key,
  )  # fmt: skip
  bound = own.select.max_nats_increase
  if bound is not None and not found.plan.texts:
    why = [line for line in found.lines if 'text' in line.split(' not ')[0]]
    raise ValueError(
      f'config.select.max_nats_increase: {bound}, but no general text is '
      f'measured: {"; ".join(why or found.lines)}'
    )
  for line in found.lines:
    opening.say(line)
  if not experiment.adaptation.is_adapter:
    sizes = experiment.model.config.sizes
    count = weights.count(experiment.adaptation.rows, sizes)
    size = count * jnp.dtype(own.model.dtype).itemsize
    opening.say(
      'retention: full fine-tuning moves the base, which is read anew at each '
      f'measurement and takes {rundir.human(size)} beside the rest'
    )
  parts = found.plan.texts, found.plan.quiz, found.plan.prompts
  return found if any(parts) else None
