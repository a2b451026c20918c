"""Where an answer differs from what was wanted, word by word."""

import re
from collections.abc import Sequence

_WORD = re.compile(r'\w+|\s+|[^\w\s]')
_MOST = 20_000  # comparisons of words; a table of more takes too long to fill
_ALIKE = 0.4  # less of the words in common is another text, not a changed one


def differences(text: str, wanted: str) -> list[tuple[str, bool]]:
  """Pieces of `text`, and whether each differs from `wanted`.

  Joined they are the text. ('', True) stands where words of `wanted` are
  missing. By the longest common subsequence of words; texts with little in
  common, or too long, differ from their first to their last differing word.
  """
  ours, theirs = _WORD.findall(text), _WORD.findall(wanted)
  start = _common_prefix(ours, theirs)
  end = _common_prefix(ours[start:][::-1], theirs[start:][::-1])
  a, b = ours[start : len(ours) - end], theirs[start : len(theirs) - end]
  found = [(word, False) for word in ours[:start]]
  i = j = 0
  for at, to in [*_matches(a, b), (len(a), len(b))]:
    found += [(word, True) for word in a[i:at]]
    if to > j:
      found.append(('', True))
    found += [(a[at], False)] if at < len(a) else []
    i, j = at + 1, to + 1
  found += [(word, False) for word in ours[len(ours) - end :]]
  return _joined(found)


def _common_prefix(a: Sequence[str], b: Sequence[str]) -> int:
  same = 0
  for x, y in zip(a, b, strict=False):
    if x != y:
      break
    same += 1
  return same


def _matches(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
  """Places in a and b of a longest common subsequence."""
  if not a or not b or len(a) * len(b) > _MOST:
    return []
  longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
  for i in reversed(range(len(a))):
    row, below = longest[i], longest[i + 1]
    for j in reversed(range(len(b))):
      row[j] = below[j + 1] + 1 if a[i] == b[j] else max(below[j], row[j + 1])
  if longest[0][0] < _ALIKE * max(len(a), len(b)):
    return []
  found, i, j = [], 0, 0
  while i < len(a) and j < len(b):
    if a[i] == b[j]:
      found.append((i, j))
      i, j = i + 1, j + 1
    elif longest[i + 1][j] >= longest[i][j + 1]:
      i += 1
    else:
      j += 1
  return found


def _joined(words):
  """Neighbours of one side as one piece, with the spaces between differing."""
  words = [
    (word, differs or _is_between(words, i))
    for i, (word, differs) in enumerate(words)
  ]
  pieces: list[tuple[str, bool]] = []
  for word, differs in words:
    if pieces and pieces[-1][1] == differs:
      pieces[-1] = (pieces[-1][0] + word, differs)
    else:
      pieces.append((word, differs))
  return pieces


def _is_between(words, i):
  beside = words[i - 1 : i] + words[i + 1 : i + 2]
  return (
    words[i][0].isspace() and len(beside) == 2 and all(d for _, d in beside)
  )


def first(pieces: Sequence[tuple[str, bool]], most: int):
  """The pieces of the first `most` characters."""
  kept = []
  for text, differs in pieces:
    if most <= 0 and text:
      break
    kept.append((text[:most], differs))
    most -= len(text)
  return kept
