"""`check`: what training would be given, told before it starts.

The terminal and the page (tuner.report) read one record, which `examine` fills
and train writes, too.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from tuner import (
  basedir,
  convert,
  dataset,
  examine,
  measure,
  rundir,
  sections,
)
from tuner import experiment as experiment_lib
from tuner.data import files, outliers
from tuner.data import rows as rows_lib
from tuner.models import hub
from tuner.report import check_page, check_text, escape

_NO_EXAMPLE = (  # of a row of the training, dev and test split
  'gives no example: it is longer than max_tokens, or its weight is 0',
  'held out for dev, not trained on',
  'held out for test, not trained on',
)


def run(
  given,
  file: str = '',
  workdir: pathlib.Path | None = None,
  as_json: bool = False,
  detail: bool = False,
  row: str = '',
  write_clean: str = '',
  losses: int = 0,
) -> int:
  """Checks the data of a config and prints what it found; 1 on errors.

  row: '17' or 'file:17', one row alone, token by token; as_json, an object a
  line with where and tokens or faults. write_clean: a JSONL file for the rows
  that pass; those that do not go beside it, with the reason. losses: of how
  many training rows the base's loss is taken.
  """
  start_s = time.perf_counter()
  config = sections.read(given)
  if losses < 0:
    raise ValueError(f'--losses={losses}; wanted: 0 or more.')
  clean = pathlib.Path(write_clean).expanduser() if write_clean else None
  _check_outputs(config, file, workdir, clean)
  base_dir = basedir.find(config.model.path, config.model.revision)
  tokenizer, stop_ids = dataset.load_tokenizer(config, base_dir)
  data = dataset.load(config, tokenizer, stop_ids)
  color = sys.stdout.isatty()
  if row:
    return _show_row(data, tokenizer, row, as_json, color)
  # A directory that holds a tokenizer alone is enough.
  is_model = (base_dir / 'config.json').is_file()
  model = hub.declare(base_dir) if is_model else None
  record = examine.examine(config, data, tokenizer, model)
  record['config'] = file
  if losses and not len(data.faults):
    record['outliers']['loss'] = _losses(given, losses)
  record['seconds'] = round(time.perf_counter() - start_s, 1)
  if workdir is not None:
    write(record, workdir)
  if clean:  # First: who reads what is printed may stop.
    print(escape.lines(_write_clean(data, clean)), file=sys.stderr)
  if as_json:
    print(json.dumps(record))
  else:
    width = min(rundir.terminal_width(), 100)
    show = check_text.detail if detail else check_text.screen
    print(show(_short(record), width=width, color=color))
  return 1 if record['errors']['count'] else 0


def _short(record: dict[str, Any]) -> dict[str, Any]:
  """The record with files by their names alone, where those tell them apart."""
  paths = {file['path'] for file in record['files'] or ()}
  names = {path: os.path.basename(path) for path in paths}
  if len(set(names.values())) < len(paths):
    return record

  def short(value):
    if isinstance(value, dict):
      return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
      return [short(inner) for inner in value]
    if isinstance(value, str):
      for path, name in names.items():
        value = value.replace(path, name)
    return value

  kept = {key: record[key] for key in ('files', 'config', 'model')}
  return {**short(record), **kept}


def _losses(given, n: int) -> dict[str, Any]:
  """Training rows of the lowest and the highest loss under the base."""
  experiment = experiment_lib.prepare(given)
  rows = experiment.split.train
  seen = rows.take(outliers.sample(len(rows), n))
  with jax.set_mesh(experiment.mesh):
    held = measure.HeldOut(experiment, seen, answers=0)
    found = held.losses(experiment.filled(experiment.load_base()))
  return {
    side: [
      {'where': held.examples.where[r['row']], 'loss': round(r['value'], 3)}
      for r in records
    ]
    for side, records in outliers.losses(found).items()
  }


def write(record: dict[str, Any], workdir: pathlib.Path) -> None:
  """check.json and check.html in the workdir."""
  rundir.make_folder(workdir)
  text = json.dumps(record, indent=1, ensure_ascii=False) + '\n'
  rundir.write_whole(workdir / 'check.json', text)
  rundir.write_whole(workdir / 'check.html', check_page.page(_short(record)))


def _show_row(data, tokenizer, row, as_json, color) -> int:
  """Prints one training row token by token, or what is wrong with it."""
  found = _describe_row(data, tokenizer, row)
  for record in found:
    if as_json:
      print(json.dumps(record))
    elif 'tokens' in record:
      print(check_text.example(record, color))
    else:
      for text in record.get('faults') or [record['why']]:
        print(escape.visible(f'{record["where"]}: {text}'))
  return 1 if any('faults' in record for record in found) else 0


def _describe_row(data, tokenizer, row) -> list[dict[str, Any]]:
  """Records of a row: its faults, its examples, or why there are none."""

  def named(wheres):
    return [
      i
      for i, where in enumerate(wheres)
      if where == row or where.endswith(f':{row}')
    ]

  faults: dict[str, list[str]] = {}
  for i in named(where for where, _ in data.faults.found):
    where, text = data.faults.found[i]
    faults.setdefault(where, []).append(text)
  found: list[dict[str, Any]] = [
    {'where': where, 'faults': texts} for where, texts in faults.items()
  ]
  own = np.isin(data.examples.row, named(data.split.train.wheres()))
  for i in np.flatnonzero(own).tolist():
    found.append(examine.describe_tokens(data, tokenizer, i))
  for rows, why in zip(data.split, _NO_EXAMPLE, strict=True):
    if not found:
      wheres = rows.wheres()
      found = [{'where': wheres[i], 'why': why} for i in named(wheres)]
  if not found:
    raise ValueError(f"--row={row}: no such row; wanted '17' or 'file:17'.")
  return found


def _check_outputs(config, file, workdir, clean) -> None:
  """Raises ValueError where a file to write is one that is read."""
  inputs = _inputs(config, file)
  if workdir is not None:
    rundir.make_folder(workdir)
    for name in ('check.json', 'check.html'):
      convert.check_apart(workdir / name, inputs)
  if clean:
    convert.check_output(clean, inputs)
    convert.check_output(_rejected(clean), inputs)


def _inputs(config: sections.Config, file: str) -> list[str]:
  """All files that a check reads."""
  data = config.data
  given = [
    *(source.path for source in data.named_sources().values()),
    *(data.held_out(side) for side in ('dev', 'test')),
    data.benchmarks,
  ]
  found = [path for paths in given if paths for path in files.expand(paths)]
  return [*found, file.partition(':')[0]]


def _rejected(clean: pathlib.Path) -> pathlib.Path:
  """Where the rows go that are not in the file of clean ones."""
  return clean.with_name(clean.name.removesuffix('.jsonl') + '.rejected.jsonl')


def _write_clean(data, path: pathlib.Path) -> str:
  """Writes the rows without faults, and beside them the others; a summary.

  Of a file that cannot be read to its end, the others hold a record without a
  row: what came after is in neither.
  """
  wrong: dict[str, list[str]] = {}
  for where, text in data.faults.found:
    wrong.setdefault(where, []).append(text)
  paths = dict.fromkeys(record['path'] for record in data.rows.files)
  rejected, counts = _rejected(path), [0, 0]
  with rundir.whole_file(path) as good, rundir.whole_file(rejected) as bad:
    for where, payload, fault in (p for one in paths for p in _payloads(one)):
      reasons = wrong.pop(where, [fault] if fault else [])
      counts[bool(reasons)] += 1
      if not reasons:
        good.write(payload + b'\n')
        continue
      text = None if payload is None else payload.decode('utf-8', 'replace')
      record = {'where': where, 'reasons': reasons, 'row': text}
      line = json.dumps(record, ensure_ascii=False)
      bad.write(line.encode(errors='backslashreplace') + b'\n')
    for where in wrong:
      if any(where == one or where.startswith(f'{one}:') for one in paths):
        raise ValueError(
          f'{where}: changed since it was checked; wanted: a file at rest'
        )
  return (
    f'{counts[0]:,} rows to {path}, {counts[1]:,} with their faults to '
    f'{rejected}'
  )


def _payloads(path):
  """Yields (where, bytes of JSON, fault) of a file's records, and its own.

  The bytes are None of what cannot be had as a record, and only that has a
  fault here.
  """
  try:
    for line, column, payload in files.items(path):
      where, fault = rows_lib.place(path, line, column), ''
      if isinstance(payload, dict):
        fault = payload.get(None, '')
        payload = json.dumps(payload, ensure_ascii=False).encode()
      yield where, None if fault else b' '.join(payload.splitlines()), fault
  except rows_lib.Refused as refused:
    yield rows_lib.place(path, refused.line), None, str(refused)
