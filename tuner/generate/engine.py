"""Continuous batching: requests in, answers out, whatever shares their batch.

Rows of a cache decode together, `steps.STEPS` tokens a call. Once enough of
them have ended, waiting prompts are prefilled into their places, a group of
about one length at a time. What all prompts begin with is prefilled once and
attended to by all. What a row answers depends on its request alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tuner.generate import cache, steps
from tuner.generate import prefix as prefix_lib
from tuner.generate import sampling as sampling_lib
from tuner.models import decoder, linear

# Tokens a call of prefill: enough that a product's time goes by its size.
PREFILL_TOKENS = 256
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # Longer: in chunks.
UNSTACKED = ('cpu',)  # Where a slice of a stack of layers is a copy.
STEPS_OF_TEXT = 8  # Steps a call where stop strings are looked for.
SLOTS = 64  # The least of a cache; it doubles as texts grow.
# Where compiling takes longer than what it saves: texts of so many tokens in
# all have one width and one cache, and so few steps are taken stacked.
FEW, BRIEF = 2048, 64


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how it is to be answered.

  max_tokens: of the answer, its stop token included. seed: of sampling.
  stop: strings that end the answer. adapter: see linear.Adapters; 0 is the
  base. constraint: a constrain.Matcher of this request alone, which is spent.
  """

  prompt: Sequence[int]
  max_tokens: int
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  seed: int = 0
  stop: tuple[str, ...] = ()
  adapter: int = 0
  constraint: Any = None


@dataclasses.dataclass
class Answer:
  """Token ids with their stop token, if there is one.

  logprobs: of each id under the distribution that the model gives, in nats.
  ended: 'stop' by a stop token, 'length' by max_tokens, 'text' by a stop
  string, which the text of the ids holds.
  """

  ids: list[int]
  logprobs: list[float]
  ended: str = 'length'


def generate(
  model: decoder.Decoder,
  requests: Sequence[Request],
  stop_ids: Sequence[int],
  rows: int = 64,
  decode: Callable[[list[int]], str] | None = None,
) -> list[Answer]:
  """The answer to each request, in order.

  rows: how many are decoded at a time, at most. decode: ids -> text, needed
  for stop strings. Raises ValueError for an empty prompt, and for one that
  leaves no room within the model's positions.
  """
  _check(model, requests, rows, decode)
  if not requests:
    return []
  batch = _Batch(model, requests, stop_ids, rows, decode)
  while batch.is_busy:
    batch.fill()
    batch.decode()
  return batch.answers


def _check(model, requests, rows, decode) -> None:
  matchers = [id(r.constraint) for r in requests if r.constraint is not None]
  if len(set(matchers)) < len(matchers):
    raise ValueError('constraint: two requests share a matcher; one for each.')
  if rows < 1:
    raise ValueError(f'rows: {rows}; at least one row is needed.')
  positions, adapters = model.config.max_positions, linear.count_adapters(model)
  for i, request in enumerate(requests):
    length = len(request.prompt)
    if not length:
      raise ValueError(f'prompt {i} is empty.')
    if request.max_tokens < 0:
      raise ValueError(
        f'request {i}: max_tokens is {request.max_tokens}; at least 0.'
      )
    if length + request.max_tokens > positions:
      raise ValueError(
        f'prompt {i} has {length} tokens; with max_tokens = '
        f"{request.max_tokens} it exceeds the model's {positions} positions."
      )
    if not 0 <= request.adapter <= adapters:
      raise ValueError(
        f'request {i}: adapter {request.adapter}; the model has {adapters}, '
        'numbered from 1, and 0 is the base alone.'
      )
    if request.stop and decode is None:
      raise ValueError(
        f'request {i}: stop strings {request.stop} need decode, from token '
        'ids to text.'
      )


