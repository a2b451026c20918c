"""Greedy decoding: prompts in, answers out, both token ids."""

from collections.abc import Sequence

from tuner.generate import engine
from tuner.models import decoder


def generate(
  model: decoder.Decoder,
  prompts: Sequence[Sequence[int]],
  stop_ids: Sequence[int],
  max_tokens: int,
  rows: int = 64,
) -> list[list[int]]:
  """The most likely continuation of each prompt, its stop token included.

  An answer without a stop token at its end was cut at max_tokens. rows: how
  many are decoded at a time, at most. Raises ValueError for an empty prompt
  and for one that leaves no room within the model's positions.
  """
  requests = [engine.Request(prompt, max_tokens) for prompt in prompts]
  answers = engine.generate(model, requests, stop_ids, rows)
  return [answer.ids for answer in answers]
