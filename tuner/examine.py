"""What there is to know of a config's data, as one record of JSON values.

Its keys are in tuner.report.check_text.
"""

import re
from typing import Any

import numpy as np

from tuner import batches, dataset, experiment, sections
from tuner import leaks as leaks_lib
from tuner.data import duplicates, outliers, overlap, table
from tuner.evals import generative

EXAMPLES = 3
SHOWN = 20
SOME = 8  # columns that are named
# Rows that are looked at one by one; of more, so many evenly spaced ones, and
# the record says so.
SEEN_ROWS = 200_000


def examine(
  config: sections.Config,
  data: dataset.Data,
  tokenizer,
  model=None,
  source=None,
  thorough: bool = True,
) -> dict[str, Any]:
  """The record of a config's data; its errors are what training would raise.

  model: the declared one, whose tokens and positions must hold the examples.
  source: of the batches, where it is made already.
  thorough: rows are also compared with each other text by text; training does
  without that, and its record says 'not looked at'.
  """
  examples, train = data.examples, data.split.train
  errors = data.faults
  record: dict[str, Any] = {
    'config': '',
    'thorough': thorough,
    'data': examples.fingerprint,
    'model': config.model.path,
    'files': data.rows.files,
    'rows': {
      name: len(rows)
      for name, rows in zip(data.split._fields, data.split, strict=True)
    },
    'warnings': warnings(config, data),
    'examples': [],
    'estimate': None,
    'duplicates': _duplicates(train, thorough),
    'leaks': _leaks(data, thorough),
    'conflicts': _conflicts(train),
    'overlap': _overlap(config, train) if thorough else None,
    'outliers': None,
    **dict.fromkeys(('lengths', 'loss', 'packing', 'sources')),
  }
  _check_model(data, model, errors)
  if thorough:  # Training does so where it measures.
    _check_metrics(config, data, errors)
  if len(examples):
    record |= _tokens(config, data, source, errors)
    record['examples'] = [
      describe_tokens(data, tokenizer, i)
      for i in outliers.sample(len(examples), EXAMPLES).tolist()
    ]
    if thorough:
      record['outliers'] = _outliers(train, examples)
  if any('lost this text' in text for _, text in errors.found):
    record['warnings'].append(
      "config.data.template='chatml' is a template that keeps tools and "
      'reasoning'
    )
  record['errors'] = {
    'count': len(errors),
    'shown': errors.lines()[:SHOWN],
    'alike': _alike(errors),
  }
  return record


def _check_model(data, model, errors) -> None:
  """Adds a fault for examples that the model cannot take."""
  try:
    if model is not None:
      experiment.check_examples(data.examples, model)
  except ValueError as error:
    errors.add('config.model', str(error))


def _check_metrics(config, data, errors) -> None:
  """Adds a fault for the first reference that a metric cannot score."""
  answered = data.split.test if config.evaluate.test == 'end' else ()
  for name, metric in generative.find(config.evaluate.metrics).items():
    for row in answered:
      try:
        if row.kind == 'chat' and row.reference:
          metric.check(row.reference, row)
      except ValueError as error:
        errors.add(row.where, f'config.evaluate.metrics: {name}: {error}')
        break


def _alike(errors) -> list[list[Any]]:
  """[how many, the first of them], errors that differ in numbers made one."""
  found: dict[str, list[Any]] = {}
  for where, text in errors.found:
    reason = re.sub(r"\S*\d\S*|'[^']*'", '#', text)
    found.setdefault(reason, [0, f'{where}: {text}'])[0] += 1
  return sorted(found.values(), key=lambda pair: -pair[0])[:SHOWN]


