"""A config's data: read, split, rendered, masked and packed.

Training and `check` come through here, so what is checked is what is trained
on. Nothing here needs a device or a weight.
"""

import dataclasses
import glob
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from tuner import leaks as leaks_lib
from tuner import named, sections
from tuner.data import chat, files, store, table, template
from tuner.data import rows as rows_lib
from tuner.data import split as split_lib

PEEK = 4096  # rows of a stream that are looked at before it is trained on
TRAINED = ('chat', 'text')  # kinds of rows that an objective of ours takes


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows read and split, and the training rows as tokens.

  faults: of rows that are not among `examples`, and held-out rows that may not
  be there. leaks: held-out rows that are in the training rows, too, with
  'held' and 'train' as indices into `rows`; `moved` of them are training rows
  now.
  """

  rows: store.Table
  sides: np.ndarray  # int8 [rows], split.TRAIN, DEV or TEST
  split: split_lib.Split
  examples: chat.Examples
  faults: rows_lib.Faults
  leaks: list[dict[str, Any]]
  moved: int


def cache_dir() -> pathlib.Path:
  """Where data is kept once read: $TUNER_CACHE or ~/.cache/tuner."""
  home = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
  return pathlib.Path(home).expanduser()


def load_tokenizer(config: sections.Config, path: pathlib.Path):
  """(tokenizer with config.data's template, ids that end a turn)."""
  data = config.data
  tokenizer = template.load_tokenizer(path, data.template, data.template_args)
  return tokenizer, template.stop_ids(path, tokenizer)


def load(config: sections.Config, tokenizer, stop_ids) -> Data:
  """The data of a config. Look at its `faults`: no row raises anything.

  Held-out rows are encoded, too, for what is wrong with them. Of a stream, the
  first rows are there.
  """
  faults = rows_lib.Faults()
  rows, sides = read(config, faults)
  sides, leaks, moved = leaks_lib.settle(
    config.data, rows, sides, faults, cache_dir() / 'near'
  )
  split = split_lib.Split(
    *(rows.take(np.flatnonzero(sides == side)) for side in range(3))
  )
  check_kinds(rows, faults)
  examples, *_ = [
    encode(config, side, tokenizer, stop_ids, faults)
    if len(side)
    else chat.no_examples()
    for side in split
  ]
  _check_sources(config, split.train, examples, faults)
  return Data(rows, sides, split, examples, faults, leaks, moved)


def _check_sources(config, train, examples, faults) -> None:
  """Adds a fault for a source without rows to train on."""
  if not len(examples) and not len(faults):
    faults.add('config.data', 'no row is left to train on; wanted: one or more')
  part_of = train.part_of[examples.row]
  for i, name in enumerate(config.data.named_sources()):
    if len(examples) and not (part_of == i).any():
      faults.add(
        f'config.data.sources.{name}',
        'none of its rows is left to train on; wanted: one or more',
      )


def read(
  config: sections.Config, faults: rows_lib.Faults
) -> tuple[store.Table, np.ndarray]:
  """(every row of config.data that can be read, the side of each)."""
  data = config.data
  training = [
    _spec(data, source, name, source.path)
    for name, source in data.named_sources().items()
  ]
  held_out = [
    _spec(data, data, side, paths)
    for side in ('dev', 'test')
    if (paths := data.held_out(side))
  ]
  if data.access == 'stream':
    first = _first_rows(training[0], faults)
    rest = table.read_all(held_out, cache_dir() / 'rows')
    rows = store.Table([*first.parts, *rest.parts])
  else:
    rows = table.read_all([*training, *held_out], cache_dir() / 'rows')
  faults.found += rows.faults.found
  rows = rows.take(rows.of_whole_files())
  _check_carry(data.carry, rows, faults)
  part_of, places = rows.part_of, rows.column('place')
  sides = np.zeros(len(rows), np.int8)
  for i, (name, source) in enumerate(data.named_sources().items()):
    own = part_of == i
    key = f'config.data.sources.{name}' if data.sources else 'config.data'
    try:
      if own.any():
        sides[own] = split_lib.split(places[own], source.test, source.dev, key)
    except ValueError as error:
      faults.add(*str(error).split(': ', 1))
  for i, spec in enumerate(held_out, len(training)):
    sides[part_of == i] = getattr(split_lib, spec.name.upper())
  return rows, sides


def _check_carry(names, rows, faults) -> None:
  """Adds a fault for each column of config.data.carry that no row has."""
  _, first = np.unique(rows.part_of, return_index=True)
  missing, others = set(names), set[str]()
  for i in itertools.chain(first.tolist(), range(len(rows))):
    if not missing:
      return
    row = rows[i]
    missing.difference_update(row.carried)
    others.update(row.carried, row.extra)
  for name in sorted(missing):
    hint = named.nearest(name, sorted(others)) or '.'
    faults.add(
      'config.data.carry',
      f'no row has a column {name!r}{hint} Columns that are not trained on: '
      f'{", ".join(sorted(others)) or "none"}',
    )


def stream_spec(data: sections.Data) -> table.Spec:
  """What a stream reads: its one source."""
  (source,) = data.named_sources().values()
  return _spec(data, source, 'data', source.path)


def _first_rows(spec, faults) -> store.Table:
  """The first rows of a stream, up to the first that is wrong."""
  rows = []
  try:
    for row in itertools.islice(table.walk(spec), PEEK):
      rows.append(row)
  except ValueError as error:
    _, found = str(error).split('\n', 1)
    where, text = found.split(': ', 1)
    faults.add(where, text)
  return store.from_rows(rows, spec.ignore)


def limit(config: sections.Config) -> int:
  """The most tokens that an example may have."""
  return min(config.data.max_tokens, config.batch.tokens)


def encode(
  config, rows, tokenizer, stop_ids, faults=None, is_kept=True
) -> chat.Examples:
  """The rows as tokens, as config.data says. See chat.encode."""
  data = config.data
  return chat.encode(
    rows,
    tokenizer,
    stop_ids,
    limit(config),
    data.too_long,
    data.loss,
    data.long_text,
    cache_dir() / 'tokens' if is_kept else None,
    faults,
    None if is_kept else 0,
  )


def check_kinds(rows: store.Table, faults: rows_lib.Faults) -> None:
  """Adds a fault for each kind of row that no objective here takes."""
  kinds, first, counts = np.unique(
    rows.column('kind'), return_index=True, return_counts=True
  )
  for kind, i, count in zip(kinds, first, counts, strict=True):
    if (name := rows_lib.KINDS[kind]) not in TRAINED:
      faults.add(
        rows.where(i),
        f'row: found the kind {name!r}, which config.objective does not take '
        f'({count:,} of {len(rows):,} rows); wanted: {" or ".join(TRAINED)} '
        'rows',
      )


def _spec(data, own, name, paths) -> table.Spec:
  """What to read; raises ValueError for a path that is not there."""
  key = f'config.data.{name}' if own is data else 'config.data.path'
  if own is not data and data.sources:
    key = f'config.data.sources.{name}.path'
  paths = (paths,) if isinstance(paths, str) else tuple(paths)
  for path in paths:
    if not (glob.has_magic(path) or files.is_hub(path)):
      named.existing_path(path, key)
  columns = tuple(
    sorted(named.pairs(own.columns, 'config.data.columns').items())
  )
  return table.Spec(
    paths, own.system, own.form, columns, data.ignore, name, data.carry
  )


def trained_text(config: sections.Config) -> str:
  """What of a row is in the loss, in words."""
  return {
    'assistant': 'assistant turns and their stop tokens',
    'last': 'the last assistant turn and its stop token',
    'all': 'all tokens but the first of each example',
    'flags': "turns flagged to be trained, with assistants' stop tokens",
  }[config.data.loss]
