"""The sections of a config: each a record whose fields are its keys.

`read` turns a ConfigDict into a `Config`. Fields hold the defaults; an unknown
key is refused with the nearest name. Sections that name a function (adapt,
objective, optimizer, schedule) stay dicts here, and are bound where that
function is (tuner.named).
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_collections

from tuner import named, ranges

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


Paths = str | tuple[str, ...]
Columns = str | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
  """One of several sources of training rows; None: as config.data says.

  share: of the training tokens, as a weight beside the other sources' shares.
  count: examples an epoch, fewer or more than there are; not beside a share.
  """

  path: Paths
  share: float | None = None
  count: int | None = None
  form: str | None = None
  columns: Columns | None = None
  system: str | None = None
  test: float | None = None
  dev: float | None = None


@dataclasses.dataclass(frozen=True)
class Data:
  """path: files, globs or a hub dataset; sources: several, by name, instead.

  form: of the rows, where it is not to be recognised; columns: what those of
  the files are called here, as {'prompt': 'text'} or 'prompt=text'. system:
  put before rows without a system message. template: a .jinja file or a name
  in place of the tokenizer's own; template_args go to every rendering.
  loss: on 'assistant' turns, the 'last' of them, 'all' tokens, or what the
  rows' 'flags' say. too_long: 'error', 'drop', or 'truncate_prompt', which
  leaves out the oldest turns; long_text: whether plain text may be 'split'.
  test, dev: held-out fractions by a hash of the prompt, or files; ignore: a
  regular expression for what that hash leaves out. leaks: what becomes of
  held-out rows that are in the training rows, too. exhausted: see
  tuner.data.mixture. benchmarks: files that training rows must not overlap;
  `check` looks. access: 'stream' reads on and on, for what no disk holds.
  carry: columns that metrics read beside the reference, such as 'answers'.
  """

  path: Paths | None = None
  sources: Mapping[str, Mapping[str, Any]] | None = None
  form: str | None = None
  columns: Columns | None = None
  system: str | None = None
  template: str | None = None
  template_args: Mapping[str, Any] | None = None
  loss: Literal['assistant', 'last', 'all', 'flags'] = 'assistant'
  max_tokens: int = 1024
  too_long: Literal['error', 'drop', 'truncate_prompt'] = 'error'
  long_text: Literal['error', 'split'] = 'error'
  test: float | str | tuple[str, ...] = 0.1
  dev: float | str | tuple[str, ...] = 0.0
  ignore: str | None = None
  leaks: Literal['error', 'move', 'keep'] = 'error'
  exhausted: Literal['repeat', 'stop', 'leave'] = 'repeat'
  benchmarks: tuple[str, ...] = ()
  access: Literal['indexed', 'stream'] = 'indexed'
  carry: tuple[str, ...] = ()

  def fraction(self, side: str) -> float:
    """Held out of each source by hash; 0 where files are named."""
    value = getattr(self, side)
    return value if isinstance(value, int | float) else 0.0

  def held_out(self, side: str) -> tuple[str, ...]:
    """The files that `side` names, if it names any."""
    value = getattr(self, side)
    if isinstance(value, int | float):
      return ()
    return (value,) if isinstance(value, str) else value

  def named_sources(self) -> dict[str, Source]:
    """Every source with the section's keys for those it leaves out."""
    given: Mapping[str, Any] = self.sources or {'data': {'path': self.path}}
    common = {key: getattr(self, key) for key in ('form', 'columns', 'system')}
    common |= {side: self.fraction(side) for side in ('test', 'dev')}
    return {
      name: Source(
        **common | {k: v for k, v in source.items() if v is not None}
      )
      for name, source in given.items()
    }


@dataclasses.dataclass(frozen=True)
class Batch:
  """rows of `tokens` tokens a step, on all devices, in `accumulate` parts.

  layout: 'packed' rows hold several examples; 'bucketed' ones hold one each,
  and are shorter, and more, where the examples of a step are short.
  """

  rows: int
  tokens: int
  accumulate: int = 1
  layout: Literal['packed', 'bucketed'] = 'packed'


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

  metrics: of tuner.evals.metrics, or dotted names, or dict(name=...) with
  arguments, on greedy answers of at most max_tokens; () generates nothing.
  rows: prompts decoded at a time.
  every: steps between measurements on the dev split (its loss, and the metrics
  on its first dev_answers rows); 0: never. base: the untuned model on the same
  rows, too. test: 'end' measures on the test split, base before training and
  tuned after it; 'never' leaves it unread. constraint: what answers are held
  to, as dict(kind='json_schema', path=...); see tuner.constraint.
  """

  metrics: tuple[str | Mapping[str, Any], ...] = ('exact',)
  max_tokens: int = 256
  rows: int = 64
  every: int = 0
  dev_answers: int = 32
  base: bool = True
  test: Literal['end', 'never'] = 'end'
  constraint: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Retention:
  """What is measured of general ability; see tuner.evals.retention.

  share: of the training's time that it may cost, at most; 0: not measured.
  texts: JSONL of {'text': ...}; prompts: of {'prompt': ...}; quiz: of
  {'question': ..., 'choices': [...], 'answer': index}. None: those that
  scripts/fetch_retention.py writes, where they are.
  """

  share: float = 0.1
  texts: str | None = None
  prompts: str | None = None
  quiz: str | None = None


@dataclasses.dataclass(frozen=True)
class Select:
  """Which checkpoint is measured, exported and kept; see tuner.select.

  metric: the best of the dev split's, higher is better ('nats_per_token':
  lower); None: the last step. max_nats_increase: only of checkpoints whose
  nats a token on general text rose by no more than this over the base.
  patience: measurements without a better one after which training ends; None:
  it runs to its end.
  """

  metric: str | None = None
  max_nats_increase: float | None = None
  patience: int | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """every: steps between saves, beside the last; 0: only the last.

  keep_last newest saves are kept, and keep_best by the loss on the dev split.
  What is measured and exported in the end is the last step, or the one that
  config.select chooses, which is kept beside these.
  """

  every: int = 0
  keep_last: int = 2
  keep_best: int = 0


Format = Literal['adapter', 'model', 'gguf', 'orbax']


@dataclasses.dataclass(frozen=True)
class Export:
  """What a run hands over; see docs/export.md.

  formats: 'adapter' (PEFT), 'model' (Hugging Face, merged), 'gguf' (llama.cpp,
  Ollama), 'orbax' (JAX). dtype: of the weights in 'model' and 'orbax'; None:
  config.model.dtype. gguf_dtype: of the matrices in 'gguf'. max_shard_bytes:
  of a file of 'model'.
  """

  formats: tuple[Format, ...] = ('adapter', 'model')
  dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
  gguf_dtype: Literal['f32', 'f16', 'bf16', 'q8_0'] = 'f16'
  max_shard_bytes: int = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis; -1: what is left. See tuner.mesh.

  devices: how many of those here are used; None: all.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  devices: int | None = None
  expert: int = 1


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
  'retention': Retention,
  'select': Select,
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
  retention: Retention
  select: Select
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
  for name, source in (values['data'].sources or {}).items():
    if not isinstance(source, Mapping):
      raise ValueError(
        f"config.data.sources.{name}: {source!r}; wanted dict(path='...')."
      )
    named.fill(Source, source, where=f'config.data.sources.{name}')
  checked = Config(**values)
  ranges.check(checked)
  return checked


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
  retention=None,
  select=None,
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
