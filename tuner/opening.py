"""What a run says and writes before its first step, and holds to afterwards.

config.json, run.json with the frozen dev and test rows, check.json and the
prompts that travel with its exports.
"""

import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from tuner import basedir, check, commits, dataset, examine, export, rundir
from tuner import experiment as experiment_lib
from tuner.artifacts import prompts
from tuner.data import split as split_lib
from tuner.models import weights

Experiment = experiment_lib.Experiment


def say(text: str) -> None:
  """One line on stderr, from the first process only."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


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


def write(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Writes all of them."""
  if jax.process_index():
    return
  _write_json(workdir / 'config.json', experiment.resolved)
  _write_json(workdir / 'run.json', _run_record(experiment))
  _write_check(experiment, workdir)
  chosen = export.choose_prompts(experiment)
  rundir.write_whole(workdir / export.PROMPTS, prompts.lines(chosen))


def _run_record(experiment: Experiment) -> dict[str, Any]:
  """run.json: what the run's numbers depend on, its frozen split included."""
  split = experiment.split
  return {
    'facts': experiment.facts,
    'versions': commits.versions(),
    'base': basedir.identity(
      experiment.base_dir, experiment.config.model.path, experiment.revision
    ),
    'split': {
      name: {
        'n': len(rows),
        'digest': split_lib.digest(rows),
        'rows': rows.wheres(),
      }
      for name, rows in (('dev', split.dev), ('test', split.test))
    },
  }


def check_frozen(
  experiment: Experiment, workdir: pathlib.Path, side: str
) -> None:
  """Raises ValueError where the rows of a split are not those of run.json.

  A workdir without a run has nothing to hold to.
  """
  path = workdir / 'run.json'
  if not path.is_file():
    return
  try:
    then = json.loads(path.read_text(encoding='utf-8'))['split'][side]
    known, digest = then['n'], then['digest']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} does not say which rows are the {side} split: '
      f'{type(error).__name__} {error}; run the training once more, which '
      'writes it.'
    ) from error
  rows = getattr(experiment.split, side)
  if digest != (now := split_lib.digest(rows)):
    raise ValueError(
      f'the {side} split is not the one that {path} froze: {known} rows of '
      f'digest {digest[:12]} then, {len(rows)} of {now[:12]} now. Scores on '
      'other rows do not compare; give the config and the data that the run '
      f'was trained with: {workdir}/config.json.'
    )


def _write_check(experiment: Experiment, workdir: pathlib.Path) -> None:
  """The record of the data, unless check has left a fuller one of the same."""
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


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  rundir.write_whole(path, json.dumps(value, indent=2) + '\n')
