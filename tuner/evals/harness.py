"""Tasks of EleutherAI's lm-eval, run on a policy, and their results as a file.

The library is optional: pip install 'tuner[harness]'; it needs no torch for
this. Tasks that run generated code are refused, and no code of a data set is
run: the library's loader of data sets knows none. A task's own YAML may name
Python functions beside it, so include_path is as trusted as any program.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from tuner import rundir
from tuner.models import policy

RESAMPLES = 1000  # For the standard error of what is no mean over rows.
Results = dict[str, dict[str, dict[str, Any]]]


def run(
  runner: policy.Policy,
  tokenizer: Any,
  stop_ids: Sequence[int],
  tasks: Sequence[str],
  include_path: str | os.PathLike | None = None,
  limit: int | None = None,
  fewshot: int | None = None,
  is_chat: bool = False,
  rows: int = 8,
  tokens: int = 1024,
  folder: pathlib.Path | None = None,
  suite: str = 'harness',
) -> Results:
  """{task: {metric: {'value', 'stderr', 'n'}}} of the named tasks and groups.

  A metric of a filter other than 'none' is 'metric,filter'. stderr is None
  where lm-eval gives none; a value that JSON has not is 'nan' or 'inf'.

  Args:
    tasks: names, or patterns such as 'mmlu_*'.
    include_path: a folder of the user's own tasks.
    limit: examples of each task, from the first; None: all.
    fewshot: examples in the prompt; None: as each task says.
    is_chat: whether prompts are put into the tokenizer's chat template.
    rows, tokens: of a batch.
    folder: where <suite>.json is written, and <suite>.predictions.jsonl, the
      score of every example; None: nowhere.

  Raises:
    ValueError: lm-eval is not installed, an unknown task, one that runs
      generated code, or one whose data is neither here nor to be had.
  """
  library = load()
  for name, value, least in (('limit', limit, 1), ('fewshot', fewshot, 0)):
    if value is not None and (type(value) is not int or value < least):
      raise ValueError(
        f'{name} is {value!r}; wanted: a number of examples, from {least}'
      )
  loaded = _tasks(library, tasks, include_path)
  for task in loaded['tasks'].values():
    _set_fewshot(library, task, fewshot)
  model = library.Model(runner, tokenizer, stop_ids, rows, tokens)
  with _as_lm_eval(library):
    found = library.evaluator.evaluate(
      model,
      loaded,
      limit=limit,
      bootstrap_iters=RESAMPLES,
      apply_chat_template=is_chat,
      fewshot_as_multiturn=is_chat,
      confirm_run_unsafe_code=False,
    )
  results = _results(found)
  if folder is not None:
    write(folder, suite, results, found, model.truncated)
  return results


def load() -> Any:
  """The library's parts, with our model. Raises ValueError: not installed."""
  try:
    return importlib.import_module('tuner.evals.harness_model')
  except ImportError as error:
    raise ValueError(
      f'tasks of lm-eval need the package ({error}): pip install '
      "'tuner[harness]'"
    ) from error


def check(
  tasks: Sequence[str], include_path: str | os.PathLike | None = None
) -> None:
  """Raises ValueError for names of no task, before a model is loaded."""
  _named(load(), tasks, include_path)


def _tasks(library, names, include_path):
  """What lm-eval knows by these names, its data read. Raises ValueError."""
  manager, chosen = _named(library, names, include_path)
  try:
    try:
      return manager.load(chosen)
    except KeyError:  # A group of the user's that holds the library's tasks.
      return _manager(library, include_path, True).load(chosen)
  except Exception as error:  # Libraries raise anything for data not there.
    raise ValueError(
      f'{", ".join(chosen)}: the task or its data cannot be loaded: '
      f'{str(error)[:300]} ({type(error).__name__}). Data that is not on this '
      'machine is fetched from the hub, which needs a network.'
    ) from error


def _named(library, names, include_path):
  """(a manager that knows the tasks, their names). Raises ValueError."""
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise ValueError(
      f'include_path: {include_path} is not a directory; wanted: a folder of '
      'task files (.yaml)'
    )
  if include_path is not None:
    own = _manager(library, include_path, False)
    if all(own.match_tasks([name]) for name in names):
      return own, _chosen(own, names)
  manager = _manager(library, include_path, True)
  return manager, _chosen(manager, names)


