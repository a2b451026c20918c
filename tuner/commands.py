"""The commands: each puts the parts together over one run directory."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tuner import (
  basedir,
  check,
  checkpoint,
  commits,
  dataset,
  examine,
  export,
  measure,
  rundir,
  summary,
)
from tuner import experiment as experiment_lib
from tuner import log as log_lib
from tuner import stop as stop_lib
from tuner import train as train_lib
from tuner.artifacts import deliver, places, prompts
from tuner.data import split as split_lib
from tuner.models import weights

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
    describe(experiment)
    with jax.set_mesh(experiment.mesh):
      return _train(experiment, workdir, allow_change, stop)


def _train(experiment, workdir, allow_change, stop) -> int:
  own, facts = experiment.config, experiment.facts
  places.check(
    workdir / 'export', own.export.formats, own, experiment.base_dir, workdir,
    '--workdir',
  )  # fmt: skip
  dev, test = held_out(experiment)
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
    _write_json(workdir / 'config.json', experiment.resolved)
    _write_json(workdir / 'run.json', _run_record(experiment, facts))
    _write_check(experiment, workdir)
    _write_prompts(experiment, workdir)
    if not stop.requested:
      _measure_base(experiment, base, test, workdir)
    frozen, state = experiment.start(base)
    del base
    if resumed is not None:
      like = jax.tree.map(_described, state)
      state = checkpoints.restore(resumed, like)
    state = fit(
      experiment, frozen, state, dev, workdir, checkpoints, resumed, stop
    )
  if int(state.step) < experiment.total_steps or stop.requested:
    print(f'stopped at step {int(state.step)}, saved; run the same command to '
          'go on', file=sys.stderr)  # fmt: skip
    return stop_lib.EXIT_CODE
  finish(experiment, frozen, state, test, workdir)
  return 0


def held_out(experiment):
  """(dev, test) to measure on, None for what the config does not ask for."""
  own, split = experiment.config.evaluate, experiment.split
  dev = test = None
  if own.every:
    dev = measure.HeldOut(experiment, split.dev, own.dev_answers)
  if own.test == 'end' and split.test:
    test = measure.HeldOut(experiment, split.test)
  return dev, test


def fit(experiment, frozen, state, dev, workdir, checkpoints, resumed, stop):
  """The state after the last step, or after the one it was stopped at."""
  own, source = experiment.config, experiment.source
  if int(state.step) >= experiment.total_steps:
    return state
  compiled = {}  # by the shape of a batch
  meter = train_lib.Meter(source.ids)
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(
      log_lib.Log(
        workdir, own.log.writers, experiment.total_steps, resumed,
        jax.process_index(),
      )
    )  # fmt: skip

    def step_once(state, step):
      batch = experiment.put(source(step))
      shape = batch['tokens'].shape
      if shape not in compiled:
        compiled[shape] = compile_step(experiment, frozen, state, batch)
        meter.restart()
      return compiled[shape](state, frozen, batch)

    def report(step, metrics):
      log.write(step, meter(step, metrics))

    def due(step):
      return _is_due(step, own.evaluate.every) or _is_due(
        step, own.checkpoint.every
      )

    def pause(step, state):
      score = None
      if _is_due(step, own.evaluate.every) and not stop.requested:
        score = _measure_dev(experiment, dev, frozen, state, workdir, log)
      if _is_due(step, own.checkpoint.every):
        checkpoints.save(step, state, score)
      meter.restart()

    meter.restart()
    state = train_lib.loop(
      state, step_once, experiment.total_steps, report, due, pause,
      lambda: stop.requested,
    )  # fmt: skip
    checkpoints.save(int(state.step), state)
  return state


def _measure_dev(experiment, dev, frozen, state, workdir, log) -> float:
  """Logs loss and scores on the dev split; the loss, which keep_best ranks."""
  step = int(state.step)
  tuned = experiment.tuned(frozen, state.trainable)
  system = ['tuned', experiment.facts, step]
  found = dev.measure(workdir / 'eval', f'dev.{step}', tuned, system)
  for name, score in found['metrics'].items():
    numbers = (score[key] for key in ('value', 'n', 'low', 'high'))
    log.write_eval(step, 'dev', name, *numbers)
  return found['metrics']['nats_per_token']['value']


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
  say(f'compiled the step in {seconds:.1f} s{needs}')
  return compiled


def finish(experiment, frozen, state, test, workdir) -> None:
  """Measures the tuned model, exports it, and prints what was won."""
  own, folder = experiment.config, workdir / 'eval'
  tuned = experiment.tuned(frozen, state.trainable)
  if test is not None:
    system = ['tuned', experiment.facts]
    scores = test.measure(folder, 'test.tuned', tuned, system)
    print_scores(folder, scores, own.evaluate.base, experiment.base_dir.name)
  trained = export.of_experiment(experiment, frozen, state, workdir)
  names = export.wanted_formats(own, experiment.adaptation)
  deliver.write(trained, names, workdir / 'export', key='--workdir')


def print_scores(folder, tuned, has_base: bool, name: str) -> None:
  """The table of base and tuned, and three examples."""
  base, differences, base_rows = None, {}, []
  tuned_rows = summary.predictions(folder, 'test.tuned')
  if has_base:
    base = json.loads((folder / 'test.base.json').read_text(encoding='utf-8'))
    base_rows = summary.predictions(folder, 'test.base')
    differences = summary.differences(base_rows, tuned_rows)
  n = max(metric['n'] for metric in tuned['metrics'].values())
  print(f'\n{name} on {n} held-out rows: mean [95 % interval]\n')
  print(summary.table(base, tuned, differences))
  if tuned_rows:
    print('\n' + summary.examples(base_rows, tuned_rows) + '\n')


def describe(experiment: Experiment) -> None:
  """Says what will be trained on, before anything heavy is loaded."""
  examples, source = experiment.data.examples, experiment.source
  split = experiment.split
  sizes = experiment.model.config.sizes
  declared = experiment.adaptation.rows
  trained = sum(map(math.prod, experiment.adaptation.shapes(sizes).values()))
  say(
    f'model: {weights.count(declared, sizes):,} parameters; '
    f'{trained:,} are trained ({experiment.resolved["adapt"]["name"]})'
  )
  for line in examine.warnings(experiment.config, experiment.data):
    say(line)
  if experiment.config.data.access == 'stream':
    say(
      f'rows are read as they are needed; {len(split.dev)} dev, '
      f'{len(split.test)} test; {experiment.total_steps} steps of '
      f'{source.rows} rows of {source.tokens} tokens'
    )
    return
  say(
    f'rows: {len(split.train)} train, {len(split.dev)} dev, '
    f'{len(split.test)} test'
  )
  say(
    f'loss on {examples.trained_tokens:,} of {len(examples.tokens):,} tokens '
    f'({dataset.trained_text(experiment.config)})'
  )
  say(
    f'{experiment.config.batch.layout} into {source.rows_per_epoch} rows of '
    f'{source.tokens} tokens, {source.fill:.1%} full; '
    f'{experiment.total_steps} steps of {source.rows}'
  )


def _write_check(experiment: Experiment, workdir: pathlib.Path) -> None:
  """The record of the data, unless check has left a fuller one of the same."""
  if jax.process_index():
    return
  record = examine.examine(
    experiment.config,
    experiment.data,
    experiment.tokenizer,
    source=experiment.source,
    thorough=False,
  )
  try:
    there = json.loads((workdir / 'check.json').read_text(encoding='utf-8'))
    if there['thorough'] and there['data'] == record['data']:
      return
  except (OSError, ValueError, KeyError, TypeError):
    pass
  check.write(record, workdir)


def _write_prompts(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Prompts to travel with what is exported, so that it needs no data."""
  if jax.process_index() == 0:
    chosen = export.choose_prompts(experiment)
    rundir.write_whole(workdir / export.PROMPTS, prompts.lines(chosen))


