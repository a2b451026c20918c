"""The command `train`: it puts the parts together over one run directory."""

import contextlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tuner import (
  basedir,
  checkpoint,
  commits,
  evaluation,
  export,
  ledger,
  opening,
  periodic,
  rundir,
  select,
)
from tuner import experiment as experiment_lib
from tuner import log as log_lib
from tuner import stop as stop_lib
from tuner import suites as suites_lib
from tuner import train as train_lib
from tuner.artifacts import deliver, places

Experiment = experiment_lib.Experiment


def train(
  config: Mapping[str, Any],
  workdir: pathlib.Path,
  allow_change: Sequence[str] = (),
) -> int:
  """Checks, trains, evaluates, exports; the exit code.

  Run again with the same workdir it goes on from the newest whole checkpoint.
  75: stopped by a signal and saved, run the same command again.
  """
  with stop_lib.Stop() as stop, rundir.lock(workdir):
    experiment = experiment_lib.prepare(config)
    opening.describe(experiment)
    with jax.set_mesh(experiment.mesh):
      return _train(experiment, workdir, allow_change, stop)


def _train(experiment, workdir, allow_change, stop) -> int:
  own, facts = experiment.config, experiment.facts
  places.check(
    workdir / 'export', own.export.formats, own, experiment.base_dir, workdir,
    '--workdir',
  )  # fmt: skip
  suites = suites_of(experiment, workdir)
  base = experiment.load_base()
  with checkpoint.Checkpoints(
    workdir, facts, own.checkpoint.keep_last, own.checkpoint.keep_best,
    allow_change,
  ) as checkpoints:  # fmt: skip
    resumed = checkpoints.newest()
    if resumed is not None:
      if not {'model', 'model.weights'} & set(allow_change):
        basedir.check_run(workdir, experiment.base_dir, own.model.path)
      then = checkpoints.record(resumed)['facts']
      commits.compare_facts(then, checkpoints.facts, allow_change)
    opening.write(experiment, workdir)
    if not stop.requested:
      _measure_base(suites, base)
    frozen, state = experiment.start(base)
    del base
    if resumed is not None:
      like = jax.tree.map(_described, state)
      state = checkpoints.restore(resumed, like)
    watched = periodic.Periodic(experiment, suites, workdir, int(state.step))
    state = fit(
      experiment, frozen, state, suites, watched, checkpoints, resumed, stop
    )
  is_over = int(state.step) >= experiment.total_steps or watched.is_over
  if stop.requested or not is_over:
    opening.say(
      f'stopped at step {int(state.step)}, saved; run the same command to go on'
    )
    return stop_lib.EXIT_CODE
  finish(experiment, frozen, state, suites, workdir)
  return 0


def suites_of(
  experiment: Experiment, workdir: pathlib.Path
) -> suites_lib.Suites:
  """What the config asks to be measured, looked at before a weight is."""
  own, split = experiment.config.evaluate, experiment.split
  wanted = {'dev': own.every > 0, 'test': own.test == 'end' and split.test}
  sides = tuple(side for side, is_wanted in wanted.items() if is_wanted)
  return suites_lib.Suites(experiment, workdir, 'train', sides)


def _measure_base(suites, base) -> None:
  experiment = suites.experiment
  if not experiment.config.evaluate.base:
    return

  system = suites.base(lambda: experiment.filled(base))
  for side, held in suites.held.items():
    if suites.found(side, system) is None:
      opening.say(f'measuring the base on {len(held.rows)} {side} rows')
    suites.task(side, system)
  suites.general(system, system)