class _Batch:
  """The rows under way, the requests that wait and the answers so far."""

  def __init__(self, model, requests, stop_ids, rows, decode):
    self.requests, self.text_of = requests, decode
    self.stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    self.answers = [Answer([], []) for _ in requests]
    ends = [len(r.prompt) + r.max_tokens for r in requests]
    is_few = sum(ends) <= FEW
    steps_ahead = -(-sum(r.max_tokens for r in requests) // rows)
    steps_ahead = max(steps_ahead, *(r.max_tokens for r in requests), 0)
    is_brief = is_few and steps_ahead <= BRIEF
    is_split = jax.default_backend() in UNSTACKED and not is_brief
    self.stacked = model
    self.model = decoder.unstacked(model) if is_split else model
    self.shared = prefix_lib.find(model, requests, is_split)
    self.skip = self.shared.length
    # Those of about one length meet in a group. The longest first: those that
    # follow then fit its width, and no row of the group is empty.
    self.waiting = sorted(
      (i for i, request in enumerate(requests) if request.max_tokens),
      key=lambda i: -len(requests[i].prompt),
    )
    size = min(rows, _power_of_two(len(requests)))
    self.row: list[int | None] = [None] * size  # The request of each row.
    self.own = np.zeros(size, np.int32)  # Position of each row's last token.
    self.least_slots, self.least_width = SLOTS, 0
    if is_few:
      self.least_slots = max(SLOTS, _power_of_two(max(ends) - self.skip))
      longest = max(len(r.prompt) for r in requests)
      self.least_width = _width(longest - self.skip)
    self.slots = self.least_slots
    self.memory = steps.empty(self.model, size, self.slots)

  @property
  def is_busy(self) -> bool:
    return bool(self.waiting) or any(i is not None for i in self.row)

  @property
  def _places(self) -> list[int]:
    """The rows under way."""
    return [row for row, i in enumerate(self.row) if i is not None]

  def fill(self) -> None:
    """Prefills waiting prompts into free rows, a group at a time."""
    while self.waiting:
      free = [row for row, i in enumerate(self.row) if i is None]
      count, size, width = self._next_group()
      if len(free) < count:
        return
      group, self.waiting = self.waiting[:count], self.waiting[count:]
      self._prefill(group, free[:count], size, width)

  def _next_group(self) -> tuple[int, int, int]:
    """(how many of those that wait, rows of the call, its width)."""
    width = _width(len(self.requests[self.waiting[0]].prompt) - self.skip)
    width = max(width, self.least_width)
    size = max(1, min(len(self.row), PREFILL_TOKENS // width))
    return min(size, len(self.waiting)), size, width

  def _prefill(self, group, places, size, width) -> None:
    """Fills the rows at `places`; the call's other rows are nobody's."""
    lengths = np.ones(size, np.int32)
    for row, i in enumerate(group):
      lengths[row] = len(self.requests[i].prompt) - self.skip
    tokens = np.zeros((size, -(-lengths.max() // width) * width), np.int32)
    for row, i in enumerate(group):
      tokens[row, : lengths[row]] = self.requests[i].prompt[self.skip :]
    self._make_room(
      max(lengths.max(), self.own[self._places].max(initial=0) + 1)
    )
    rows = self._rows([*group, *[None] * (size - len(group))])
    slots = width if tokens.shape[1] == width else self.slots
    memory = steps.empty(self.stacked, size, slots)
    token_B, logprob_B = np.zeros(size, np.int32), np.zeros(size, np.float32)
    for start in range(0, tokens.shape[1], width):
      memory, found = steps.prefill(
        self.stacked, memory, self.shared.memory, self.shared.layout,
        'chunk' if start else 'prefill', tokens[:, start : start + width],
        np.int32(start), lengths, rows,
      )  # fmt: skip
      is_last = (lengths > start) & (lengths <= start + width)
      token_B = np.where(is_last, found.token_B, token_B)
      logprob_B = np.where(is_last, found.logprob_B, logprob_B)
    nowhere = len(self.row)
    places_B = np.array([*places, *[nowhere] * (size - len(group))], np.int32)
    self.memory = cache.put(self.stacked, self.memory, memory, places_B)
    for row, (i, place) in enumerate(zip(group, places, strict=True)):
      self.row[place], self.own[place] = i, lengths[row] - 1
      self._take(place, token_B[row : row + 1], logprob_B[row : row + 1])

  def decode(self) -> None:
    """One call of steps.decode for the rows under way."""
    places = self._places
    if not places:
      return
    most = self._most_steps(places)
    self._make_room(self.own[places].max() + 1)
    most = min(most, self.slots - self.own[places].max())
    live = self._live()
    enough = self._next_group()[0] if self.waiting else len(self.row) + 1
    self.memory, out, count_B = steps.decode(
      self.model, self.memory, self.shared.split,
      self.shared.layout, live, self._rows(self.row),
      self.stop_ids, np.int32(most), np.int32(enough),
    )  # fmt: skip
    token_BT, logprob_BT, count_B = map(np.asarray, (*out, count_B))
    for place in places:
      n = count_B[place]
      self._take(place, token_BT[place, :n], logprob_BT[place, :n])

  def _live(self) -> steps.Live:
    """Where each row is."""
    token_B, left_B = np.zeros((2, len(self.row)), np.int32)
    for place, i in enumerate(self.row):
      if i is not None:
        ids = self.answers[i].ids
        token_B[place] = ids[-1]
        left_B[place] = self.requests[i].max_tokens - len(ids)
    return steps.Live(token_B, self.own.copy(), left_B)

  def _most_steps(self, places) -> int:
    """Fewer where the host has to look at what is written."""
    requests = [self.requests[self.row[place]] for place in places]
    if any(request.constraint is not None for request in requests):
      return 1
    return STEPS_OF_TEXT if any(r.stop for r in requests) else steps.STEPS

  def _make_room(self, length) -> None:
    """Slots for so many own positions; fewer than before if a quarter will do.

    Attention takes time by the slots that there are.
    """
    wanted = max(self.least_slots, _power_of_two(length))
    if wanted > self.slots or 4 * wanted <= self.slots:
      self.slots = wanted
      self.memory = steps.resized(self.model, self.memory, self.slots)

  def _rows(self, group) -> steps.Rows:
    """What the rows of these requests go by."""
    own = [None if i is None else self.requests[i] for i in group]
    ends = [1 if r is None else len(r.prompt) + r.max_tokens for r in own]
    rows = steps.rows_of(own, ends)
    matchers = [getattr(request, 'constraint', None) for request in own]
    if all(matcher is None for matcher in matchers):
      return rows
    words = -(-self.model.config.V // sampling_lib.WORD)
    allowed = np.full((len(own), words), 2**32 - 1, np.uint32)
    for row, matcher in enumerate(matchers):
      if matcher is not None:
        allowed[row] = matcher.allowed()
    return rows._replace(allowed_BW=allowed)

  def _take(self, place, ids, logprobs) -> None:
    """Adds what a row has written to its answer, up to where it ends."""
    i = self.row[place]
    request, answer = self.requests[i], self.answers[i]
    for token, logprob in zip(sampling_lib.checked(ids).tolist(), logprobs):
      answer.ids.append(token)
      answer.logprobs.append(float(logprob))
      self.own[place] += 1
      if ended := self._ended(request, answer):
        answer.ended = ended
        self.row[place] = None
        return

  def _ended(self, request: Request, answer: Answer) -> str:
    """Why the answer ends with its last token; '' if it goes on."""
    if request.constraint is not None:
      request.constraint.accept(answer.ids[-1])
    if answer.ids[-1] in self.stop_ids:
      return 'stop'
    if request.stop and self.text_of is not None:
      text = self.text_of(answer.ids)
      if any(stop in text for stop in request.stop):
        return 'text'
    return 'length' if len(answer.ids) == request.max_tokens else ''


def _power_of_two(n: int) -> int:
  """The least power of two that is not less."""
  return 1 << (int(n) - 1).bit_length()


def _width(length: int) -> int:
  """Tokens a call of prefill for a prompt with so many of its own."""
  return next((width for width in WIDTHS if width >= length), WIDTHS[-1])
