"""What a run has looked at, and how long that took.

eval/test_reads.jsonl has a line for each time that the answers of the test
split, or its loss, were looked at: a split that is read often is no longer held
out, as what is read is chosen by. eval/seconds.jsonl has what each measurement
took. A result that is there already is neither read nor timed again.
"""

import contextlib
import datetime
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tuner import rundir

READS = 'eval/test_reads.jsonl'
SECONDS = 'eval/seconds.jsonl'


class Ledger:
  """The two files of one run; only the first process writes.

  command: what looks, 'train' or 'evaluate'.
  """

  def __init__(self, workdir: pathlib.Path, command: str):
    self.workdir = workdir
    self.command = command

  @contextlib.contextmanager
  def timed(self, what: str, suite: str) -> Iterator[None]:
    """Writes down the seconds within, as of `what` ('evaluation', ...)."""
    start_s = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - start_s, 3)
    line = {'what': what, 'suite': suite, 'seconds': seconds}
    self._append(SECONDS, line)

  def read(self, suite: str, system: str, step: int | None, digest: str):
    """Writes down that test rows are looked at; before they are."""
    line = {
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'command': self.command,
      'suite': suite,
      'system': system,
      'step': step,
      'digest': digest,
    }
    self._append(READS, line)

  def _append(self, name: str, line: Mapping[str, Any]) -> None:
    if jax.process_index():
      return
    path = self.workdir / name
    rundir.make_folder(path.parent)
    with path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')


def reads(workdir: pathlib.Path, digest: str) -> int:
  """How often a tuned model was looked at on these test rows.

  The base beside it is no read of its own: nobody chooses a base by it.
  """
  lines = [line for line in _lines(workdir / READS) if line['digest'] == digest]
  tuned = sum(line['step'] is not None for line in lines)
  return tuned or min(len(lines), 1)


def seconds(workdir: pathlib.Path) -> dict[str, float]:
  """Seconds of 'training' and of each kind of measurement, over the whole run.

  Of a suite that was measured twice, after a resume, the last time counts, as
  of a step that was taken twice.
  """
  last: dict[tuple[str, str], float] = {}
  for line in _lines(workdir / SECONDS):
    last[line['what'], line['suite']] = line['seconds']
  steps = _lines(workdir / 'metrics.jsonl')
  found = {'training': sum(line.get('seconds', 0.0) for line in steps)}
  for (what, _), spent in last.items():
    found[what] = found.get(what, 0.0) + spent
  return found


def seconds_text(found: Mapping[str, float]) -> str:
  """'training took 553 s; retention took 31 s, 5.6 % of training'."""
  training = found['training']
  parts = [f'training took {training:.3g} s']
  for what, spent in found.items():
    if what != 'training':
      share = f', {spent / training:.1%} of training' if training else ''
      parts.append(f'{what} took {spent:.3g} s{share}'.replace('%', ' %'))
  return '; '.join(parts)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a JSONL file; a line torn by a kill is none."""
  if not path.is_file():
    return []
  found = []
  for line in path.read_text(encoding='utf-8').split('\n'):
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return [line for line in found if isinstance(line, dict)]