def _tokens(config, data, source, errors) -> dict[str, Any]:
  """Lengths, what is trained, and how it is packed."""
  examples = data.examples
  found: dict[str, Any] = {
    'lengths': outliers.distribution(examples.lengths),
    'loss': {
      'trained': examples.trained_tokens,
      'total': len(examples.tokens),
      'what': dataset.trained_text(config),
    },
  }
  if config.data.access == 'stream':  # Nobody knows its end.
    return found
  try:
    if source is None:
      source = batches.source(config, data)
    total_steps = config.train.total(source.rows_per_epoch / source.rows)
  except ValueError as error:
    errors.add('config', str(error))
    return found
  per_epoch = source.rows_per_epoch / source.rows  # steps
  epoch = batches.epoch(config, data, source)
  found['packing'] = {
    'layout': config.batch.layout,
    'rows': source.rows_per_epoch,
    'tokens': source.tokens,
    'fill': source.fill,
    'steps_per_epoch': source.steps_per_epoch,
    'examples_per_step': epoch['examples'] / per_epoch,
    'tokens_per_step': epoch['tokens'] / per_epoch,
    'trained_per_step': epoch['trained'] / per_epoch,
    'total_steps': total_steps,
  }
  found['sources'] = epoch['sources']
  return found


def warnings(config: sections.Config, data: dataset.Data) -> list[str]:
  """What does not stop a run, and its owner should know."""
  examples, most = data.examples, dataset.limit(config)
  counts = {
    'held-out rows that leaked were moved': data.moved,
    'held-out rows have the prompt of another side, and stay (leaks=keep): '
    'their scores tell of memory': len(data.leaks)
    if config.data.leaks == 'keep'
    else 0,
    f'rows are left out: longer than {most} tokens (too_long=drop)':
    examples.dropped,
    'rows of weight 0 are left out': examples.weightless,
    f'of the oldest messages are left out, so that {most} tokens hold the rest '
    '(truncate_prompt)': examples.left_out,
    'conversations became an example for each turn: the template renders '
    'earlier turns otherwise when more follow': examples.by_turn,
  }  # fmt: skip
  found = _unread(data.rows.extra)
  found += [f'{count:,} {text}' for text, count in counts.items() if count]
  if config.data.access == 'stream':
    found.append(f'a stream: its first {len(data.split.train):,} rows are here')
  for side in ('dev', 'test'):
    if not len(getattr(data.split, side)):
      found.append(f'no {side} rows are held out')
  return found


def _unread(extra) -> list[str]:
  """A line for each column that is not read, or one for many."""
  names = [name for name, _ in extra.most_common()]
  if len(names) > SOME:
    listed = ', '.join(map(repr, names[:SOME]))
    return [f'{len(names):,} columns are not read: {listed}, ...']
  return [
    f'column {name!r} of {extra[name]:,} rows is not read' for name in names
  ]


def _pairs(rows, groups) -> list[list[str]]:
  """Where the rows of the first groups stand, two or more of each."""
  return [
    [rows.where(i) for i in group[:4].tolist()] for group in groups[:SHOWN]
  ]


def _grouped(rows, groups) -> dict[str, Any]:
  return {
    'groups': len(groups),
    'rows': sum(len(group) - 1 for group in groups),
    'shown': _pairs(rows, groups),
  }


def _duplicates(train, thorough) -> dict[str, Any]:
  """Training rows that say the same as an earlier one; `rows` of them."""
  exact = duplicates.groups(train.column('exact'))
  said = duplicates.both(train.column('input'), train.column('output'))
  normalised = duplicates.groups(said)
  found: dict[str, Any] = {
    'exact': _grouped(train, exact),
    'normalised': _grouped(train, normalised),
    'near': None,
  }
  if thorough:
    seen = leaks_lib.some(np.arange(len(train)))
    texts = (duplicates.text_of(train[i]) for i in seen.tolist())
    groups: dict[int, list[int]] = {}
    for first, i, _ in duplicates.near(texts):
      groups.setdefault(first, [first]).append(i)
    near = [seen[np.array(group)] for group in groups.values()]
    found['near'] = {**_grouped(train, near), 'of': len(seen)}
  return found


