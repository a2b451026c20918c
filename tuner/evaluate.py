"""`evaluate`: base and tuned of a committed step on the same held-out rows.

What training has measured of the same rows is read, not measured again. The
test split is for the end: each time that it is looked at is counted, and what
is to be chosen by comparing (several alphas) is compared on dev.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from tuner import (
  basedir,
  evaluation,
  export,
  interpolate,
  named,
  opening,
  rundir,
  sections,
  summary,
)
from tuner import experiment as experiment_lib
from tuner import suites as suites_lib
from tuner.evals import harness

SIDES = ('test', 'dev')


@dataclasses.dataclass(frozen=True)
class Asked:
  """The command's flags, checked. step: 0 is the base alone, None the run's."""

  step: int | None
  side: str
  alphas: tuple[float, ...]
  tasks: tuple[str, ...]
  path: str | None
  limit: int | None


def asked(
  step: int | None = None,
  split: str | None = None,
  alphas: str | None = None,
  tasks: str | None = None,
  path: str | None = None,
  limit: int | None = None,
) -> Asked:
  """The flags as they are given. Raises ValueError."""
  values = _alphas(alphas)
  if step == 0 and values:
    raise ValueError(
      '--alphas: --step=0 is the base alone, which has nothing to scale; name '
      'a committed step.'
    )
  side = split if split is not None else 'dev' if values else 'test'
  if side not in SIDES:
    raise ValueError(
      f'--split: {side!r} is no split to measure on'
      f'{named.nearest(side, SIDES) or "."} There are {", ".join(SIDES)}.'
    )
  if side == 'test' and len(values) > 1:
    raise ValueError(
      f'--alphas: {alphas} on the test split would choose by it, and what is '
      'chosen by is no longer held out. Compare them with --split=dev, then '
      'measure the one you take on test.'
    )
  return Asked(step, side, values, _tasks(tasks, path, limit), path, limit)


def _alphas(given: str | None) -> tuple[float, ...]:
  if given is None:
    return ()
  values = []
  for text in given.split(','):
    try:
      value = float(text)
    except ValueError:
      value = -1.0
    if not 0 < value <= 1:
      raise ValueError(
        f'--alphas: {text.strip()!r}; wanted numbers above 0, up to 1, as '
        '0.25,0.5,1: 0 is the base, 1 the model as it was trained.'
      )
    values.append(value)
  return tuple(sorted(set(values)))


def _tasks(given: str | None, path, limit) -> tuple[str, ...]:
  """The tasks of lm-eval that are named, and known."""
  for flag, value in (('path', path), ('limit', limit)):
    if given is None and value is not None:
      raise ValueError(f'--harness_{flag}: {value!r} is for --harness=TASKS.')
  if given is None:
    return ()
  names = tuple(name.strip() for name in given.split(','))
  if not all(names):
    raise ValueError(
      f'--harness: {given!r}; wanted names of tasks, as hellaswag,arc_easy.'
    )
  if limit is not None and limit < 1:
    raise ValueError(f'--harness_limit: {limit}; it must be at least 1.')
  try:
    harness.check(names, path)
  except ValueError as error:
    raise ValueError(f'--harness: {error}') from error
  return names


def run(config: Mapping[str, Any], workdir: pathlib.Path, flags: Asked) -> int:
  """Measures what is not measured yet, prints the comparison; the exit code.

  Raises ValueError for what the user can mend.
  """
  own = sections.read(config)
  if flags.step != 0:
    _check_run(workdir)
  with rundir.lock(workdir):
    step = flags.step
    if step != 0:
      step = export.choose_step(workdir, step, own.select)
      # Before the data, which another tokenizer would find fault with.
      base_dir = basedir.find(own.model.path, own.model.revision)
      basedir.check_run(workdir, base_dir, own.model.path)
    experiment = experiment_lib.prepare(config)
    _check_rows(experiment, flags)
    opening.check_frozen(experiment, workdir, flags.side)
    record = None
    if step:
      record = export.checked_record(
        own, experiment.declared, experiment.tokenizer, workdir, step
      )
    suites = suites_lib.Suites(experiment, workdir, 'evaluate', [flags.side])
    with jax.set_mesh(experiment.mesh):
      _measure(suites, flags, record)
  return 0


def _check_run(workdir: pathlib.Path) -> None:
  try:
    export.check_run(workdir)
  except ValueError as error:
    said = str(error).rstrip('.')
    raise ValueError(
      f'{said}. Train first, or measure the base alone: --step=0.'
    ) from error
  if not (workdir / 'run.json').is_file():
    raise ValueError(
      f'{workdir}/run.json is not there: nothing says which rows this run held '
      'out. Run the training once more, which writes it.'
    )


def _check_rows(experiment, flags: Asked) -> None:
  """Raises ValueError where there is nothing to measure on."""
  side = flags.side
  if not len(getattr(experiment.split, side)):
    one = ''
    if flags.alphas and side == 'dev':
      one = ' A single alpha may be measured on test: --split=test.'
    raise ValueError(
      f'--split={side}: no {side} rows are held out: config.data.{side} is '
      f'{getattr(experiment.config.data, side)!r}.{one}'
    )


def _measure(suites: suites_lib.Suites, flags: Asked, record) -> None:
  experiment, side = suites.experiment, flags.side
  weights = _Weights(suites, record)
  base = suites.base(weights.untuned)
  systems = [base] if experiment.config.evaluate.base or not record else []
  tuned, alphas = None, []
  if record:
    tuned = weights.system(1.0)
    systems.append(tuned)
    alphas = [(alpha, weights.system(alpha)) for alpha in flags.alphas]
    systems += [system for _, system in alphas]
  for system in systems:
    suites.task(side, system)
    suites.general(system, base)
  base_or_none = base if base in systems else None
  tested = _harness(suites, flags, base_or_none, tuned)
  evaluation.report(suites, side, base_or_none, tuned, alphas, tested)


def _harness(suites, flags: Asked, base, tuned) -> dict[str, Any] | None:
  """Results of lm-eval's tasks by system.

  Those that are there are read, but of the user's own tasks, which change.
  """
  if not flags.tasks:
    return None
  found, experiment = {}, suites.experiment
  for role, system in (('base', base), ('tuned', tuned)):
    if system is None:
      continue
    suite = f'harness.{system.name}'
    key = [flags.tasks, flags.limit, flags.path, system.identity]
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = suites.folder / f'{suite}.json'
    there = summary.record(file) or {}
    if there.get('key') != digest or flags.path:
      with suites.ledger.timed('harness', suite):
        results = harness.run(
          system.make(), experiment.tokenizer, experiment.stop_ids,
          flags.tasks, flags.path, flags.limit, folder=suites.folder,
          suite=suite,
        )  # fmt: skip
      there = {**json.loads(file.read_text()), 'key': digest, 'tasks': results}
      rundir.write_whole(file, json.dumps(there, indent=2) + '\n')
    found[role] = there['tasks']
  return found


class _Weights:
  """The weights of a step and of the base, read when first asked for."""

  def __init__(self, suites, record):
    self._experiment, self._record = suites.experiment, record
    self._suites = suites
    self._frozen = self._trainable = None

  def system(self, alpha: float) -> suites_lib.System:
    step, facts = self._record['step'], self._record['facts']
    return self._suites.tuned(step, lambda: self._tuned(alpha), facts, alpha)

  def untuned(self):
    self._load()
    return self._experiment.untuned(self._frozen)

  def _tuned(self, alpha):
    self._load()
    experiment = self._experiment
    if self._trainable is None:
      opening.say(f'reading step {self._record["step"]}')
      self._trainable = export.restore(
        self._suites.workdir, self._record, experiment.declared, experiment.mesh
      )
    trainable = self._trainable
    if alpha != 1:
      base = self._frozen or experiment.load_base()
      trainable = interpolate.between(
        experiment.adaptation, base, trainable, alpha
      )
    return experiment.tuned(self._frozen, trainable)

  def _load(self):
    if self._frozen is None:
      experiment = self._experiment
      is_adapter = experiment.adaptation.is_adapter
      self._frozen = experiment.load_base() if is_adapter else {}
