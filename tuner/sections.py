"""The sections of a config: each a record whose fields are its keys.

`read` turns a ConfigDict into a `Config`. Fields hold the defaults; an unknown
key is refused with the nearest name. Sections that name a function (adapt,
objective, optimizer, schedule) stay dicts here, and are bound where that
function is (tuner.named).
"""

import dataclasses
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_collections

from tuner import named

Dtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True)
class Model:
  """path: a Hugging Face directory or hub id; revision: of the hub.

  dtype: of the computation and of frozen weights; master: of what trains.
  remat: 'none', 'dots', 'full'. head_chunk: tokens a row that meet the head
  at a time.
  """

  path: str
  revision: str | None = None
  dtype: Dtype = 'float32'
  master: Dtype = 'float32'
  remat: Literal['none', 'dots', 'full'] = 'none'
  head_chunk: int = 128


@dataclasses.dataclass(frozen=True)
class Data:
  """path: JSONL files; system: put before rows without a system message.

  test, dev: fractions held out by a hash of the prompt; ignore: a regular
  expression for what that hash leaves out. too_long: 'error' or 'drop'.
  """

  path: str | tuple[str, ...]
  system: str | None = None
  max_tokens: int = 1024
  too_long: Literal['error', 'drop'] = 'error'
  test: float = 0.1
  dev: float = 0.0
  ignore: str | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
  """rows of `tokens` tokens a step, on all devices, in `accumulate` parts."""

  rows: int
  tokens: int
  accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Train:
  """steps: a number, or passes over the data: '3 epochs'."""

  steps: int | str
  clip_norm: float | None = 1.0

  def total(self, steps_per_epoch: float) -> int:
    """Steps of the whole run. Raises ValueError."""
    match = re.fullmatch(r'(\d+)|(\d+(?:\.\d+)?) epochs?', str(self.steps))
    if not match:
      raise ValueError(
        f'config.train.steps: {self.steps!r}; wanted a number of steps or '
        "'2 epochs'."
      )
    passes = float(match[2] or 0)
    total = int(match[1] or math.ceil(passes * steps_per_epoch))
    if total < 1:
      raise ValueError(f'config.train.steps: {self.steps!r}; at least 1.')
    return total


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """What is measured on held-out rows.

  metrics: of tuner.evals.metrics, or dotted names, on greedy answers of at
  most max_tokens; () generates nothing. rows: prompts decoded at a time.
  every: steps between measurements on the dev split (its loss, and the metrics
  on its first dev_answers rows); 0: never. base: the untuned model on the same
  rows, too. test: 'end' measures on the test split, base before training and
  tuned after it; 'never' leaves it unread.
  """

  metrics: tuple[str, ...] = ('exact',)
  max_tokens: int = 256
  rows: int = 64
  every: int = 0
  dev_answers: int = 32
  base: bool = True
  test: Literal['end', 'never'] = 'end'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """every: steps between saves, beside the last; 0: only the last.

  keep_last newest saves are kept, and keep_best by the loss on the dev split.
  What is measured and exported in the end is the last step.
  """

  every: int = 0
  keep_last: int = 2
  keep_best: int = 0


@dataclasses.dataclass(frozen=True)
class Export:
  """formats: 'adapter' (PEFT) and 'model' (merged, Hugging Face)."""

  formats: tuple[Literal['adapter', 'model'], ...] = ('adapter', 'model')


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; -1: what is left. See tuner.mesh.

  devices: how many of those here are used; None: all.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  devices: int | None = None


@dataclasses.dataclass(frozen=True)
class Log:
  """writers: 'jsonl', 'tensorboard', 'wandb', 'trackio'."""

  writers: tuple[Literal['jsonl', 'tensorboard', 'wandb', 'trackio'], ...] = (
    'jsonl',
    'tensorboard',
  )


