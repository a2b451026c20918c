"""Labels that were wanted and said, of both systems under the same names.

A system's table is {'labels': [name], 'counts': [[how many rows of wanted label
i were answered with label j]], 'absent': [labels that no row wants]}. Its last
column, one more than there are labels, is of answers that are no label.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Counts = Sequence[Sequence[int]]
NONE = '(no label)'


class Tables(NamedTuple):
  """Rows are wanted labels, columns what was said; None: not measured.

  columns: the labels, and NONE.
  """

  labels: list[str]
  base: Counts | None
  tuned: Counts | None
  absent: list[str]

  @property
  def columns(self) -> list[str]:
    return [*self.labels, NONE]


def tables(record: Mapping) -> Tables | None:
  """Those of the record; None where it has none."""
  found = record.get('confusion') or {}
  base, tuned = found.get('base'), found.get('tuned')
  both = [own for own in (tuned, base) if own]
  if not both:
    return None
  labels = list(dict.fromkeys(str(x) for own in both for x in own['labels']))
  absent = list(map(str, both[0].get('absent') or ()))
  return Tables(labels, _spread(base, labels), _spread(tuned, labels), absent)


def _spread(own, labels) -> Counts | None:
  """A system's counts, by the place of each label among all."""
  if not own:
    return None
  place = {label: i for i, label in enumerate(labels)}
  at = [place[str(label)] for label in own['labels']]
  counts = [[0] * (len(labels) + 1) for _ in labels]
  for i, row in zip(at, own['counts'], strict=True):
    for j, n in zip([*at, len(labels)], row, strict=True):
      counts[i][j] += n
  return counts


class Pair(NamedTuple):
  """Rows of a wanted label that were answered with another."""

  wanted: str
  said: str
  base: int | None
  tuned: int | None


def confused(found: Tables) -> list[Pair]:
  """Mistakes that one of the two makes, the most frequent of tuned first."""
  pairs = []
  for i, wanted in enumerate(found.labels):
    for j, said in enumerate(found.columns):
      a = found.base[i][j] if found.base else None
      b = found.tuned[i][j] if found.tuned else None
      if i != j and (a or b):
        pairs.append(Pair(wanted, said, a, b))
  return sorted(pairs, key=lambda pair: (-(pair.tuned or 0), -(pair.base or 0)))
