"""Regular expressions of an adapter's config, matched in bounded time.

Whoever wrote the file chose them, and one as short as '(a+)+b' can take longer
than anyone waits. What cannot is matched here; all others are in a process of
their own, this file run as a script, which is ended after TIMEOUT_S.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TIMEOUT_S = 30.0
PLAIN = re.compile(r'[\w.-]*')  # No choice, group or repetition.


class Pattern(NamedTuple):
  """A regular expression, the key that holds it, and what stands before it.

  start: itself one, which is trusted.
  """

  key: str
  text: str
  start: str = ''


def find(
  wanted: Iterable[Pattern], names: Sequence[str]
) -> dict[Pattern, frozenset[str]]:
  """The names that each pattern matches as a whole.

  Raises ValueError naming the patterns that are none, or take too long.
  """
  every = list(dict.fromkeys(wanted))
  simple = [p for p in every if PLAIN.fullmatch(p.text)]
  others = [p for p in every if p not in simple]
  found = [_matched(pattern, names) for pattern in simple]
  if others:
    found += _matched_apart(others, names)
  faults = [
    f'{pattern.key}: {pattern.text!r:.200}: no regular expression: {one}'
    for pattern, one in zip(simple + others, found, strict=True)
    if isinstance(one, str)
  ]
  if faults:
    raise ValueError('; '.join(faults))
  held = zip(simple + others, found, strict=True)
  return {
    pattern: frozenset(names[int(i)] for i in one) for pattern, one in held
  }


def _matched(pattern: Pattern, names: Sequence[str]) -> list[int] | str:
  """Which names match, or why none can."""
  _, text, start = pattern
  try:
    re.compile(text)  # Alone, so that it closes no group but its own.
    regex = re.compile(f'{start}({text})' if start else text)
  except (re.error, OverflowError, RecursionError) as error:
    return str(error)
  return [i for i, name in enumerate(names) if regex.fullmatch(name)]


def _matched_apart(wanted: Sequence[Pattern], names: Sequence[str]) -> list:
  try:
    done = subprocess.run(
      [sys.executable, '-I', '-W', 'ignore', __file__],
      input=json.dumps([wanted, names]),
      capture_output=True,
      text=True,
      timeout=TIMEOUT_S,
      check=False,
    )
  except subprocess.TimeoutExpired:
    why = f'took longer than {TIMEOUT_S:g} s'
  else:
    if not done.returncode:
      return json.loads(done.stdout)
    why = f'ended the process that matched them ({done.returncode})'
  said = ', '.join(f'{p.key}: {p.text!r:.200}' for p in wanted)
  raise ValueError(f'{said}: matching {why}; name modules instead')


if __name__ == '__main__':
  asked, known = json.load(sys.stdin)
  json.dump([_matched(Pattern(*one), known) for one in asked], sys.stdout)
