"""Prompts that travel with a model: messages, and what they become.

A server that serves it can render the same messages and compare: its text and
its token ids must be these. Verification measures on them, too.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tuner.data import rows as rows_lib
from tuner.data import template as template_lib

COUNT = 8  # kept in a run, and measured on
SHOWN = 3  # of those, in an export
LOOKED_AT = 256  # rows, for some that are not too long
TEXT = 256  # characters of a plain text that are its prompt


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What generation starts from; a plain text has no messages."""

  messages: tuple[dict[str, Any], ...]
  tools: tuple[dict[str, Any], ...]
  text: str
  ids: tuple[int, ...]


def choose(sides: Iterable[Sequence], tokenizer, longest: int) -> list[Prompt]:
  """Up to COUNT prompts of the first of `sides` that has any.

  sides: rows, those to be preferred first. Rows whose prompt has more than
  `longest` tokens are passed over.
  """
  for rows in sides:
    few = (rows[i] for i in range(min(len(rows), LOOKED_AT)))
    found = [p for row in few for p in _prompts(row, tokenizer, longest)]
    if found:
      return found[:COUNT]
  return []


def _prompts(row: rows_lib.Row, tokenizer, longest: int) -> Iterator[Prompt]:
  if row.kind == 'text':
    found = _of_text(row.text[:TEXT], tokenizer)
  elif row.prompt:
    found = rendered(row.prompt, row.tools, tokenizer)
  else:
    return
  if 0 < len(found.ids) <= longest:
    yield found


def rendered(messages, tools, tokenizer) -> Prompt:
  """The prompt that a tokenizer's template makes of messages."""
  shown = tuple(
    {key: value for key, value in message.items() if key != 'train'}
    for message in messages
  )
  text = template_lib.renderer(tokenizer)(shown, True, tools)
  encoded = template_lib.backend(tokenizer).encode(
    text, add_special_tokens=False
  )
  return Prompt(shown, tuple(tools), text, tuple(encoded.ids))


def _of_text(text: str, tokenizer) -> Prompt:
  encoded = template_lib.backend(tokenizer).encode(
    text, add_special_tokens=True
  )
  return Prompt((), (), text, tuple(encoded.ids))


def again(prompt: Prompt, tokenizer) -> Prompt:
  """The prompt as another tokenizer makes it."""
  if not prompt.messages:
    return _of_text(prompt.text, tokenizer)
  return rendered(prompt.messages, prompt.tools, tokenizer)


def lines(prompts: Sequence[Prompt]) -> bytes:
  """prompts.jsonl: an object a line."""
  return b''.join(
    json.dumps(dataclasses.asdict(p), ensure_ascii=False).encode() + b'\n'
    for p in prompts
  )


def read(file: pathlib.Path) -> list[Prompt]:
  """What `lines` gave. Raises ValueError naming the file."""
  try:
    text = file.read_text(encoding='utf-8')
    given = [json.loads(line) for line in text.split('\n') if line]
    return [
      Prompt(
        tuple(one['messages']), tuple(one['tools']), one['text'],
        tuple(one['ids']),
      )
      for one in given
    ]  # fmt: skip
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{file} cannot be read: {error}') from error
