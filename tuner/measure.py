"""Base and tuned on the same held-out rows: loss, answers, scores, files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tuner import constraint as constraint_lib
from tuner import dataset, rundir, summary
from tuner import experiment as experiment_lib
from tuner.data import mask as mask_lib
from tuner.data import rows as rows_lib
from tuner.data import sources, store
from tuner.data import split as split_lib
from tuner.data import template as template_lib
from tuner.evals import generative, loss, stats
from tuner.generate import constrain, engine
from tuner.models import policy


class HeldOut:
  """A split's rows, tokenised once, and how to measure a policy on them.

  Raises ValueError for rows that cannot be measured, before a model is there.

  answers: how many of the rows, from the first, are answered by generating;
  None: all. The loss is of all rows.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    rows: store.Table,
    answers: int | None = None,
  ):
    self.experiment = experiment
    self.answers = answers
    config = experiment.config
    self.examples = dataset.encode(
      config, rows, experiment.tokenizer, experiment.stop_ids
    )
    experiment_lib.check_examples(self.examples, experiment.model)
    # Without those that too_long='drop' leaves out: loss and answers are of
    # the same rows.
    self.rows = rows.take(np.unique(self.examples.row))
    # A text has no prompt to answer.
    is_chat = self.rows.column('kind') == rows_lib.KINDS.index('chat')
    self.answered = self.rows.take(np.flatnonzero(is_chat)[:answers])
    self.metrics = generative.find(config.evaluate.metrics)
    self.constraint = constraint_lib.read(config.evaluate.constraint)
    self.grammar: constrain.Grammar | None = None
    if self.has_answers:
      self._check_answers()
      self.grammar = self._grammar()
    self.source = sources.once(
      # A token is a token: rows weigh in training only.
      dataclasses.replace(self.examples, weight=None),
      config.batch.rows // config.batch.accumulate,
      config.batch.tokens,
      jax.process_index(),
      jax.process_count(),
    )
    self._width = max(
      len(self.source.bins[i]) for i in range(len(self.source.bins))
    )

  @property
  def has_answers(self) -> bool:
    """Whether anything is generated."""
    return bool(self.metrics) and len(self.answered) > 0

  def loss(self, tuned: policy.Policy):
    """(nats a target token with its interval, n rows)."""
    nats_N, targets_N = self._sums(tuned)
    return loss.held_out(nats_N, targets_N, self.examples.row, stats.SEED)

  def losses(self, tuned: policy.Policy) -> np.ndarray:
    """Nats a target token of each of self.examples; nan without a target."""
    nats_N, targets_N = self._sums(tuned)
    found = np.full(len(nats_N), np.nan)
    return np.divide(nats_N, targets_N, out=found, where=targets_N > 0)

  def _sums(self, tuned):
    """(nats, targets) of each of self.examples."""
    reach = self.source.longest

    def sums_of(batch):
      put = self.experiment.put(batch)
      return _nats(tuned.model, put, reach, tuned.chunk, self._width)

    return loss.by_example(sums_of, self.source, len(self.examples))

  def answer(self, tuned: policy.Policy) -> generative.Result:
    """Greedy answers to every prompt, scored by config.evaluate.metrics."""
    own, tokenizer = self.experiment.config.evaluate, self.experiment.tokenizer
    stop_ids, grammar = self.experiment.stop_ids, self.grammar
    prompts, references = zip(*self._turns, strict=True)
    requests = [
      engine.Request(
        prompt, own.max_tokens, constraint=grammar and grammar.start()
      )
      for prompt in prompts
    ]
    answers = engine.generate(tuned.model, requests, stop_ids, own.rows)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    return generative.score(
      self.asked(),
      references,
      [answer.ids for answer in answers],
      decode,
      stop_ids,
      self.metrics,
      stats.SEED,
      [answer.logprobs for answer in answers],
    )

  def asked(self) -> list[rows_lib.Row]:
    """The rows that are answered, as the metrics see them."""
    return [_asked(row) for row in self.answered]

  @functools.cached_property
  def _turns(self) -> list[tuple[list[int], str]]:
    """`last_turns` of the rows to be answered."""
    own, config = self.experiment, self.experiment.config
    limit = dataset.limit(config) if self.examples.left_out else None
    return last_turns(
      self.answered, own.tokenizer, own.stop_ids, config.data.loss, limit
    )

  def _grammar(self) -> constrain.Grammar | None:
    """The constraint for the tokenizer. Raises ValueError."""
    if self.constraint is None:
      return None
    own = self.experiment
    try:
      vocabulary = constrain.Vocabulary(
        own.tokenizer, own.model.config.V, own.stop_ids
      )
      return vocabulary.grammar(self.constraint)
    except ValueError as error:
      raise ValueError(f'{constraint_lib.WHERE}: {error}') from error

  def _check_answers(self) -> None:
    """Raises ValueError for what would fail once the model has answered."""
    for name, metric in self.metrics.items():
      for i, (_, reference) in enumerate(self._turns):
        try:
          metric.check(reference, self.answered[i])
        except ValueError as error:
          where = self.answered.where(i)
          raise ValueError(
            f'{where}: config.evaluate.metrics: {name}: {error}'
          ) from error
    limit = self.experiment.model.config.max_positions
    lengths = [len(ids) for ids, _ in self._turns]
    longest, room = max(lengths), self.experiment.config.evaluate.max_tokens
    if longest >= limit:
      raise ValueError(
        f'{self.answered.where(lengths.index(longest))}: the prompt has '
        f'{longest} tokens and the model {limit} positions, which leaves none '
        'for an answer; wanted: a shorter prompt, or config.evaluate.metrics=()'
      )
    if longest + room > limit:
      raise ValueError(
        f'config.evaluate.max_tokens: {room}; the longest held-out prompt has '
        f'{longest} tokens, and the model {limit} positions: at most '
        f'{limit - longest}.'
      )

  def key(self, system: Any) -> str:
    """What a written result depends on: rows, tokens, decoding, system."""
    return _sha256([self._own_key, system])

  @functools.cached_property
  def _own_key(self) -> str:
    own = self.experiment.config.evaluate
    return _sha256(
      [
        split_lib.digest(self.rows),
        [self.rows.where(i) for i in range(len(self.rows))],
        self.examples.fingerprint,
        self._turns if self.has_answers else [],
        list(self.experiment.stop_ids),
        sorted((name, m.resolved) for name, m in self.metrics.items()),
        own.max_tokens,
        len(self.answered),
        template_lib.identity(self.experiment.tokenizer),
        *([dataclasses.asdict(self.constraint)] if self.constraint else []),
      ]
    )

  def found(
    self, folder: pathlib.Path, suite: str, system: Any
  ) -> dict[str, Any] | None:
    """What `measure` has written of the same rows and system, if it has."""
    written = summary.record(folder / f'{suite}.json') or {}
    return written if written.get('key') == self.key(system) else None

  def measure(
    self,
    folder: pathlib.Path,
    suite: str,
    tuned: policy.Policy,
    system: Any,
    around: Callable[
      [], contextlib.AbstractContextManager
    ] = contextlib.nullcontext,
  ) -> dict[str, Any]:
    """Loss and scores of one system, written to `folder` as `suite`.

    A result that is there already, of the same rows and system, is read;
    around(): entered for as long as rows are looked at.
    """
    if written := self.found(folder, suite, system):
      return written
    with around():
      nats_N, targets_N = self._sums(tuned)
      row_N = self.examples.row
      found = loss.held_out(nats_N, targets_N, row_N, stats.SEED)
      result = generative.Result([], {}, {})
      if self.has_answers:
        result = self.answer(tuned)
      self._write_losses(folder, suite, loss.by_row(nats_N, targets_N, row_N))
      others = {'nats_per_token': found}
      generative.write(folder, suite, result, others, self.key(system))
    return json.loads((folder / f'{suite}.json').read_text(encoding='utf-8'))

  def _write_losses(self, folder, suite, sums) -> None:
    """Writes <suite>.losses.jsonl: nats and targets of each row."""
    # Examples name rows as they were before rows without any were left out.
    place = {row: i for i, row in enumerate(np.unique(self.examples.row))}
    lines = [
      json.dumps(
        {
          'id': self.rows.where(place[row]),
          'nats': float(nats),
          'targets': float(targets),
        },
        ensure_ascii=False,
      )
      for row, nats, targets in zip(*sums, strict=True)
    ]
    text = ''.join(line + '\n' for line in lines)
    rundir.make_folder(folder)
    rundir.write_whole(folder / f'{suite}.losses.jsonl', text)


