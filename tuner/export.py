"""`export`: a committed step of a run as files that other software loads.

The base and the trained arrays are read, the data is not: a run keeps the
prompts that travel with its models in prompts.jsonl. What is written is
verified before it takes its place.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from tuner import (
  basedir,
  commits,
  dataset,
  interpolate,
  named,
  ranges,
  rundir,
  sections,
)
from tuner import experiment as experiment_lib
from tuner import mesh as mesh_lib
from tuner import select as select_lib
from tuner.artifacts import deliver, places, prompts, verify
from tuner.artifacts import export as export_lib
from tuner.artifacts import trained as trained_lib

PROMPTS = 'prompts.jsonl'
Trained = trained_lib.Trained


def run(
  config: Mapping[str, Any],
  workdir: pathlib.Path,
  formats: Sequence[str] = (),
  step: int | None = None,
  out: pathlib.Path | None = None,
  is_verified: bool = True,
  alpha: float = 1.0,
) -> int:
  """Exports a committed step; the exit code.

  step: None: the one that config.select chooses, else the newest.
  formats: instead of config.export.formats. out: instead of workdir/export.
  alpha: of the way from the base to the step, see tuner.interpolate.
  Raises ValueError for what the user can mend, RuntimeError where what was
  written is not what was trained.
  """
  check_run(workdir)
  if not 0 < alpha <= 1:
    raise ValueError(
      f'--alpha: {alpha:g}; wanted above 0, up to 1: 0 is the base, 1 the '
      'model as it was trained.'
    )
  own = _read(config, formats)
  with rundir.lock(workdir):
    step = choose_step(workdir, step, own.select)
    print(f'exporting step {step} of {workdir}', file=sys.stderr, flush=True)
    declared = experiment_lib.declare(own)
    names = wanted_formats(own, declared.adaptation)
    place, key = out or workdir / 'export', '--out' if out else '--workdir'
    places.check(place, names, own, declared.base_dir, workdir, key)
    mesh = mesh_lib.make(**dataclasses.asdict(own.mesh))
    with jax.set_mesh(mesh):
      trained = of_step(config, own, declared, workdir, step, mesh)
      trained = moved(trained, alpha)
      deliver.write(trained, names, place, is_verified, key)
  return 0


def _read(config, formats: Sequence[str]) -> sections.Config:
  """The config with other formats, if any are given."""
  own = sections.read(config)
  for name in formats:
    if name not in export_lib.FORMATS:
      hint = named.nearest(name, export_lib.FORMATS)
      raise ValueError(
        f'--formats: {name!r} is no format{hint or "."} There are '
        f'{", ".join(export_lib.FORMATS)}.'
      )
  if not formats:
    return own
  names: Any = tuple(formats)
  chosen = dataclasses.replace(own.export, formats=names)
  own = dataclasses.replace(own, export=chosen)
  ranges.check(own)
  return own


def wanted_formats(own: sections.Config, adaptation) -> list[str]:
  """config.export.formats, without an adapter where there is none."""
  names: list[str] = list(dict.fromkeys(own.export.formats))
  if 'adapter' in names and not adaptation.is_adapter:
    names.remove('adapter')
    print('adapter: not made; full fine-tuning has none', file=sys.stderr)
  return names


def check_run(workdir: pathlib.Path) -> None:
  """Raises ValueError where there is no run."""
  if not (workdir / 'commits').is_dir():
    named.existing_path(str(workdir), '--workdir')
    raise ValueError(
      f'--workdir: {workdir} holds no run: there is no commits/ in it.'
    )


def choose_step(
  workdir: pathlib.Path, step: int | None, select: sections.Select
) -> int:
  """That step, or the chosen one, or where none is to be chosen the newest.

  Its files are as they were committed. Raises RuntimeError where they are not,
  and where config.select allows no step.
  """
  names = (path.stem for path in (workdir / 'commits').glob('*.json'))
  steps = sorted(int(name) for name in names if name.isdecimal())
  if not steps:
    raise ValueError(
      f'--workdir: {workdir} has no committed checkpoint yet: train first.'
    )
  listed = ', '.join(map(str, steps))
  if step is None:
    step = select_lib.choice(workdir, select)
    if step is not None and step not in steps:
      raise ValueError(
        f'config.select chooses step {step}, which was not kept in {workdir}; '
        f'there are {listed}: name one, as --step={steps[-1]}.'
      )
  if step is None:
    for newest in reversed(steps):
      if not (fault := commits.fault(workdir, newest)):
        return newest
      print(f'step {newest} passed over: {fault}', file=sys.stderr)
    raise RuntimeError(f'{workdir}: no checkpoint is as it was committed.')
  if step not in steps:
    raise ValueError(
      f'--step: {step} is not committed in {workdir}; there are {listed}.'
    )
  if fault := commits.fault(workdir, step):
    raise RuntimeError(f'step {step} cannot be read: {fault}')
  return step


def of_step(given, own, declared, workdir, step: int, mesh) -> Trained:
  """The state at a committed step: the base, and what was trained of it."""
  base_dir, model = declared.base_dir, declared.model
  adaptation = declared.adaptation
  tokenizer, stop_ids = dataset.load_tokenizer(own, base_dir)
  record = checked_record(own, declared, tokenizer, workdir, step)
  trainable = restore(workdir, record, declared, mesh)
  frozen: dict[str, Any] = {}
  if adaptation.is_adapter:
    frozen = trained_lib.load(base_dir, model, mesh, own.model.dtype)
  file = workdir / PROMPTS
  if file.is_file():
    chosen = prompts.read(file)
  else:  # Of a run that was trained before there were such files.
    chosen = choose_prompts(experiment_lib.prepare(given))
  return Trained(
    own, base_dir, tokenizer, stop_ids, model, adaptation, mesh, frozen,
    trainable, record, tuple(chosen), workdir,
  )  # fmt: skip


def moved(trained: Trained, alpha: float) -> Trained:
  """`trained` with its weights moved back towards the base.

  Its record then says alpha: what was measured at 1 is not said of it.
  """
  if alpha == 1:
    return trained
  base = dict(trained.frozen)
  if not trained.adaptation.is_adapter:
    base = trained.load(trained.base_dir)
  trainable = interpolate.between(
    trained.adaptation, base, dict(trained.trainable), alpha
  )
  record = {**trained.record, 'alpha': alpha}
  return dataclasses.replace(trained, trainable=trainable, record=record)


def checked_record(
  own, declared, tokenizer, workdir: pathlib.Path, step: int
) -> dict[str, Any]:
  """The commit of a step; raises ValueError where it is of another model."""
  basedir.check_run(workdir, declared.base_dir, own.model.path)
  record = commits.read_record(workdir / f'commits/{step}.json', step)
  now = experiment_lib.model_facts(own, declared, tokenizer)
  now = json.loads(json.dumps(now))
  then = {key: record['facts'].get(key) for key in now}
  advice = (
    f'give the config that the run was trained with: {workdir}/config.json'
  )
  commits.compare_facts(then, now, advice=advice)
  return record


def restore(workdir, record, declared, mesh) -> dict[str, Any]:
  """The trainable tree of a checkpoint; its optimizer is left where it is."""
  adaptation = declared.adaptation
  dims = adaptation.dims
  shapes = adaptation.shapes(declared.model.config.sizes)
  like, committed = {}, {}
  for path, letters in dims.items():
    leaf = f'trainable.{path}'
    place = mesh_lib.sharding(mesh, letters, shapes[path])
    if (found := record['leaves'].get(leaf)) is not None:
      committed[leaf] = found
    dtype = found[0] if found else 'float32'
    like[leaf] = jax.ShapeDtypeStruct(shapes[path], dtype, sharding=place)
  commits.compare_leaves(committed, like)
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.restore(
      (workdir / f'checkpoints/{record["step"]}').absolute(),
      args=ocp.args.PyTreeRestore(
        item=like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
      ),
    )
  return {path: found[f'trainable.{path}'] for path in dims}


def choose_prompts(experiment: experiment_lib.Experiment):
  """Held-out prompts that leave room for an answer; of training, if none."""
  split = experiment.split
  positions = experiment.model.config.max_positions - verify.ANSWER_TOKENS
  longest = min(dataset.limit(experiment.config), positions)
  sides = split.test, split.dev, split.train
  return prompts.choose(sides, experiment.tokenizer, longest)


def of_experiment(
  experiment, frozen, trainable, step: int, workdir: pathlib.Path
) -> Trained:
  """A step in memory, which is committed."""
  record = commits.read_record(workdir / f'commits/{step}.json', step)
  return Trained(
    experiment.config, experiment.base_dir, experiment.tokenizer,
    experiment.stop_ids, experiment.model, experiment.adaptation,
    experiment.mesh, frozen, trainable, record,
    tuple(prompts.read(workdir / PROMPTS)), workdir,
  )  # fmt: skip
