"""The two compiled programs of generation: prefill and decode.

Both are functions of arrays alone, so that a program is compiled once for each
shape: prefill for each width of prompts, decode for each number of slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tuner.generate import cache, sampling
from tuner.models import decoder, linear

STEPS = 32  # Tokens a row that one call of decode makes at most.


class Rows(NamedTuple):
  """What each row of a batch goes by, as numpy arrays.

  ends_B: the longest that the text may become. settings: None where all are
  greedy, whose program is the smaller. allowed_BW: see sampling.choose; None:
  every token.
  """

  adapter_B: Any
  ends_B: Any
  seed_B: Any
  settings: sampling.Settings | None
  allowed_BW: Any = None


class Live(NamedTuple):
  """Where each row is: its last token, not yet fed, and what may follow.

  own_B: the last token's own position. left_B: tokens that may follow; 0 for a
  row that has ended.
  """

  token_B: Any
  own_B: Any
  left_B: Any


class Tokens(NamedTuple):
  """The next token of each row and its log probability."""

  token_B: jax.Array
  logprob_B: jax.Array


def rows_of(requests: Sequence[Any], prompts_end: Sequence[int]) -> Rows:
  """The rows of requests, of which None is nobody's."""
  adapters, seeds = ([getattr(r, name, 0) for r in requests]
                     for name in ('adapter', 'seed'))  # fmt: skip
  settings = [getattr(r, 'sampling', sampling.Sampling()) for r in requests]
  is_greedy = all(one.temperature == 0 for one in settings)
  return Rows(
    np.array(adapters, np.int32),
    np.array(prompts_end, np.int32),
    np.array(seeds, np.uint32),
    None if is_greedy else sampling.settings(settings),
  )


@jax.jit(static_argnames=('layout', 'kind'), donate_argnames=('group',))
def prefill(
  stacked: decoder.Decoder,
  group: cache.Memory,
  prefix: cache.Memory,
  layout: cache.Layout,
  kind: str,
  tokens_BT,
  start,
  lengths_B,
  rows: Rows,
) -> tuple[cache.Memory, Tokens]:
  """A group's cache with these tokens in it, and what follows each row's last.

  kind: 'prefill', or 'chunk' of texts whose beginning is in the cache.
  start: the own position of the first tokens. lengths_B: of the rows' own
  tokens, those of other calls included; what follows a row whose last token is
  not among these means nothing.
  """
  width = tokens_BT.shape[1]
  own_BT = jnp.broadcast_to(start + jnp.arange(width), tokens_BT.shape)
  model = linear.for_rows(stacked, rows.adapter_B)
  step = cache.Step(
    model, layout, prefix, rows.adapter_B, own_BT, lengths_B, kind
  )
  x_BTD, group, _ = model(
    tokens_BT, own_BT + layout.prefix, step.attend, group,
    real_BT=own_BT < lengths_B[:, None], lengths_B=rows.ends_B,
  )  # fmt: skip
  last_B = jnp.clip(lengths_B - 1 - start, 0, width - 1)
  x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
  found = _next(model, x_B1D, lengths_B + layout.prefix, rows)
  return cache.held(group), found


@jax.jit(static_argnames=('layout',), donate_argnames=('memory',))
def decode(
  model: decoder.Decoder,
  memory: cache.Memory,
  prefix: cache.Memory,
  layout: cache.Layout,
  live: Live,
  rows: Rows,
  stop_ids,
  steps,
  enough,
) -> tuple[cache.Memory, Tokens, jax.Array]:
  """(cache, tokens and log probabilities [B, STEPS], how many of them count_B).

  Goes on for `steps` steps, STEPS at most, or until `enough` of the rows have
  ended, those included that have nothing left from the start.
  """
  batch = len(live.token_B)
  model = linear.for_rows(model, rows.adapter_B)

  def goes_on(carry):
    step, _, live, *_ = carry
    ended = (live.left_B == 0).sum()
    return (step < steps) & (ended < batch) & (ended < enough)

  def one(carry):
    step, memory, live, out, count_B = carry
    is_live_B = live.left_B > 0
    own_BT = live.own_B[:, None]
    attend = cache.Step(
      model, layout, prefix, rows.adapter_B, own_BT, live.own_B + 1, 'decode'
    ).attend
    x_B1D, memory, _ = model(
      live.token_B[:, None], own_BT + layout.prefix, attend, memory,
      real_BT=is_live_B[:, None], lengths_B=rows.ends_B,
    )  # fmt: skip
    after_B = live.own_B + layout.prefix + 1
    found = _next(model, x_B1D, after_B, rows)
    out = Tokens(*(o.at[:, step].set(f) for o, f in zip(out, found)))
    left_B = live.left_B - is_live_B
    left_B = jnp.where(jnp.isin(found.token_B, stop_ids), 0, left_B)
    live = Live(
      jnp.where(is_live_B, found.token_B, live.token_B),
      live.own_B + is_live_B,
      left_B,
    )
    return step + 1, cache.held(memory), live, out, count_B + is_live_B

  out = Tokens(
    jnp.zeros((batch, STEPS), jnp.int32), jnp.zeros((batch, STEPS), jnp.float32)
  )
  live = Live(*(jnp.asarray(x, jnp.int32) for x in live))
  carry = (0, memory, live, out, jnp.zeros(batch, jnp.int32))
  _, memory, _, out, count_B = jax.lax.while_loop(goes_on, one, carry)
  return memory, out, count_B


def _next(model, x_B1D, positions_B, rows: Rows) -> Tokens:
  """The tokens that follow, at these positions of the texts."""
  logits_BV = model.logits(x_B1D)[:, 0]
  keys_B = sampling.keys(rows.seed_B, positions_B)
  settings = rows.settings
  if settings is None:  # Constants, by which the compiler knows.
    settings = sampling.settings([sampling.Sampling()] * len(logits_BV))
  token_B = sampling.choose(logits_BV, settings, keys_B, rows.allowed_BW)
  own = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  return Tokens(token_B, own - jax.nn.logsumexp(logits_BV, axis=-1))


empty = jax.jit(cache.empty, static_argnames=('rows', 'slots'))
as_prefix = jax.jit(cache.as_prefix)
resized = jax.jit(cache.resized, static_argnames=('slots',))