def say(text: str) -> None:
  """One line on stderr, from the first process only."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def _identity(experiment: Experiment) -> dict[str, Any]:
  return basedir.identity(
    experiment.base_dir, experiment.config.model.path, experiment.revision
  )


def _measure_base(experiment, base, test, workdir) -> None:
  if test is None or not experiment.config.evaluate.base:
    return
  system = ['base', experiment.facts['model']]
  folder = workdir / 'eval'
  if test.found(folder, 'test.base', system) is None:
    say(f'measuring the base on {len(test.rows)} held-out rows')
    test.measure(folder, 'test.base', experiment.filled(base), system)


def _run_record(experiment: Experiment, facts) -> dict[str, Any]:
  """run.json: what the run's numbers depend on, its frozen split included."""
  split = experiment.split
  return {
    'facts': facts,
    'versions': commits.versions(),
    'base': _identity(experiment),
    'split': {
      name: {
        'n': len(rows),
        'digest': split_lib.digest(rows),
        'rows': rows.wheres(),
      }
      for name, rows in (('dev', split.dev), ('test', split.test))
    },
  }


def _described(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _write_json(path: pathlib.Path, value: Any) -> None:
  if jax.process_index() == 0:
    rundir.write_whole(path, json.dumps(value, indent=2) + '\n')
