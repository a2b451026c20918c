"""What no type says of a config: ranges, and keys that may not meet."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuner import named

if TYPE_CHECKING:
  from tuner import sections

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
  'export.max_shard_bytes': 1,
}


MOST_EXAMPLES = 10**8  # of a source an epoch; their ids are held


def check(config: sections.Config) -> None:
  """Raises ValueError for a value, or for keys that may not meet."""
  _check_ranges(config)
  _check_data(config)
  batch, writers = config.batch, config.log.writers
  if batch.rows % batch.accumulate:
    raise ValueError(
      f'config.batch.rows: {batch.rows}; it must be a multiple of '
      f'config.batch.accumulate, which is {batch.accumulate}.'
    )
  saves, measures = config.checkpoint.every, config.evaluate.every
  is_ranked = saves % measures == 0 if saves and measures else False
  is_ranked |= not saves and config.select.metric is not None
  if config.checkpoint.keep_best and measures and not is_ranked:
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
  has_dev = any(source.dev for source in config.data.named_sources().values())
  if config.evaluate.every and not (config.data.held_out('dev') or has_dev):
    raise ValueError(
      f'config.evaluate.every: {config.evaluate.every}, but config.data.dev is '
      '0: hold out a dev split, such as 0.05. The test split is for the end.'
    )
  _check_select(config)
  if config.evaluate.constraint is not None and not config.evaluate.metrics:
    raise ValueError(
      f'config.evaluate.constraint: {dict(config.evaluate.constraint)!r}, but '
      'config.evaluate.metrics is empty, so that nothing is generated; name a '
      'metric, or leave the constraint out.'
    )
  for name in {'wandb', 'trackio'}.intersection(writers):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"config.log.writers: {name!r} is not installed: pip install '"
        f"tuner[{name}]', or leave it out."
      )
  if 'gguf' in config.export.formats and not importlib.util.find_spec('gguf'):
    raise ValueError(
      "config.export.formats: 'gguf' is not installed: pip install "
      "'tuner[gguf]', or leave it out."
    )


def _check_ranges(config: sections.Config) -> None:
  for key, value in _numbers(config.resolved(), 'config'):
    if not math.isfinite(value):
      raise ValueError(f'{key}: {value}; it must be a finite number.')
  for key, least in AT_LEAST.items():
    section, field = key.split('.')
    value = getattr(getattr(config, section), field)
    if value < least:
      raise ValueError(f'config.{key}: {value}; it must be at least {least}.')
  if not 0 <= config.retention.share <= 1:
    raise ValueError(
      f'config.retention.share: {config.retention.share}; it must be in [0, 1].'
    )
  norm = config.train.clip_norm
  if norm is not None and norm <= 0:
    raise ValueError(
      f'config.train.clip_norm: {norm}; it must be above 0, or None.'
    )
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'config.seed: {config.seed}; it must be in [0, 2^32).')


def _check_select(config: sections.Config) -> None:
  """What a choice among checkpoints needs to be measured."""
  own, measured = config.select, config.evaluate
  if own.patience is not None and own.patience < 1:
    raise ValueError(
      f'config.select.patience: {own.patience}; it must be at least 1, or None.'
    )
  bound = own.max_nats_increase
  if bound is not None and bound < 0:
    raise ValueError(
      f'config.select.max_nats_increase: {bound}; it must be at least 0, or '
      'None.'
    )
  if own.metric is None:
    for key in ('max_nats_increase', 'patience'):
      if (value := getattr(own, key)) is not None:
        raise ValueError(
          f'config.select.{key}: {value}, but config.select.metric names '
          'nothing to choose by, such as '
          f'{(*metric_names(measured.metrics), "nats_per_token")[0]!r}.'
        )
    return
  if not measured.every:
    raise ValueError(
      f'config.select.metric: {own.metric!r} is compared over the steps on the '
      'dev split; set config.evaluate.every and config.data.dev.'
    )
  _check_metric(own.metric, measured)
  if bound is not None and not config.retention.share:
    raise ValueError(
      f'config.select.max_nats_increase: {bound}, but config.retention.share '
      'is 0, so that no general text is measured; make it 0.1, or leave the '
      'bound out.'
    )


def _check_metric(metric: str, measured: sections.Evaluate) -> None:
  known = (*metric_names(measured.metrics), 'stopped', 'nats_per_token')
  if not measured.metrics:
    known = known[-1:]
  if metric not in known:
    raise ValueError(
      f'config.select.metric: {metric!r} is not measured'
      f'{named.nearest(metric, known) or "."} There are {", ".join(known)} '
      '(config.evaluate.metrics).'
    )
  if metric != 'nats_per_token' and not measured.dev_answers:
    raise ValueError(
      f'config.select.metric: {metric!r} is of answers, and '
      'config.evaluate.dev_answers is 0; make it 32 or more.'
    )


def metric_names(metrics) -> tuple[str, ...]:
  """What the scores of config.evaluate.metrics are called."""
  return tuple(
    name if isinstance(name, str) else str(name.get('called', name.get('name')))
    for name in metrics
  )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
  """(key, number) of every number in nested dicts."""
  if isinstance(value, Mapping):
    for name, inner in value.items():
      yield from _numbers(inner, f'{key}.{name}')
  elif isinstance(value, int | float):
    yield key, value


def _check_data(config: sections.Config) -> None:
  data = config.data
  if bool(data.path) == bool(data.sources):
    raise ValueError(
      f'config.data: path {data.path!r} and sources {data.sources!r}; say one '
      'of them.'
    )
  own = data.named_sources()
  for name, source in own.items():
    key = f'config.data.sources.{name}' if data.sources else 'config.data'
    named.pairs(source.columns, f'{key}.columns')
    for side in ('test', 'dev'):
      _check_side(f'{key}.{side}', getattr(source, side))
      if data.held_out(side) and data.sources and side in data.sources[name]:
        raise ValueError(
          f'{key}.{side}: config.data.{side} names files; say one of them.'
        )
    if (source.test or 0) + (source.dev or 0) >= 1:
      raise ValueError(
        f'{key}.test: {source.test} and {key}.dev: {source.dev} leave nothing '
        'to train on.'
      )
    if source.share is not None and source.count is not None:
      raise ValueError(f'{key}: share and count may not meet; say one of them.')
    if source.share is not None and not source.share > 0:
      raise ValueError(f'{key}.share: {source.share}; it must be above 0.')
    if source.count is not None and not 1 <= source.count <= MOST_EXAMPLES:
      raise ValueError(
        f'{key}.count: {source.count}; it must be in [1, {MOST_EXAMPLES}].'
      )
  shared = [name for name, source in own.items() if source.share is not None]
  if shared and len(shared) < len(own):
    raise ValueError(
      f'config.data.sources: {", ".join(shared)} have a share, '
      f'{", ".join(sorted(own.keys() - set(shared)))} none; all or none must.'
    )
  if shared and config.batch.layout != 'packed':
    raise ValueError(
      "config.batch.layout: shares are of packed rows; make it 'packed', or "
      'give counts.'
    )
  if data.access == 'stream':
    _check_stream(config)


def _check_side(key: str, value: float) -> None:
  if not 0 <= value < 1:
    raise ValueError(f'{key}: {value}; it must be in [0, 1).')


def _check_stream(config: sections.Config) -> None:
  data, train = config.data, config.train
  for side in ('test', 'dev'):
    if data.fraction(side):
      raise ValueError(
        f'config.data.{side}: {data.fraction(side)}; a stream has no fraction '
        'to hold out. Name a file, or make it 0.'
      )
  wrong = {
    'config.data.sources': bool(data.sources),
    'config.batch.layout': config.batch.layout != 'packed',
    'config.train.steps': not str(train.steps).isdecimal(),
  }
  for key, is_wrong in wrong.items():
    if is_wrong:
      raise ValueError(
        f"{key}: a stream (config.data.access='stream') has one source, packed "
        'rows, and no known end: give path, and steps as a number.'
      )
