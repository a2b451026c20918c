"""How likely given continuations of contexts are, and choices made by that.

Pairs are packed into rows as training packs examples, so that short ones cost
what they hold; only the tokens of continuations meet the head. A batch has one
of a few shapes, and a shape is compiled once for every model of one kind.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tuner import mesh as mesh_lib
from tuner.data import chat, pack, sources
from tuner.evals import stats
from tuner.models import policy

NARROWEST = 64  # Of a row and of its reach, in tokens; wider ones double.
Pair = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Scored:
  """How likely a continuation is.

  nats: -log p(continuation | context), a sum over its tokens.
  is_greedy: whether greedy decoding from the context would write it.
  cut: tokens that were left out at the context's start to make it fit.
  """

  nats: float
  tokens: int
  is_greedy: bool
  cut: int = 0


def score(
  runner: policy.Policy,
  pairs: Sequence[Pair],
  rows: int = 8,
  tokens: int = 1024,
  limit: int | None = None,
  too_long: str = 'error',
) -> list[Scored]:
  """Each continuation's likelihood, in the order given.

  pairs: (context, continuation), ids, neither of them empty. rows, tokens: a
  batch, at most; where a pair is longer, rows are wider and fewer.
  limit: how many tokens the model may look at, at most; by default its
  positions. The last token of a pair is predicted, never looked at, so that
  limit + 1 fit.
  too_long: 'error', or 'truncate_context' from its left end, which is counted.

  Raises ValueError for a pair that is empty or does not fit.
  """
  sources.check_count('rows', rows)
  sources.check_count('tokens', tokens)
  positions = runner.model.config.max_positions
  limit = positions if limit is None else limit
  if not 1 <= limit <= positions:
    raise ValueError(
      f'limit is {limit} tokens; wanted: 1 to the {positions} positions of the '
      'model'
    )
  fitted = [_fit(i, *pair, limit, too_long) for i, pair in enumerate(pairs)]
  if not fitted:
    return []
  source = _packed(fitted, rows, tokens, limit)
  reach = _doubled(source.longest, limit)
  nats_N, tops_N = np.zeros(len(pairs)), np.zeros(len(pairs), np.int64)
  for i, batch in enumerate(source):
    batch = {name: values[0] for name, values in batch.items()}
    out = _predictions(runner.model, batch, reach, runner.chunk)
    logprobs_BT, is_top_BT = map(np.asarray, out)
    for b, ids in enumerate(source.ids(i)):
      if len(ids):
        lengths = [len(fitted[n].ids) for n in ids]
        starts = np.cumsum([0, *lengths[:-1]])
        nats_N[ids] = -np.add.reduceat(logprobs_BT[b].astype(float), starts)
        tops_N[ids] = np.add.reduceat(is_top_BT[b].astype(int), starts)
  return [
    Scored(float(nats), one.tokens, bool(tops == one.tokens), one.cut)
    for nats, tops, one in zip(nats_N, tops_N, fitted, strict=True)
  ]


@functools.partial(jax.jit, static_argnames=('reach', 'chunk'))
def _predictions(model, batch, reach, chunk):
  batch = {n: mesh_lib.constrain(x, 'BT') for n, x in batch.items()}
  return policy.Policy(model, reach, chunk=chunk).predictions(batch)


@dataclasses.dataclass(frozen=True)
class _Fitted:
  """A pair's ids, how many at its end are the continuation's, and `cut`."""

  ids: Sequence[int]
  tokens: int
  cut: int


def _fit(i, context, continuation, limit, too_long) -> _Fitted:
  """The pair, cut where it may be. Raises ValueError."""
  if too_long not in ('error', 'truncate_context'):
    raise ValueError(
      f"too_long is {too_long!r}; wanted: 'error' or 'truncate_context'"
    )
  for name, ids in (('context', context), ('continuation', continuation)):
    if not len(ids):
      raise ValueError(
        f'pair {i}: its {name} has no tokens; wanted: one at least, such as '
        'the token that begins a text'
      )
  ids = [*context, *continuation]
  cut = max(0, len(ids) - (limit + 1))
  if cut and (too_long == 'error' or len(continuation) > limit):
    raise ValueError(
      f'pair {i}: a context of {len(context)} and a continuation of '
      f'{len(continuation)} tokens; the model looks at {limit} at most; '
      "wanted: fewer, or too_long='truncate_context', which leaves all of a "
      'continuation'
    )
  return _Fitted(ids[cut:], len(continuation), cut)


def _packed(fitted, rows, tokens, limit) -> sources.Once:
  """All pairs once, in as few rows as hold them, and no wider than it takes."""
  lengths = np.array([len(one.ids) for one in fitted])
  counts = np.array([one.tokens for one in fitted])
  ends = np.cumsum(lengths)
  from_end = np.repeat(ends, lengths) - np.arange(ends[-1])
  examples = chat.Examples(
    np.concatenate([np.asarray(one.ids, np.int32) for one in fitted]),
    (from_end <= np.repeat(counts, lengths)).astype(np.uint8),
    np.concatenate([[0], ends]),
    [f'pair {i}' for i in range(len(fitted))],
  )
  longest = _doubled(int(lengths.max()), limit)
  width = max(longest, min(tokens, _doubled(int(ends[-1]), tokens)))
  bins = pack.pack(lengths, width)
  rows = min(max(1, rows * tokens // width), rows, len(bins))
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh_lib.parts(mesh, mesh_lib.RULES['B'])
  rows = -(-rows // parts) * parts
  return sources.Once(examples, bins, rows, width, (0, 1))


def _doubled(length, limit):
  """The least of 64, 128, 256, ... that holds so many tokens.

  At most what holds limit + 1, a multiple of 64.
  """
  most = -(-(limit + 1) // NARROWEST) * NARROWEST
  return min(most, max(NARROWEST, 1 << (length - 1).bit_length()))


def encode_pair(
  encode: Callable[[str], list[int]], context: str, continuation: str
) -> Pair:
  """Ids of a context and of what follows it, tokenised as one text.

  Spaces at the end of the context go to the continuation, whose first word
  they belong to in most vocabularies (so does lm-eval). Raises ValueError where
  nothing is left of either.
  """
  bare = context.rstrip()
  whole = encode(context + continuation)
  before = encode(bare)
  if not before or len(whole) <= len(before):
    raise ValueError(
      f'{context[-40:]!r} and {continuation[:40]!r}: {len(before)} tokens of '
      f'{len(whole)} are the context; wanted: one at least of each'
    )
  return before, whole[len(before) :]


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which of a question's choices a model takes, by what it finds likely.

  taken: the choice of the fewest nats (lm-eval's acc). taken_by_byte: of the
  fewest nats a byte of its text, which does not favour short ones (lm-eval's
  acc_bytes, and for ASCII its acc_norm). Of equal ones the first.
  """

  scored: tuple[Scored, ...]
  answer: int
  taken: int
  taken_by_byte: int


