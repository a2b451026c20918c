"""What a tuned model has kept of its base's general ability.

Nats a token of general text, a quiz by likelihood, and, on the base's own
greedy answers to neutral prompts, how far the tuned model's predictions are
from the base's (Kullback-Leibler divergence, and whether both find the same
token the most likely). Beside them, how long its own answers are and how often
they refuse. Each with n and a 95 % interval over texts, questions or prompts,
not over tokens, which are not independent.

A measurement is cut to what it may cost before anything is measured, and says
so.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuner import mesh as mesh_lib
from tuner import rundir, sections
from tuner.data import chat, pack, sources
from tuner.evals import general, likelihood, plan, stats
from tuner.generate import greedy
from tuner.models import decoder, divergence, policy

ROWS, TOKENS = 4, 512  # of a batch: little padding, also of little
# An answer that says one of these in its first OPENING characters refuses.
OPENING = 160
REFUSALS = (
  "i can't", 'i cannot', 'i can not', "i'm sorry", 'i am sorry',
  'i apologize', 'i apologise', 'as an ai', "i'm unable", 'i am unable',
  "i'm not able", 'i am not able', "i won't", 'i will not', 'i must decline',
  "i'm not allowed", 'i am not allowed', 'i refuse',
)  # fmt: skip
ABOVE = (0.0, float('inf'))
Metrics = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Side:
  """What one model made of the material; the order is the material's."""

  nats: list[float]
  right: list[bool]
  answers: list[list[int]]