def fit(experiment, frozen, state, suites, watched, checkpoints, resumed, stop):
  """The state after the last step, or after the one it was stopped at."""
  own, start = experiment.config, int(state.step)
  is_done = start >= experiment.total_steps or watched.is_over
  if is_done and not watched.is_missing(start):
    return state
  meter = train_lib.Meter(experiment.source.ids)
  untuned = suites.base(lambda: experiment.untuned(frozen))
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(
      log_lib.Log(
        suites.workdir, own.log.writers, experiment.total_steps, resumed,
        jax.process_index(),
      )
    )  # fmt: skip

    def report(step, metrics):
      log.write(step, meter(step, metrics))

    def measure(step, state):
      tuned = suites.tuned(
        step, lambda: experiment.tuned(frozen, state.trainable),
        experiment.facts,
      )  # fmt: skip
      return watched.measure(log, tuned, untuned)

    def is_saved(step):
      is_candidate = watched.is_due(step) and own.select.metric is not None
      return is_candidate or _is_due(step, own.checkpoint.every)

    def pause(step, state):
      score = None
      if watched.is_due(step) and not stop.requested:
        score = measure(step, state)
      if is_saved(step):
        checkpoints.save(step, state, score, watched.chosen)
      meter.restart()

    watched.begin(log, untuned)
    if watched.is_missing(start) and not stop.requested:
      measure(start, state)
    step_once = _stepper(experiment, frozen, meter)
    state = train_lib.loop(
      state, step_once, experiment.total_steps, report,
      lambda step: watched.is_due(step) or is_saved(step), pause,
      lambda: stop.requested or watched.is_over,
    )  # fmt: skip
    checkpoints.save(int(state.step), state, chosen=watched.chosen)
  return state


def _stepper(experiment, frozen, meter):
  """(state, step) -> (state, metrics), compiled for each shape of a batch."""
  compiled = {}

  def step_once(state, step):
    batch = experiment.put(experiment.source(step))
    shape = batch['tokens'].shape
    if shape not in compiled:
      compiled[shape] = compile_step(experiment, frozen, state, batch)
      meter.restart()
    return compiled[shape](state, frozen, batch)

  meter.restart()
  return step_once


def compile_step(experiment: Experiment, frozen, state, batch):
  """The training step, compiled for the shapes of this batch and no other.

  Says how long it took and what the compiler needs.
  """
  start_s = time.perf_counter()
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(
    experiment.step(), donate_argnums=0, out_shardings=(shardings, None)
  )
  compiled = step.lower(state, frozen, batch).compile()
  memory = compiled.memory_analysis()
  seconds = time.perf_counter() - start_s
  needs = ''
  if memory is not None:
    arguments = rundir.human(memory.argument_size_in_bytes)
    temporary = rundir.human(memory.temp_size_in_bytes)
    needs = f'; a device needs {arguments} + {temporary} for a step'
  opening.say(f'compiled the step in {seconds:.1f} s{needs}')
  return compiled


def finish(experiment, frozen, state, suites, workdir) -> None:
  """Measures the step that is taken, exports it, and prints what was won."""
  own = experiment.config
  step, trainable = take(experiment, state, workdir)
  if 'test' in suites.held:
    base = suites.base(lambda: experiment.untuned(frozen))
    tuned = suites.tuned(
      step, lambda: experiment.tuned(frozen, trainable), experiment.facts
    )
    suites.task('test', tuned)
    suites.general(tuned, base)
    evaluation.report(
      suites, 'test', base if own.evaluate.base else None, tuned
    )
  opening.say(ledger.seconds_text(ledger.seconds(workdir)))
  trained = export.of_experiment(experiment, frozen, trainable, step, workdir)
  names = export.wanted_formats(own, experiment.adaptation)
  deliver.write(trained, names, workdir / 'export', key='--workdir')


def take(experiment, state, workdir):
  """(step, trainable tree) of the last step, or of the chosen one.

  Raises RuntimeError where config.select allows none.
  """
  own, last = experiment.config.select, int(state.step)
  step = select.choice(workdir, own)
  if step is not None:
    opening.say(select.reason(select.read(workdir), own))
  if step in (None, last):
    return last, state.trainable
  for array in jax.tree.leaves(state):  # Two states need not fit.
    array.delete()
  record = commits.read_record(workdir / f'commits/{step}.json', step)
  if fault := commits.fault(workdir, step):
    raise RuntimeError(f'step {step}, which is chosen: {fault}')
  return step, export.restore(
    workdir, record, experiment.declared, experiment.mesh
  )


def _described(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
