"""Formats written, read again, and put in their places.

Each takes its place once all are written and it is right itself, whatever
becomes of the others.
"""

import contextlib
import pathlib
import textwrap
import time
from collections.abc import Mapping, Sequence

import jax

from tuner import rundir
from tuner.artifacts import (
  export,
  folders,
  outside,
  places,
  reread,
  room,
  table,
  verify,
)
from tuner.artifacts import trained as trained_lib
from tuner.report import escape

Trained = trained_lib.Trained


def write(
  trained: Trained,
  names: Sequence[str],
  out: pathlib.Path,
  is_verified: bool = True,
  key: str = '--out',
) -> None:
  """Writes every format and prints a line for each, then what verifying found.

  key: what errors call `out`. Raises RuntimeError for formats that could not
  be written, and for those that are not right: they are kept as NAME.rejected.
  """
  if not names:
    return
  places.check(
    out, names, trained.config, trained.base_dir, trained.workdir, key
  )
  step, digest = trained.record['step'], trained.record['sha256']
  out = rundir.make_folder(out, key)
  for name in export.FORMATS:
    folders.sweep(out / name)
  print(f'\nstep {step} (checkpoint {digest[:12]}) exported to {out}')
  with contextlib.ExitStack() as stack:
    kept, failed = _write_all(trained, names, out, stack)
    written = {name: folder.scratch for name, folder in kept.items()}
    found = check(trained, written) if is_verified and written else []
    wrong = sorted({c.format for c in found if c.faults})
    for name, folder in kept.items():
      folder.reject() if name in wrong else folder.keep()
  _record(out, trained, list(kept), found, key)
  _raise(out, wrong, failed)


def _write_all(trained, names, out, stack):
  """({format: its folder, not in its place yet}, {format: why there is none}).

  One that fails is removed at once, so that it takes no room from the next.
  """
  kept: dict[str, folders.Folder] = {}
  failed: dict[str, Exception] = {}
  for name in names:
    start_s = time.perf_counter()
    done = {other: folder.scratch for other, folder in kept.items()}
    try:
      with contextlib.ExitStack() as own:
        folder = own.enter_context(folders.Folder(out / name))
        rundir.check_space(out, export.needed_bytes(name, trained))
        notes = export.FORMATS[name](folder.scratch, trained, done)
        stack.enter_context(own.pop_all())
    except Exception as error:  # Whatever it is, the others are to be had.
      failed[name] = error
      _say(f'{name}: not written: {error}')
      continue
    kept[name] = folder
    size = rundir.human(folders.size(folder.scratch))
    seconds = time.perf_counter() - start_s
    print(f'  {name:8} {size:>8}  {seconds:5.1f} s  {out / name}', flush=True)
    for note in notes or ():
      _say(f'{name}: {note}')
  return kept, failed


def _say(text: str) -> None:
  text = textwrap.fill(escape.visible(text), 76)
  print(textwrap.indent(text, '  '), flush=True)


def _raise(out, wrong, failed: Mapping[str, Exception]) -> None:
  """Raises one RuntimeError with all formats that are not there."""
  lines = [f'{name} was not written: {e}' for name, e in failed.items()]
  if wrong:
    listed = ', '.join(f'{out / name}.rejected' for name in wrong)
    lines.append(f'what was written is not what was trained; see {listed}')
  if lines:
    cause = next(iter(failed.values()), None)
    raise RuntimeError('\n'.join(lines)) from cause


def check(
  trained: Trained, written: Mapping[str, pathlib.Path]
) -> list[verify.Check]:
  """Reads every format again, and prints what was found."""
  start_s = time.perf_counter()
  libraries, notes = outside.readers(written, trained)
  wanted, why = _reference(trained)
  found = [
    reread.check(name, path, trained, wanted) for name, path in written.items()
  ]
  found += outside.check(written, libraries, trained, wanted)
  found.sort(key=lambda one: list(written).index(one.format))
  notes += why
  notes += [f'{one.format}: {note}' for one in found for note in one.notes]
  seconds = time.perf_counter() - start_s
  print(table.text(trained, wanted, found, notes, seconds), flush=True)
  return found


def _reference(trained: Trained) -> tuple[verify.Reference, list[str]]:
  """What the state in memory predicts; why it is not asked, if it is not."""
  nothing = verify.Reference([], [], [])
  if not trained.prompts:
    return nothing, ['predictions were not compared: the run kept no prompts']
  try:
    return verify.reference(trained), []
  except jax.errors.JaxRuntimeError as error:
    if not room.is_exhausted(error):
      raise
    return nothing, ['predictions were not compared: no room for decoding']


def _record(out, trained, names, found, key) -> None:
  """verify.json: what was found of each format that lies there."""
  there = dict(places.read_record(out, key))
  for name in names:
    there.pop(name, None)
    checks = [one.record() for one in found if one.format == name]
    if checks:
      there[name] = {
        'step': trained.record['step'],
        'checkpoint': trained.record['sha256'],
        'compute_dtype': trained.config.model.dtype,
        'prompts': len(trained.prompts),
        'checks': checks,
      }
  rundir.write_whole(out / places.RECORD, folders.as_json(there))