def choose(
  runner: policy.Policy,
  questions: Sequence[Mapping[str, Any]],
  encode: Callable[[str], list[int]],
  delimiter: str = ' ',
  rows: int = 8,
  tokens: int = 1024,
) -> list[Choice]:
  """What the model takes for each {question, choices, answer}.

  The text of a choice follows the question and the delimiter. answer: index
  of the right one. Raises ValueError for a row that says no question.
  """
  pairs = []
  for i, row in enumerate(questions):
    _check_question(i, row)
    for choice in row['choices']:
      pair = encode_pair(encode, row['question'], delimiter + choice)
      pairs.append(pair)
  scored = iter(score(runner, pairs, rows, tokens))
  found = []
  for row in questions:
    own = tuple(next(scored) for _ in row['choices'])
    nats = np.array([one.nats for one in own])
    sizes = np.array([len(choice.encode()) for choice in row['choices']])
    taken, by_byte = int(nats.argmin()), int((nats / sizes).argmin())
    found.append(Choice(own, row['answer'], taken, by_byte))
  return found


def _check_question(i, row):
  missing = {'question', 'choices', 'answer'} - row.keys()
  if missing:
    raise ValueError(f'question {i} has no {sorted(missing)[0]!r}')
  question, choices, answer = row['question'], row['choices'], row['answer']
  texts = [question, *choices] if isinstance(choices, list | tuple) else [None]
  if not all(isinstance(text, str) and text for text in texts):
    raise ValueError(
      f'question {i}: question {question!r}, choices {choices!r}; wanted: a '
      'text, and a list of texts'
    )
  is_index = type(answer) is int and 0 <= answer < len(choices)
  if len(choices) < 2 or not is_index:
    raise ValueError(
      f'question {i}: answer {answer!r} of {len(choices)} choices; wanted: two '
      'choices at least, and the index of the right one, from 0'
    )


def accuracies(choices: Sequence[Choice]) -> dict[str, stats.Interval]:
  """Share of right choices, by the sum of nats and by nats a byte."""
  right = {
    'accuracy': [c.taken == c.answer for c in choices],
    'accuracy_by_byte': [c.taken_by_byte == c.answer for c in choices],
  }
  return {
    name: stats.bootstrap(np.asarray(own, float), stats.SEED)
    for name, own in right.items()
  }
