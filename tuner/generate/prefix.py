"""What all prompts begin with: prefilled once, attended to by every row."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from tuner.generate import cache, steps
from tuner.models import decoder

MULTIPLE = 4  # So that few lengths are ever compiled for.
LEAST_SAVED = 1024  # Tokens; fewer are not worth the programs.
CHUNK = 256  # Tokens a call.


@dataclasses.dataclass(frozen=True)
class Shared:
  """The prefix's length and, for these adapters, its cache.

  memory: for the model that prefills. split: for the one that decodes.
  """

  length: int
  adapters: tuple[int, ...]
  memory: cache.Memory
  split: cache.Memory

  @property
  def layout(self) -> cache.Layout:
    """Of the rows that share this."""
    return cache.Layout(self.length, self.adapters)


def length_of(prompts: Sequence[Sequence[int]]) -> int:
  """How many tokens to share: 0 where that would save little.

  A multiple of MULTIPLE, and less than the shortest prompt, whose last token
  is its own.
  """
  common = len(os.path.commonprefix([list(p) for p in prompts]))
  common = min(common, min(map(len, prompts)) - 1)
  common -= common % MULTIPLE
  return common if common * (len(prompts) - 1) >= LEAST_SAVED else 0


def find(model: decoder.Decoder, requests: Sequence, is_split: bool) -> Shared:
  """The prefix of the requests' prompts, prefilled for each adapter.

  model: stacked; is_split: whether the one that decodes is not.
  None where a rope turns keys by the length of the text, which differs.
  """
  adapters = tuple(sorted({request.adapter for request in requests}))
  kinds = {rope.kind for rope in model.config.ropes}
  length = length_of([request.prompt for request in requests])
  if not length or kinds & {'dynamic', 'longrope'}:
    return Shared(0, (0,), {}, {})
  rows = steps.rows_of([None] * len(adapters), [length] * len(adapters))
  rows = rows._replace(adapter_B=np.array(adapters, np.int32))
  layout = cache.Layout()
  memory = steps.empty(model, len(adapters), length)
  ids = np.array([requests[0].prompt[:length]] * len(adapters), np.int32)
  lengths = np.full(len(adapters), length, np.int32)
  for start in range(0, length, CHUNK):
    memory, _ = steps.prefill(
      model, memory, {}, layout, 'chunk' if start else 'prefill',
      ids[:, start : start + CHUNK], np.int32(start), lengths, rows,
    )  # fmt: skip
  memory = steps.as_prefix(memory)
  split = cache.split(model, memory) if is_split else memory
  return Shared(length, adapters, memory, split)