class Retention:
  """The material, cut to the budget, and how a policy is measured on it.

  budget: what a measurement may cost, in training tokens, see
    plan.allowance.
  folder: where what the base made of it is kept, for a run that goes on later;
  base_key: what that depends on beside the material, such as a hash of weights.

  Raises ValueError for rows that cannot be read, before a model is there.
  """

  def __init__(
    self,
    config: sections.Retention,
    tokenizer: Any,
    stop_ids: Sequence[int],
    model: decoder.Decoder,
    budget: float,
    folder: pathlib.Path | None = None,
    base_key: str = '',
  ):
    self._tokenizer, self._stop_ids = tokenizer, tuple(stop_ids)
    self._folder, self._base_key = folder, base_key
    self.plan = plan.make(config, tokenizer, model.config.max_positions, budget)
    self._encode = general.encoder(tokenizer)
    self._base: Side | None = None

  @property
  def key(self) -> str:
    """What the numbers depend on beside the models: a hash of the material."""
    own = [self.plan.identity, list(self._stop_ids), REFUSALS, OPENING]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()

  @property
  def lines(self) -> list[str]:
    """What is measured, what is not, and why."""
    return self.plan.lines

  def measure(self, tuned: policy.Policy, base: policy.Policy) -> Metrics:
    """{name: {'value', 'low', 'high', 'n'}} of the tuned model.

    general_nats: a token of general text, of all and '.kind'; nats_increase:
    over the base. kl_nats: KL(tuned || base) a token; top1: share of tokens on
    which both agree. quiz: share right; quiz_increase. answer_tokens: without
    the stop token, at most max_tokens; answer_ratio: to the base's;
    answers_ended: share with a stop token. refusals: share; refusals_increase.
    What is not measured is not there.

    The base is measured once, the first time. Where `tuned` is `base` itself,
    it is compared with itself at no cost.
    """
    there = self._of_base(base)
    own = there if tuned is base else self._side(tuned)
    metrics = {**self._of_texts(own, there), **self._of_quiz(own, there)}
    if self.plan.prompts:
      is_same = tuned is base
      compared = None if is_same else self._compared(tuned, base, there)
      metrics |= self._of_predictions(there, compared)
      metrics |= self._of_answers(own, there)
    return metrics

  # What the models do.

  def _of_base(self, base: policy.Policy) -> Side:
    if self._base is None:
      key = hashlib.sha256((self.key + self._base_key).encode()).hexdigest()
      self._base = _read(self._folder, key) or self._side(base)
      _write(self._folder, key, self._base)
    return self._base

  def _side(self, runner: policy.Policy) -> Side:
    # In one call: one shape to compile, and one batch to fill up.
    pairs: list[likelihood.Pair] = [
      (text.ids[:1], text.ids[1:]) for text in self.plan.texts
    ]
    pairs += [pair for row in self.plan.quiz for pair in self._choices(row)]
    nats = [one.nats for one in likelihood.score(runner, pairs, ROWS, TOKENS)]
    of_choices = iter(nats[len(self.plan.texts) :])
    right = []
    for row in self.plan.quiz:
      own = [next(of_choices) for _ in row['choices']]
      right.append(int(np.argmin(own)) == row['answer'])
    answers = greedy.generate(
      runner.model,
      [prompt.ids for prompt in self.plan.prompts],
      self._stop_ids,
      self.plan.max_tokens,
    )
    return Side(nats[: len(self.plan.texts)], right, answers)

  def _choices(self, row: general.Record) -> list[likelihood.Pair]:
    asked = plan.QUESTION.format(row['question'])
    return [
      likelihood.encode_pair(self._encode, asked, ' ' + choice)
      for choice in row['choices']
    ]

  def _compared(self, tuned, base, there: Side):
    """(KL, agreement) summed over each of the base's answers."""
    pairs = [
      (p.ids, ids)
      for p, ids in zip(self.plan.prompts, there.answers, strict=True)
    ]
    source, reach = _batches(pairs)
    sums = np.zeros((2, len(pairs)))
    for i, batch in enumerate(source):
      batch = {name: rows[0] for name, rows in batch.items()}
      found = _compare(tuned.model, base.model, batch, reach, tuned.chunk)
      for total, value_BT in zip(sums, map(np.asarray, found), strict=True):
        for b, ids in enumerate(source.ids(i)):
          lengths = [len(pairs[n][0]) + len(pairs[n][1]) for n in ids]
          starts = np.cumsum([0, *lengths[:-1]])
          if len(ids):
            total[ids] = np.add.reduceat(value_BT[b].astype(float), starts)
    return sums

  # What is made of it.

  def _of_texts(self, own: Side, there: Side) -> Metrics:
    if not self.plan.texts:
      return {}
    tokens = np.array([len(t.ids) - 1 for t in self.plan.texts])
    nats, before = np.array(own.nats), np.array(there.nats)
    kinds = np.array([t.kind for t in self.plan.texts])
    named = sorted(set(kinds) - {''})
    groups = {'general_nats': np.full(len(kinds), True)}
    groups |= {f'general_nats.{kind}': kinds == kind for kind in named}
    metrics = {
      name: _mean(nats[group] / tokens[group], tokens[group])
      for name, group in groups.items()
    }
    metrics['nats_increase'] = _mean(
      (nats - before) / tokens, tokens, stats.UNBOUNDED
    )
    return metrics

  def _of_quiz(self, own: Side, there: Side) -> Metrics:
    if not self.plan.quiz:
      return {}
    right, before = np.array([own.right, there.right], float)
    change = _metric(stats.paired(right, before, stats.SEED), len(right))
    return {'quiz': _mean(right), 'quiz_increase': change}

  def _of_predictions(self, there: Side, compared) -> Metrics:
    tokens = np.array([len(ids) for ids in there.answers])
    zeros_and_all = np.zeros(len(tokens)), tokens
    kl, agreed = zeros_and_all if compared is None else compared
    return {
      'kl_nats': _mean(kl / tokens, tokens),
      'top1': _mean(agreed / tokens, tokens, (0.0, 1.0)),
    }

  def _of_answers(self, own: Side, there: Side) -> Metrics:
    lengths, before = (
      np.array([len(self._text_ids(ids)) for ids in side.answers], float)
      for side in (own, there)
    )
    refused, refused_before = (
      np.array([self._is_refusal(ids) for ids in side.answers], float)
      for side in (own, there)
    )
    ended = [len(self._text_ids(ids)) < len(ids) for ids in own.answers]
    metrics = {
      'answer_tokens': _mean(lengths),
      'answers_ended': _mean(np.array(ended, float)),
      'refusals': _mean(refused),
      'refusals_increase': _metric(
        stats.paired(refused, refused_before, stats.SEED), len(refused)
      ),
    }
    some = before > 0  # Of an empty answer there is no ratio.
    if some.any():
      ratio = lengths[some] / before[some]
      metrics['answer_ratio'] = _mean(ratio, before[some])
    return metrics

  def _text_ids(self, ids: Sequence[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in self._stop_ids else ids

  def _is_refusal(self, ids: Sequence[int]) -> bool:
    return is_refusal(self._tokenizer.decode(list(self._text_ids(ids))))


def is_refusal(text: str) -> bool:
  """Whether an answer opens with one of REFUSALS, whatever its case."""
  opening = text[:OPENING].lower().replace('’', "'")
  return any(phrase in opening for phrase in REFUSALS)


def _batches(pairs) -> tuple[sources.Once, int]:
  """(packed prompts and answers, of which the answers count, and the reach)."""
  lengths = np.array([len(a) + len(b) for a, b in pairs])
  tokens = np.concatenate([np.array([*a, *b], np.int32) for a, b in pairs])
  mask = [np.arange(len(a) + len(b)) >= len(a) for a, b in pairs]
  examples = chat.Examples(
    tokens,
    np.concatenate(mask).astype(np.uint8),
    np.concatenate([[0], np.cumsum(lengths)]),
    [f'answer {i}' for i in range(len(pairs))],
  )
  width = max(TOKENS, int(lengths.max()))
  bins = pack.pack(lengths, width)
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh_lib.parts(mesh, mesh_lib.RULES['B'])
  rows = -(-min(ROWS, len(bins)) // parts) * parts
  return sources.Once(examples, bins, rows, width, (0, 1)), int(lengths.max())


@functools.partial(jax.jit, static_argnames=('reach', 'chunk'))
def _compare(tuned, base, batch, reach, chunk):
  """(KL, agreement), [B, T] each, of the prediction of each counted token."""
  batch = {name: mesh_lib.constrain(x, 'BT') for name, x in batch.items()}

  def side(model):
    runner = policy.Policy(model, reach, chunk=chunk)
    return divergence.Side.of(runner, runner.hidden(batch)[:, :-1])

  wanted_BT = batch['mask'][:, 1:]
  kl, agrees = divergence.compare(side(tuned), side(base), wanted_BT, chunk)
  return [jnp.pad(x, ((0, 0), (1, 0))) for x in (kl, agrees)]


def _mean(scores: np.ndarray, weights: np.ndarray | None = None, bounds=ABOVE):
  """The mean with its interval; a single row has none (nan).

  bounds: of what a score can be: most are counts and nats, never below 0.
  """
  interval = stats.bootstrap(scores, stats.SEED, weights=weights, bounds=bounds)
  return _metric(interval, len(scores))


def _metric(interval: stats.Interval, n: int) -> dict[str, float]:
  return {
    'value': interval.mean,
    'low': interval.low,
    'high': interval.high,
    'n': n,
  }


# What the base made of the material, kept with the run.

FILE = 'retention.base.kept.json'


def _read(folder: pathlib.Path | None, key: str) -> Side | None:
  if folder is None or not (folder / FILE).is_file():
    return None
  kept = json.loads((folder / FILE).read_text(encoding='utf-8'))
  return Side(**kept['side']) if kept['key'] == key else None


def _write(folder: pathlib.Path | None, key: str, side: Side) -> None:
  if folder is None or jax.process_index():
    return
  folder.mkdir(parents=True, exist_ok=True)
  kept = {'key': key, 'side': dataclasses.asdict(side)}
  rundir.write_whole(folder / FILE, json.dumps(kept) + '\n')
