"""The rows behind the scores: which flipped, and what was asked in them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tuner.report import evaluate_parts as parts_lib


class Flip(NamedTuple):
  """A row that one system got right and the other did not, by some metric."""

  where: str
  base: Mapping | None
  tuned: Mapping | None
  won: tuple[str, ...]
  lost: tuple[str, ...]


class Group(NamedTuple):
  """How many rows flipped to a side by a metric, and how many are shown."""

  metric: str
  side: str
  total: int
  shown: int


def flips(
  record: Mapping, base: Sequence[Mapping], tuned: Sequence[Mapping], most: int
) -> tuple[list[Flip], list[Group]]:
  """`most` rows of each metric and side, the main metric's lost ones first."""
  by_metric = parts_lib.part(record, 'comparison', 'flips')
  first = parts_lib.main_metric(record)
  names = sorted(by_metric, key=lambda name: name != first)
  kept: dict[str, None] = {}
  for name in names:
    for which in ('lost', 'won'):
      kept |= dict.fromkeys(by_metric[name][which][:most])
  of = [
    (name, which, set(by_metric[name][which]))
    for name in names
    for which in ('lost', 'won')
  ]
  groups = [
    Group(name, which, len(ids), len(ids & kept.keys()))
    for name, which, ids in of
  ]
  theirs, ours = ({p['id']: p for p in side} for side in (base, tuned))
  rows = []
  for key in kept:
    sides = {
      side: tuple(
        name for name, which, ids in of if which == side and key in ids
      )
      for side in ('won', 'lost')
    }
    rows.append(Flip(key, theirs.get(key), ours.get(key), **sides))
  return rows, groups


def asked(prompt: Any) -> tuple[str, str]:
  """(the last message, what stood before it: counted)."""
  if isinstance(prompt, str):
    return prompt, ''
  *before, last = [_content(message) for message in prompt or ['']]
  if not before:
    return last, ''
  many, size = parts_lib.count(len(before), 'message'), sum(map(len, before))
  return last, f'after {many} of {size:,} characters'


def _content(message):
  if not isinstance(message, Mapping):
    return str(message)
  content = message.get('content')
  rest = {k: v for k, v in message.items() if k not in ('role', 'content')}
  said = [content] if isinstance(content, str) else [_json(content)]
  return '\n'.join([*said, *([_json(rest)] if rest else [])])


def _json(value):
  return json.dumps(value, ensure_ascii=False)


def shorten(text: str, most: int) -> tuple[str, str]:
  """(the first `most` characters, how many more there are: or nothing)."""
  left = len(text) - most
  # A note is no shorter than what it stands for.
  if left <= 24:
    return text, ''
  return text[:most], f'… {left:,} characters more'


def evenly(items: Sequence, most: int) -> list:
  """`most` of them, evenly spaced."""
  step = max(1, len(items) / max(1, most))
  count = min(most, len(items))
  return [items[int(i * step)] for i in range(count)]