@functools.partial(jax.jit, static_argnames=('reach', 'chunk', 'width'))
def _nats(model, batch, reach, chunk, width):
  """Sums by row of a batch; compiled once for every system of one kind."""
  runner = policy.Policy(model, reach, chunk=chunk)
  return loss.sums_by_row(runner.logprobs(batch), batch, width)


def _sha256(value) -> str:
  text = json.dumps(value, sort_keys=True)  # A record read again is sorted.
  return hashlib.sha256(text.encode()).hexdigest()


def _asked(row: rows_lib.Row) -> rows_lib.Row:
  """The row whose prompt is all before its last turn, which is answered."""
  return dataclasses.replace(row, n_prompt=None)


def last_turns(
  rows, tokenizer, stop_ids, loss='assistant', max_tokens=None
) -> list[tuple[list[int], str]]:
  """(ids that generation starts from, what it should write) of each row.

  That is the content of the last turn, or where it calls tools or reasons, all
  that the template makes of it, to the stop token; whatever its `train` says.
  loss: config.data.loss. max_tokens: of a longer row the oldest turns are left
  out, as too_long='truncate_prompt' does; None: of none. Raises ValueError.
  """
  encode = mask_lib.encoder(
    tokenizer,
    stop_ids,
    max_tokens or 2**31,
    'last' if loss == 'all' else loss,
    'truncate_prompt' if max_tokens else 'error',
  )
  found = []
  for row in rows:
    *before, last = row.messages
    is_plain = not {'tool_calls', 'reasoning_content'} & last.keys()
    reference, prompt = last['content'], None
    if max_tokens or not is_plain:
      trained = (*before, {**last, 'train': True})
      (own,) = encode([dataclasses.replace(row, messages=trained)])
      if isinstance(own, rows_lib.Refused):
        raise ValueError(f'{row.where}: {own}')
      ids, start, stop = _last_run(*own[-1])
      if not is_plain:
        reference = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
      if own.left_out:
        prompt = ids[:start]
    if prompt is None:
      prompt = template_lib.prompt_ids(_asked(row), tokenizer)
    found.append((prompt, reference))
  return found


def _last_run(ids, mask) -> tuple[list[int], int, int]:
  """(ids, first trained token of the last turn, its stop token)."""
  stop = int(np.flatnonzero(mask)[-1])
  start = int(np.flatnonzero(mask[:stop] == 0)[-1]) + 1
  return ids.tolist(), start, stop
