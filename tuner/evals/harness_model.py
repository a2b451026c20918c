"""A policy as a model of EleutherAI's lm-eval: text in, numbers or text out.

The conventions are those of its own `hf` model, so that its tasks mean here
what they mean there: a pair is tokenised as one text and split where the
context ends, a text without context follows the token that begins a text, and
what is too long loses its left end.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from lm_eval import defaults, evaluator, tasks, utils
from lm_eval.api import model as model_lib
from lm_eval.models import utils as model_utils

from tuner.evals import likelihood
from tuner.generate import engine, sampling
from tuner.models import policy

# The library's parts that `harness` uses come with the model.
__all__ = ('Model', 'defaults', 'evaluator', 'tasks')

MAX_TOKENS = 256  # Of an answer whose task says no number.
DRAWN = ('temperature', 'top_k', 'top_p', 'min_p')  # Of sampling.Sampling.
SETTINGS = ('until', 'max_gen_toks', 'do_sample', *DRAWN)
# Settings without effect at these values.
IDLE = {'num_beams': 1, 'num_return_sequences': 1, 'repetition_penalty': 1.0}


class Model(model_lib.TemplateLM):
  """What lm-eval asks of a model, answered by a policy.

  truncated: how many pairs and prompts lost their left end so far. tasks are
  the caller's; `lm_eval.evaluator.evaluate(Model(...), ...)` runs them.
  """

  def __init__(
    self,
    runner: policy.Policy,
    tokenizer: Any,
    stop_ids: Sequence[int],
    rows: int = 8,
    tokens: int = 1024,
  ):
    """rows, tokens: of a batch of packed pairs; rows: answers at a time."""
    super().__init__()
    self.runner, self.tokenizer = runner, tokenizer
    self.stop_ids, self.rows, self.tokens = tuple(stop_ids), rows, tokens
    self.max_length = runner.model.config.max_positions
    self.truncated = 0
    if tokenizer.eos_token_id is None:
      raise ValueError(
        'the tokenizer names no eos_token; wanted: one, which ends a text and '
        'stands before a text where there is no bos_token'
      )

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    return self.tokenizer.name_or_path.replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Ids, with the tokenizer's own first token unless it is there already."""
    del kwargs
    if add_special_tokens is None:
      first = self.tokenizer.decode([self.prefix_token_id])
      add_special_tokens = not string.startswith(first)
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """The text of a conversation; without the generation prompt it goes on.

    Where a template refuses a system message it is left out, as in lm-eval.
    """
    try:
      return self._render(chat_history, add_generation_prompt)
    except jinja2.exceptions.TemplateError:
      rest = [one for one in chat_history if one['role'] != 'system']
      if len(rest) == len(chat_history):
        raise
      return self._render(rest, add_generation_prompt)

  def _render(self, messages, add_generation_prompt):
    return self.tokenizer.apply_chat_template(
      messages,
      tokenize=False,
      add_generation_prompt=add_generation_prompt,
      continue_final_message=not add_generation_prompt,
    )

  def _loglikelihood_tokens(
    self, requests: Iterable, **kwargs
  ) -> list[tuple[float, bool]]:
    """(log p, is_greedy) of (anything, context ids, continuation ids)."""
    del kwargs
    scored = likelihood.score(
      self.runner,
      [(context, continuation) for _, context, continuation in requests],
      self.rows,
      self.tokens,
      too_long='truncate_context',
    )
    self.truncated += sum(one.cut > 0 for one in scored)
    return [(-one.nats, one.is_greedy) for one in scored]

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """log p of each whole text, in windows of all that the model looks at.

    Each token is predicted once; the last window has a full context.
    """
    del disable_tqdm
    windows, owners = [], []
    for i, request in enumerate(requests):
      found = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for window in map(utils.make_disjoint_window, found):
        windows.append((None, *window))
        owners.append(i)
    totals = [0.0] * len(requests)
    scored = self._loglikelihood_tokens(windows)
    for i, (logprob, _) in zip(owners, scored, strict=True):
      totals[i] += logprob
    return totals

  def generate_until(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """What the model writes after each context, to the first of its `until`.

    Where a task samples, what it leaves out of top_k, top_p and min_p is off,
    and the seed is the request's place, so that repeats differ.
    """
    del disable_tqdm
    asked = [self._request(i, one) for i, one in enumerate(requests)]
    decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
    texts = [''] * len(asked)
    stops = [self._stop_ids(one.stop) for one in asked]
    for own in sorted(set(stops)):
      chosen = [i for i, other in enumerate(stops) if other == own]
      answers = engine.generate(
        self.runner.model, [asked[i] for i in chosen], own, self.rows, decode
      )
      for i, answer in zip(chosen, answers, strict=True):
        texts[i] = model_utils.postprocess_generated_text(
          decode(answer.ids), list(asked[i].stop), None
        )
    return texts

  def _request(self, i, request) -> engine.Request:
    context, settings = request.args
    own = _settings(settings, request)
    eos = self.tokenizer.decode([self.eot_token_id])
    until = model_utils.handle_stop_sequences(own['until'], eos)
    drawn = {}
    if own['do_sample']:
      drawn = {name: own[name] for name in DRAWN if own.get(name) is not None}
    return engine.Request(
      self._prompt(context, own['max_gen_toks']),
      own['max_gen_toks'],
      sampling.Sampling(**drawn),
      seed=i,
      stop=tuple(stop for stop in until if stop),
    )

  def _stop_ids(self, stop) -> tuple[int, ...]:
    """Those of the model, and of stop strings that no text shows."""
    special = set(stop).intersection(self.tokenizer.all_special_tokens)
    found = self.tokenizer.convert_tokens_to_ids(sorted(special))
    return tuple(sorted({*self.stop_ids, *found}))

  def _prompt(self, context, max_tokens):
    """Ids of the context's end, with room for max_tokens."""
    room = self.max_length - max_tokens
    if room < 1:
      raise ValueError(
        f'a task asks for max_gen_toks = {max_tokens}; the model has '
        f'{self.max_length} positions, and its prompt needs some of them'
      )
    first = self.tokenizer.bos_token
    has_first = bool(first) and context.startswith(first)
    ids = self.tok_encode(context, add_special_tokens=not has_first)
    self.truncated += len(ids) > room
    return ids[-room:]


def _settings(given, request):
  """A task's generation settings, each of them known. Raises ValueError."""
  own = model_utils.normalize_gen_kwargs(given, MAX_TOKENS)
  for name, value in own.items():
    if name in SETTINGS or (name in IDLE and value == IDLE[name]):
      continue
    raise ValueError(
      f'task {request.task_name!r} asks to generate with {name}={value!r}; '
      f'known are {", ".join(SETTINGS)}, and {IDLE}'
    )
  if own['do_sample'] and not own.get('temperature'):
    raise ValueError(
      f'task {request.task_name!r} asks for do_sample and says no temperature; '
      'wanted: one above 0'
    )
  return own
