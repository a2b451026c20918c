"""How much of the material is measured, so that it costs what it may.

Costs are in training tokens, so that a share of training's tokens is about that
share of its time. FORWARD and GENERATED are above what a LoRA on SmolLM2-135M
took on two cores (0.4 and 1.3 of a training token's processor time, padding
included), as programs are to be compiled, too; tokens of full fine-tuning cost
more, and these are less of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tuner import sections
from tuner.evals import general

# What a token costs that is looked at, or generated.
FORWARD = 0.5
GENERATED = 3.0
TEXTS, QUIZ = 0.4, 0.2  # of the budget; answers have the rest
LENGTHS = (128, 64, 32)  # of an answer, at most; the first that leaves MANY
MANY = 24
FEWEST = 4  # An interval of fewer says nothing: the part is not measured.
QUESTION = 'Question: {}\nAnswer:'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is measured; a part may be empty.

  max_tokens: of an answer. cost: of a measurement, in training tokens. lines:
  what is measured, what is not, and why.
  """

  texts: list[general.Text]
  quiz: list[general.Record]
  prompts: list[general.Prompt]
  max_tokens: int
  cost: float
  lines: list[str]

  @property
  def identity(self) -> list[Any]:
    """All that answers and likelihoods depend on, beside the model."""
    return [
      [[text.kind, *text.ids] for text in self.texts],
      [prompt.ids for prompt in self.prompts],
      [self.quiz, QUESTION, self.max_tokens],
    ]


def allowance(share: float, tokens: int, measurements: int) -> float:
  """Training tokens that one of so many measurements of a run may cost."""
  return share * tokens / max(1, measurements)


def make(
  config: sections.Retention, tokenizer: Any, positions: int, budget: float
) -> Plan:
  """What fits the budget, in training tokens, on a model of these positions.

  Raises ValueError for rows that cannot be read or measured.
  """
  material = general.load(config, tokenizer, positions)
  encode = general.encoder(tokenizer)

  def question_tokens(row):
    asked = len(encode(QUESTION.format(row['question'])))
    return sum(asked + len(encode(choice)) for choice in row['choices'])

  texts = _first(material.texts, lambda t: len(t.ids), TEXTS * budget)
  quiz = _first(material.quiz, question_tokens, QUIZ * budget)
  cost = FORWARD * sum(len(text.ids) for text in texts)
  cost += FORWARD * sum(map(question_tokens, quiz))
  max_tokens, prompts = _answers(material.prompts, budget - cost, positions)
  cost += sum(_answer_cost(prompt, max_tokens) for prompt in prompts)
  plan = Plan(texts, quiz, prompts, max_tokens, cost, [])
  return dataclasses.replace(plan, lines=_describe(plan, material, budget))


def _first(rows: Sequence, tokens_of: Callable, budget: float) -> list:
  """As many of the first rows as may be looked at; none if too few."""
  spent, kept = 0.0, []
  for row in rows:
    spent += FORWARD * tokens_of(row)
    if spent > budget:
      break
    kept.append(row)
  return kept if len(kept) >= FEWEST else []


def _answers(
  prompts: Sequence[general.Prompt], budget: float, positions: int
) -> tuple[int, list[general.Prompt]]:
  """(the most tokens of an answer, the prompts), as long as MANY allow."""
  for length in LENGTHS:
    costs = np.cumsum([_answer_cost(prompt, length) for prompt in prompts])
    kept = list(prompts[: int((costs <= budget).sum())])
    kept = kept if len(kept) >= FEWEST else []
    long = [prompt for prompt in kept if len(prompt.ids) + length > positions]
    if len(kept) >= min(MANY, len(prompts)) and not long:
      break
  if long:
    raise ValueError(
      f'{long[0].where}: prompt: {len(long[0].ids)} tokens, and an answer of '
      f'up to {length}; the model has {positions} positions'
    )
  return length, kept


def _answer_cost(prompt: general.Prompt, length: int) -> float:
  """Read by both models and once more by the tuned one, which answers it."""
  looked_at = 3 * len(prompt.ids) + 2 * length
  return FORWARD * looked_at + GENERATED * length


def _describe(
  plan: Plan, material: general.Material, budget: float
) -> list[str]:
  tokens = sum(len(text.ids) for text in plan.texts)
  cut = sum(text.is_cut for text in plan.texts)
  says = {
    'texts': f'{len(plan.texts)} of {len(material.texts)} texts '
    f'({tokens:,} tokens, {cut} cut at {general.TEXT_TOKENS})',
    'quiz': f'{len(plan.quiz)} of {len(material.quiz)} questions',
    'prompts': f'{len(plan.prompts)} of {len(material.prompts)} prompts with '
    f'answers of at most {plan.max_tokens} tokens',
  }
  taken = [text for name, text in says.items() if getattr(plan, name)]
  lines = list(material.missing)
  if taken:
    lines.insert(
      0,
      f'retention: {", ".join(taken)}; a measurement is to cost '
      f'{plan.cost:,.0f} of the {budget:,.0f} training tokens that it may',
    )
  lines += [
    f'{name} not measured: {budget:,.0f} training tokens a measurement do not '
    f'pay for {FEWEST} of them; raise config.retention.share'
    for name in says
    if getattr(material, name) and not getattr(plan, name)
  ]
  return lines
