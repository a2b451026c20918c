"""Whether what was written is what was trained, shown by reading it again.

Every format is read by our own code, and by transformers and peft where they
are installed. Weights must be those that were to be written, bit for bit; the
tokenizer must make the same ids of the same messages; and the model must
predict the same. Predictions are compared along the greedy answers of the
state in memory: where a reader's best token first differs from the answer, its
own greedy answer would differ from there on.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuner.artifacts import prompts as prompts_lib
from tuner.artifacts import trained as trained_lib
from tuner.generate import greedy
from tuner.models import policy

ANSWER_TOKENS = 32  # of an answer, at most
PAD = 64  # sequences are padded to a multiple of this

# Two programs that compute the same model in float32 differ by rounding
# alone, which grows with the logits: 1e-4 was measured at logits of 40.
LOGITS = 1e-3
LARGEST = 40.0
# Coarser dtypes round the weights, too; what it costs is told by how far the
# predictions move (docs/export.md has the figures they were chosen by).
KL_NATS = {'float16': 0.002, 'bfloat16': 0.05, 'q8_0': 0.05}
NAMES = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}


@dataclasses.dataclass(frozen=True)
class Reference:
  """What the state in memory says.

  sequences: prompt and greedy answer, token ids. starts: how many of them are
  the prompt. logits: float32 [answer, V] of each, predicting the answer.
  """

  sequences: list[list[int]]
  starts: list[int]
  logits: list[np.ndarray]

  @property
  def largest(self) -> float:
    """The largest logit's magnitude."""
    return max((float(abs(x).max()) for x in self.logits), default=0.0)

  @property
  def tokens(self) -> int:
    """Of all answers."""
    return sum(map(len, self.logits))


@dataclasses.dataclass
class Check:
  """What one reader found in one format.

  weights: how many tensors differ from those to be written; None: not read as
  such. difference: the largest of logits. kl: mean nats a token from the
  reference to this. agree: answers that are the same. first: of each other, the
  first token that differs. prompts: rendered the same. faults: sentences;
  notes: what was not looked at, and why.
  """

  format: str
  reader: str
  dtype: str
  weights: int | None = None
  difference: float | None = None
  kl: float | None = None
  agree: int | None = None
  first: list[int] = dataclasses.field(default_factory=list)
  prompts: int | None = None
  faults: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def record(self) -> dict[str, Any]:
    """As JSON, which has no NaN."""
    found = dataclasses.asdict(self)
    for key in ('difference', 'kl'):
      value = found[key]
      if value is not None and not math.isfinite(value):
        found[key] = str(value)
    return found


def reference(trained: trained_lib.Trained) -> Reference:
  """The greedy answers of the state in memory and what it predicts along."""
  asked = [list(prompt.ids) for prompt in trained.prompts]
  runner = trained.filled(trained.attached)
  room = trained.model.config.max_positions - max(map(len, asked), default=0)
  answers = greedy.generate(
    runner.model, asked, trained.stop_ids, min(ANSWER_TOKENS, room)
  )
  sequences = [p + a for p, a in zip(asked, answers, strict=True)]
  starts = [len(ids) for ids in asked]
  logits = predictions(runner, sequences, starts)
  return Reference(sequences, starts, logits)


def predictions(
  runner: policy.Policy, sequences: Sequence[list[int]], starts: Sequence[int]
) -> list[np.ndarray]:
  """float32 logits [answer, V] of each sequence, predicting its answer."""
  if not sequences:
    return []
  longest = max(map(len, sequences))
  width = -(-longest // PAD) * PAD
  tokens = np.zeros((len(sequences), width), np.int32)
  at = np.zeros((len(sequences), ANSWER_TOKENS), np.int32)
  for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
    tokens[i, : len(ids)] = ids
    at[i, : len(ids) - start] = np.arange(start - 1, len(ids) - 1)
  lengths = np.array([len(ids) for ids in sequences])
  found = np.asarray(_predict(runner.model, tokens, lengths, at))
  counts = lengths - np.array(starts)
  return [one[:n] for one, n in zip(found, counts, strict=True)]


@jax.jit
def _predict(model, tokens_BT, lengths_B, at_BP):
  """float32 logits_BPV after the tokens at those positions."""
  index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  segments = (index_BT < lengths_B[:, None]).astype(jnp.int32)
  # Positions that ran on would make the padding part of the text, which some
  # ropes stretch with.
  positions = index_BT * segments
  batch = {'tokens': tokens_BT, 'positions': positions, 'segments': segments}
  x_BTD = policy.Policy(model).hidden(batch)
  x_BPD = jnp.take_along_axis(x_BTD, at_BP[:, :, None], axis=1)
  return model.logits(x_BPD)


def compare(
  check: Check, wanted: Reference, logits: Sequence[np.ndarray], compute: str
) -> None:
  """Fills in how a reader's logits differ, and a fault above the bound.

  compute: the dtype that either computed in, the coarser of the two.
  """
  if not wanted.logits:
    return
  pairs = list(zip(wanted.logits, logits, strict=True))
  check.difference = max(float(abs(a - b).max()) for a, b in pairs)
  divergences = [divergence(a, b) for a, b in pairs]
  check.kl = float(np.concatenate(divergences).mean())
  check.agree, check.first = 0, []
  for ids, start, own in zip(
    wanted.sequences, wanted.starts, logits, strict=True
  ):
    wrong = np.flatnonzero(own.argmax(-1) != np.array(ids[start:]))
    check.agree += not len(wrong)
    check.first += wrong[:1].tolist()
  fault = beyond(check, wanted, compute)
  check.faults += [fault] if fault else []


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
  """KL(wanted || found) in nats of each row of logits."""
  p, q = (_log_softmax(x.astype(np.float64)) for x in (wanted, found))
  return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def bound(dtypes: Sequence[str], largest: float) -> tuple[str, float]:
  """What is bounded for these dtypes: ('difference' or 'kl', at most).

  dtypes: of the computation and of the weights. largest: of the logits.
  """
  coarse = [KL_NATS[d] for d in dtypes if d in KL_NATS]
  if coarse:
    return 'kl', max(coarse)
  return 'difference', LOGITS * max(1.0, largest / LARGEST)


def beyond(check: Check, wanted: Reference, compute: str) -> str:
  """What is above its bound, in words; '' if nothing is. NaN is above."""
  dtypes = compute, NAMES.get(check.dtype, check.dtype)
  name, most = bound(dtypes, wanted.largest)
  value = getattr(check, name)
  if value <= most:
    return ''
  what = {
    'difference': 'the largest difference of logits',
    'kl': 'the mean divergence of predictions (nats)',
  }
  return f'{what[name]} is {value:.2g}; at most {most:.2g}'


def compare_prompts(
  check: Check, wanted: Sequence[prompts_lib.Prompt], ids: Sequence
) -> None:
  """Counts the prompts of the same ids; a fault for the first other.

  ids: of each prompt, or why it could not be made.
  """
  same = [tuple(own) == p.ids for p, own in zip(wanted, ids, strict=True)]
  check.prompts = sum(same)
  if not all(same):
    i = same.index(False)
    if isinstance(ids[i], str):
      check.faults.append(f'prompt {i + 1} cannot be rendered: {ids[i]}')
      return
    at = first_difference(wanted[i].ids, ids[i])
    check.faults.append(
      f'prompt {i + 1} of {len(same)} is tokenised otherwise, from token '
      f'{at + 1} on'
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
  """The first index at which they differ; their common length if none."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
