"""The sections of a config: each a record whose fields are its keys.

`read` turns a ConfigDict into a `Config`. Fields hold the defaults; an unknown
key is refused with the nearest name. Sections that name a function (adapt,
objective, optimizer, schedule) stay dicts here, and are bound where that
function is (tuner.named).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

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
  """every: steps between saves, beside the last; 0: only the last."""

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

  writers: tuple[str, ...] = ('jsonl', 'tensorboard')


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
  values = named.fill(_sections, config, where='config').resolved
  for name, record in RECORDS.items():
    section = named.fill(record, values[name], where=f'config.{name}')
    values[name] = section()
  return _checked(Config(**values))


def _sections(
  model: Mapping,
  data: Mapping,
  batch: Mapping,
  train: Mapping,
  adapt: Mapping,
  optimizer: Mapping,
  schedule: Mapping,
  objective: Mapping = {'name': 'sft'},
  seed: int = 0,
  evaluate: Mapping = {},
  checkpoint: Mapping = {},
  export: Mapping = {},
  mesh: Mapping = {},
  log: Mapping = {},
):
  """The signature of a config file's ConfigDict."""


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
  for key, least in AT_LEAST.items():
    section, field = key.split('.')
    value = getattr(getattr(config, section), field)
    if value < least:
      raise ValueError(f'config.{key}: {value}; it must be at least {least}.')
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
  return config