def _chosen(manager, names) -> list[str]:
  chosen: list[str] = []
  for name in names:
    matched = manager.match_tasks([name])
    if not matched:
      near = difflib.get_close_matches(name, manager.all_tasks, 3)
      hint = f'; did you mean {" or ".join(near)}?' if near else ''
      raise ValueError(f'lm-eval has no task {name!r}{hint}')
    chosen += [own for own in matched if own not in chosen]
  if not chosen:
    raise ValueError('no task is named; wanted: one at least')
  return chosen


@functools.cache
def _manager(library, include_path, include_defaults):
  """Knows the task files; reading all of the library's takes seconds."""
  return library.tasks.TaskManager(
    include_path=include_path, include_defaults=include_defaults
  )


def _set_fewshot(library, task, fewshot):
  """As lm-eval's own command does: a task that says 0 keeps it."""
  own = task.get_config('num_fewshot')
  if own is None or (fewshot is not None and own != 0):
    task.set_config(key='num_fewshot', value=fewshot or 0)
  task.set_fewshot_seed(seed=library.defaults.DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _as_lm_eval(library):
  """lm-eval's own seeds, for tasks that draw, and no process forked.

  A fork of a program that has started JAX hangs.
  """
  drawn, name = random.getstate(), 'DISABLE_MULTIPROC'
  before = os.environ.get(name)
  random.seed(library.defaults.DEFAULT_RANDOM_SEED)
  os.environ[name] = '1'
  try:
    yield
  finally:
    random.setstate(drawn)
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before


def _results(found) -> Results:
  """The library's results by task and metric; groups after their tasks."""
  results: Results = {}
  for task, own in found['results'].items():
    n = sum(
      found['n-samples'][name]['effective'] for name in _leaves(found, task)
    )
    results[task] = {}
    for key, value in own.items():
      metric, comma, chosen = key.partition(',')
      if not comma or metric.endswith('_stderr'):
        continue
      stderr = own.get(f'{metric}_stderr,{chosen}')
      results[task][metric if chosen == 'none' else key] = {
        'value': float(value) if math.isfinite(value) else str(value),
        'stderr': float(stderr) if _is_number(stderr) else None,
        'n': n,
      }
  return results


def _leaves(found, name):
  """The tasks of a group, of its groups too; of a task itself."""
  inner = found['group_subtasks'].get(name)
  if not inner:
    return [name]
  return [leaf for one in inner for leaf in _leaves(found, one)]


def write(
  folder: pathlib.Path,
  suite: str,
  results: Results,
  found: Mapping[str, Any],
  truncated: int,
) -> None:
  """Writes <suite>.predictions.jsonl, then <suite>.json, each as a whole.

  found: what lm-eval's evaluator returns. truncated: pairs and prompts that
  lost their left end. A line of predictions has an id, 'task/example' (and
  ',filter'), the example's scores and what the model answered: a text, or log p
  and whether it is greedy of each choice.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for task, samples in found['samples'].items():
    for one in samples:
      chosen = '' if one['filter'] == 'none' else f',{one["filter"]}'
      scores = {m: float(one[m]) for m in one['metrics'] if _is_number(one[m])}
      line = {
        'id': f'{task}/{one["doc_id"]}{chosen}',
        'scores': scores,
        'answers': one['filtered_resps'],
      }
      lines.append(json.dumps(line, ensure_ascii=False) + '\n')
  rundir.write_whole(folder / f'{suite}.predictions.jsonl', ''.join(lines))
  written = {
    'suite': suite,
    'library': f'lm-eval {importlib.metadata.version("lm-eval")}',
    'tasks': results,
    'versions': found['versions'],
    'fewshot': found['n-shot'],
    'truncated': truncated,
  }
  text = json.dumps(written, indent=2, allow_nan=False)
  rundir.write_whole(folder / f'{suite}.json', text + '\n')


def _is_number(value):
  return isinstance(value, int | float) and math.isfinite(value)
