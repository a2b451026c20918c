"""Greedy decoding with a KV cache: prompts in, answers out, both token ids.

Slot s of the cache holds position s, so a prompt is padded on its right and
the first generated token overwrites the first slot of padding. Prompts of
about one length share a batch; a batch is prefilled, then decoded in one
compiled loop until every row has met a stop token or the limit.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import attention, decoder

BUCKET = 64  # Prompts are padded to a multiple of this many tokens.


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
  _check(prompts, max_tokens, model.config.max_positions)
  if not prompts:
    return []
  # As few batches as `rows` allows, and all of one size.
  rows = -(-len(prompts) // -(-len(prompts) // rows))
  answers: list[list[int]] = [[] for _ in prompts]
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for start in range(0, len(order), rows):
    batch = order[start : start + rows]
    longest = max(len(prompts[i]) for i in batch)
    width = min(-(-longest // BUCKET) * BUCKET, model.config.max_positions)
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(len(tokens), np.int32)
    for row, i in enumerate(batch):
      tokens[row, : len(prompts[i])] = prompts[i]
      lengths[row] = len(prompts[i])
    active = np.arange(len(tokens)) < len(batch)
    out = _decode(
      model, tokens, lengths, active, np.asarray(stop_ids), max_tokens
    )
    for i, ids in zip(batch, np.asarray(out), strict=False):
      answers[i] = _until_stop(ids.tolist(), stop_ids)
  return answers


def _check(prompts, max_tokens, max_positions):
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise ValueError(f'prompt {i} is empty.')
    if len(prompt) + max_tokens > max_positions:
      raise ValueError(
        f'prompt {i} has {len(prompt)} tokens; with max_tokens = {max_tokens} '
        f"it exceeds the model's {max_positions} positions."
      )


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
  for end, token in enumerate(ids):
    if token in stop_ids:
      return ids[: end + 1]
  return ids


@jax.jit(static_argnames=('max_tokens',))
def _decode(model, tokens_BT, lengths_B, active_B, stop_ids, max_tokens):
  """Generated ids [B, max_tokens]; what follows a stop token means nothing."""
  memory = empty_cache(model, len(tokens_BT), tokens_BT.shape[1] + max_tokens)
  # Ropes that stretch with the text turn all its keys by one length.
  ends_B = lengths_B + max_tokens
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  x_BTD, memory = _run(model, tokens_BT, positions, memory, ends_B)
  last = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)

  def goes_on(carry):
    step, _, _, done_B, _ = carry
    return (step < max_tokens) & ~done_B.all()

  def one(carry):
    step, x_B1D, memory, done_B, out = carry
    token_B = model.logits(x_B1D)[:, 0].argmax(-1).astype(jnp.int32)
    out = out.at[:, step].set(token_B)
    done_B = done_B | jnp.isin(token_B, stop_ids)
    positions = (lengths_B + step)[:, None]
    x_B1D, memory = _run(model, token_B[:, None], positions, memory, ends_B)
    return step + 1, x_B1D, memory, done_B, out

  out = jnp.zeros((len(tokens_BT), max_tokens), jnp.int32)
  carry = (0, last, memory, ~active_B, out)
  return jax.lax.while_loop(goes_on, one, carry)[-1]


def empty_cache(model: decoder.Decoder, batch: int, slots: int):
  """(keys, values), [L, B, K, S, H] each, in the model's dtype."""
  heads, *sizes = model.config.cache_sizes
  lead, dtype = (model.config.L, batch, heads, slots), model.norm[...].dtype
  return tuple(jnp.zeros((*lead, size), dtype) for size in sizes)


def _run(model, tokens_BT, positions_BT, memory, ends_B):
  """Hidden states of tokens whose keys and values join the cache."""
  row_B1 = jnp.arange(len(tokens_BT))[:, None]

  def attend(q, k, v, look, sinks, layer, memory):
    keys, values = memory
    keys = keys.at[layer, row_B1, :, positions_BT].set(k)
    values = values.at[layer, row_B1, :, positions_BT].set(v)
    out = attention.cached(
      q, keys[layer], values[layer], positions_BT, look, sinks
    )
    return out, (keys, values)

  return model(tokens_BT, positions_BT, attend, memory, lengths_B=ends_B)[:2]