def _conflicts(train) -> dict[str, Any]:
  found = duplicates.conflicts(train.column('input'), train.column('output'))
  return {
    'groups': len(found),
    'rows': sum(map(len, found)),
    'shown': _pairs(train, found),
  }


def _leaks(data, thorough) -> dict[str, Any] | None:
  """Held-out rows that are in the training rows, too."""
  train, held = (np.flatnonzero(data.sides == 0), np.flatnonzero(data.sides))
  if not (len(train) and len(held)):
    return None
  leaks, of = list(data.leaks), None
  if thorough:
    known = {leak['held'] for leak in leaks}
    some = leaks_lib.some(train), leaks_lib.some(held)
    found = leaks_lib.near(data.rows, *some, dataset.cache_dir() / 'near')
    leaks += [leak for leak in found if leak['held'] not in known]
    of = (
      [*map(len, some)]
      if len(train) + len(held) > sum(map(len, some))
      else None
    )
  counts = {
    kind: sum(leak['kind'] == kind for leak in leaks)
    for kind in ('exact', 'normalised', 'near')
  }
  where = data.rows.where
  shown = [
    {
      'kind': leak['kind'],
      'held': where(leak['held']),
      'train': where(leak['train']),
      'similarity': round(leak['similarity'], 3),
    }
    for leak in leaks[:SHOWN]
  ]
  return {**counts, 'near': counts['near'] if thorough else None, 'of': of,
          'shown': shown}  # fmt: skip


def _overlap(config, train) -> dict[str, Any] | None:
  """Training rows that share runs of words with benchmark files."""
  if not config.data.benchmarks:
    return None
  found = {}
  for path in config.data.benchmarks:
    items = table.read_all([table.Spec((path,))])
    items.faults.raise_any(f'config.data.benchmarks: {path} cannot be read')
    texts = [duplicates.text_of(row) for row in items]
    hits = overlap.overlap((duplicates.text_of(row) for row in train), texts)
    shown = [
      {'where': train.where(row), 'item': items.where(item), 'shared': shared}
      for row, item, shared in hits[:SHOWN]
    ]
    found[path] = {'rows': len({row for row, _, _ in hits}), 'shown': shown}
  return found


def _outliers(train, examples) -> dict[str, Any]:
  """Rows worth a look, by length, by answer and by language."""

  def placed(record):
    where = examples.where[record['row']]
    return {'where': where, 'tokens': record['value']}

  seen = outliers.sample(len(train), SEEN_ROWS).tolist()
  answers = outliers.answers(outliers.answer_of(train[i]) for i in seen)
  found: dict[str, Any] = {
    'longest': [placed(r) for r in outliers.longest(examples.lengths)],
    'shortest': [placed(r) for r in outliers.shortest(examples.lengths)],
    'loss': None,
    'of': len(seen),
  }
  for name, part in answers.items():
    found[name] = {
      'count': part['count'],
      'shown': [
        {**r, 'where': train.where(seen[r['row']])} for r in part['shown']
      ],
    }
  few = outliers.sample(len(train)).tolist()
  texts = (duplicates.text_of(train[i]) for i in few)
  found['languages'] = outliers.languages(texts)
  return found


def describe_tokens(data, tokenizer, i: int):
  """Example i token by token, as the record has it."""
  examples = data.examples
  own = slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
  ids = examples.tokens[own].tolist()
  special = {
    k for k, token in tokenizer.added_tokens_decoder.items() if token.special
  }
  tokens = [
    [_token_text(tokenizer, k), int(trained), int(k in special)]
    for k, trained in zip(ids, examples.mask[own].tolist(), strict=True)
  ]
  kind = data.split.train[examples.row[i]].kind
  return {'where': examples.where[i], 'kind': kind, 'tokens': tokens}


def _token_text(tokenizer, i):
  """The token's text, or its symbol where it is a part of a character."""
  text = tokenizer.decode([i], skip_special_tokens=False)
  return tokenizer.convert_ids_to_tokens(i) if '\ufffd' in text else text
