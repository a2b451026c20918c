"""Answers held to a JSON schema, to a regex, or to being JSON at all.

A Constraint says what is wanted; a Vocabulary makes a Grammar of it for one
tokenizer; the Grammar starts a Matcher for each request. Before each token it
says as a bitmask which tokens lead to an answer, and stop tokens are among them
exactly where the answer may end. So whatever the model's logits, an
answer that ends by a stop token satisfies its constraint, and one that would
have done so anyway is not changed.

By llguidance: one wheel of 3 MB without dependencies, where xgrammar 0.2 needs
torch; it refuses what it cannot hold to, which outlines-core 0.2 lets pass.

Properties come in the order in which the schema lists them; those matched by
patternProperties come in any order, and may come twice. Where only one text
can follow, the tokens that the tokenizer makes of it are the only ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from tuner.generate import guidance, sampling

KINDS = ('json_schema', 'regex', 'json')


@dataclasses.dataclass(frozen=True)
class Constraint:
  """What an answer must be: its kind, and the text of the schema or regex.

  kind: json_schema, regex (of Rust's syntax, for the whole answer), or json,
  whose text is empty. Raises ValueError for a schema or regex that is wrong,
  that the library cannot hold to, or that nothing satisfies.
  """

  kind: str
  text: str = ''

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'constraint.kind: {self.kind!r}; it must be one of {", ".join(KINDS)}.'
      )
    if not isinstance(self.text, str):
      raise ValueError(f'constraint.text: {self.text!r}; it must be a string.')
    try:
      self.grammar()
    except ValueError as error:
      raise ValueError(f'constraint.text: {error}.') from None

  def grammar(self) -> str:
    """The same in the library's language."""
    if self.kind == 'regex':
      return guidance.of_regex(self.text)
    if self.kind == 'json_schema':
      return guidance.of_schema(self.text)
    if self.text:
      raise ValueError(
        f'{self.text!r}, but any JSON needs none; a schema is of kind '
        "'json_schema'"
      )
    return guidance.of_json()


class Vocabulary:
  """The tokens of a model, as the library knows them; to be made once.

  tokenizer: a fast tokenizer of transformers. size: rows of the embedding;
  those that are no tokens are never allowed. stop_ids: what ends an answer.
  Raises ValueError.
  """

  def __init__(self, tokenizer, size: int, stop_ids: Sequence[int]):
    if not getattr(tokenizer, 'is_fast', False):
      raise ValueError(
        f'{type(tokenizer).__name__} is not a fast tokenizer, one with a '
        'tokenizer.json; constrained decoding needs its tokens as bytes.'
      )
    known = len(tokenizer)
    most = min(known, size)
    if not stop_ids or not all(0 <= i < most for i in stop_ids):
      raise ValueError(
        f'stop_ids: {list(stop_ids)}; wanted: one or more ids from 0 to '
        f'{most - 1}, or a constrained answer could not end.'
      )
    self.size = size
    self.stop_ids = frozenset(stop_ids)
    self.tokens = guidance.library().LLTokenizer(
      _plain(tokenizer.backend_tokenizer).to_str(),
      n_vocab=max(known, size),
      eos_token=list(stop_ids),
    )
    self._stops = _bits(self.stop_ids, size)
    self._others = _bits(set(range(most)) - self.stop_ids, size)

  def grammar(self, constraint: Constraint) -> Grammar:
    """The constraint for these tokens. Raises ValueError if none can start."""
    return Grammar(constraint, self)

  def mask(self, words: np.ndarray, may_end: bool) -> np.ndarray:
    """The library's bitmask with stop tokens where the answer may end."""
    words = words[: len(self._others)] & self._others
    return words | self._stops if may_end else words


class Grammar:
  """A constraint for the tokens of a vocabulary."""

  def __init__(self, constraint: Constraint, vocabulary: Vocabulary):
    self.constraint = constraint
    self.vocabulary = vocabulary
    self._first = guidance.library().LLMatcher(
      vocabulary.tokens, constraint.grammar(), log_level=0
    )
    try:
      self.start().allowed()
    except RuntimeError as error:
      raise ValueError(
        f'constraint: {constraint.kind} {constraint.text!r} cannot be said in '
        f"the tokenizer's tokens: {error}"
      ) from None

  def start(self) -> Matcher:
    """A Matcher before its first token."""
    return Matcher(self.vocabulary, self._first.deep_copy())


class Matcher:
  """How far one answer has come, and what may follow: what a Request carries.

  It is spent when its answer has ended; each request has its own.
  """

  def __init__(self, vocabulary: Vocabulary, matcher):
    self._vocabulary = vocabulary
    self._matcher = matcher
    self._has_stopped = False

  @property
  def is_over(self) -> bool:
    """Whether nothing but a stop token may follow."""
    return self._has_stopped or self._matcher.is_stopped()

  @property
  def may_end(self) -> bool:
    """Whether what was said satisfies the constraint as it is."""
    return self._has_stopped or self._matcher.is_accepting()

  def allowed(self) -> np.ndarray:
    """uint32 [ceil(size / 32)]: bit i of word w is token 32 w + i.

    At least one is set. Raises RuntimeError where nothing can follow, or the
    library gave up on a grammar that is too complex.
    """
    if self._has_stopped:
      raise RuntimeError('the answer has ended by a stop token.')
    words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    # After a failure the library allows the stop token, as if all were well.
    self._check()
    words = self._vocabulary.mask(words, self._matcher.is_accepting())
    if not words.any():
      raise RuntimeError(
        'the constraint allows no token here: none of the vocabulary begins '
        'what it asks for.'
      )
    return words

  def accept(self, token: int) -> None:
    """Goes on by a token. Raises ValueError for one that cannot follow."""
    is_stop = token in self._vocabulary.stop_ids
    if is_stop and not self._has_stopped and self._matcher.is_accepting():
      self._has_stopped = True
      return
    # A refused token would leave the library in its error state.
    can_follow = not (is_stop or self._has_stopped) and (
      0 <= token < self._vocabulary.size
      and self._matcher.validate_tokens([token])
    )
    if not can_follow:
      raise ValueError(f'token {token} cannot follow here in the constraint.')
    self._matcher.consume_token(token)
    self._check()

  def _check(self):
    if self._matcher.is_error():
      error = guidance.reason(self._matcher.get_error())
      raise RuntimeError(f'llguidance gave up on the constraint: {error}')


def _plain(backend):
  """The tokenizer, which may have been told to pad or cut, without that."""
  if backend.padding or backend.truncation:
    backend = type(backend).from_str(backend.to_str())
    backend.no_padding()
    backend.no_truncation()
  return backend


def _bits(ids: Iterable[int], size: int) -> np.ndarray:
  """uint32 words with the bits of these ids."""
  is_set = np.zeros(-(-size // sampling.WORD) * sampling.WORD, np.uint8)
  is_set[list(ids)] = 1
  return np.packbits(is_set, bitorder='little').view('<u4').astype(np.uint32)