RECORDS = {
  'model': Model,
  'data': Data,
  'batch': Batch,
  'train': Train,
  'evaluate': Evaluate,
  'checkpoint': Checkpoint,
  'export': Export,
  'mesh': Mesh,
  'log': Log,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A checked config. The dict sections name a function each."""

  model: Model
  data: Data
  batch: Batch
  train: Train
  adapt: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  schedule: Mapping[str, Any]
  objective: Mapping[str, Any]
  seed: int
  evaluate: Evaluate
  checkpoint: Checkpoint
  export: Export
  mesh: Mesh
  log: Log

  def resolved(self) -> dict[str, Any]:
    """Every section as a dict, defaults filled in."""
    return dataclasses.asdict(self)


def read(config: Mapping[str, Any]) -> Config:
  """The config, checked key by key. Raises ValueError naming the key."""
  values = named.fill(get_config, config, where='config').resolved
  values['objective'] = values['objective'] or {'name': 'sft'}
  for name, record in RECORDS.items():
    section = named.fill(record, values[name] or {}, where=f'config.{name}')
    values[name] = section()
  return _checked(Config(**values))


def get_config(
  model,
  data,
  batch,
  train,
  adapt,
  optimizer,
  schedule,
  objective=None,
  seed: int = 0,
  evaluate=None,
  checkpoint=None,
  export=None,
  mesh=None,
  log=None,
):
  """The sections of a config; None: with their defaults."""


def complete(get: Callable[..., Any]) -> Callable[..., Any]:
  """`get`, its ConfigDict with an empty one for every section left out."""

  def complete_get(*args):
    config = get(*args)
    if isinstance(config, ml_collections.ConfigDict):
      for name, parameter in inspect.signature(get_config).parameters.items():
        if parameter.default is None and name not in config:
          config[name] = type(config)()
    return config

  return complete_get


AT_LEAST = {
  'data.max_tokens': 1,
  'batch.rows': 1,
  'batch.tokens': 1,
  'batch.accumulate': 1,
  'evaluate.max_tokens': 1,
  'evaluate.rows': 1,
  'evaluate.every': 0,
  'evaluate.dev_answers': 0,
  'checkpoint.every': 0,
  'checkpoint.keep_last': 1,
  'checkpoint.keep_best': 0,
  'model.head_chunk': 1,
}


def _checked(config: Config) -> Config:
  _check_ranges(config)
  batch, writers = config.batch, config.log.writers
  if batch.rows % batch.accumulate:
    raise ValueError(
      f'config.batch.rows: {batch.rows}; it must be a multiple of '
      f'config.batch.accumulate, which is {batch.accumulate}.'
    )
  saves, measures = config.checkpoint.every, config.evaluate.every
  if (
    config.checkpoint.keep_best and measures and (not saves or saves % measures)
  ):
    raise ValueError(
      f'config.checkpoint.keep_best: a save at every {saves} steps has no dev '
      f'loss to be ranked by, measured every {measures}; make '
      'config.checkpoint.every a multiple of config.evaluate.every.'
    )
  if config.checkpoint.keep_best and not config.evaluate.every:
    raise ValueError(
      'config.checkpoint.keep_best: the best is by the loss on the dev split; '
      'set config.evaluate.every and config.data.dev.'
    )
  if config.evaluate.every and not config.data.dev:
    raise ValueError(
      f'config.evaluate.every: {config.evaluate.every}, but config.data.dev is '
      '0: hold out a dev split, such as 0.05. The test split is for the end.'
    )
  for name in {'wandb', 'trackio'}.intersection(writers):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"config.log.writers: {name!r} is not installed: pip install '"
        f"tuner[{name}]', or leave it out."
      )
  return config


def _check_ranges(config: Config) -> None:
  for key, value in _numbers(config.resolved(), 'config'):
    if not math.isfinite(value):
      raise ValueError(f'{key}: {value}; it must be a finite number.')
  for key, least in AT_LEAST.items():
    section, field = key.split('.')
    value = getattr(getattr(config, section), field)
    if value < least:
      raise ValueError(f'config.{key}: {value}; it must be at least {least}.')
  for key in ('test', 'dev'):
    value = getattr(config.data, key)
    if not 0 <= value < 1:
      raise ValueError(f'config.data.{key}: {value}; it must be in [0, 1).')
  norm = config.train.clip_norm
  if norm is not None and norm <= 0:
    raise ValueError(
      f'config.train.clip_norm: {norm}; it must be above 0, or None.'
    )
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'config.seed: {config.seed}; it must be in [0, 2^32).')


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
  """(key, number) of every number in nested dicts."""
  if isinstance(value, Mapping):
    for name, inner in value.items():
      yield from _numbers(inner, f'{key}.{name}')
  elif isinstance(value, int | float):
    yield key, value
