"""Attention: a plain one for cached decoding, a banded one for packed rows.

A query sees the keys of its own segment, at or before its own place, at most
`window` back. `reach` is a static bound on how far back any query looks: the
model's window or the longest packed example, whichever is less. With it only
the blocks of keys within reach are ever multiplied, so that time and memory
are linear in the row's length.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tuner.models import layers

MASKED = -1e30  # Finite, so that a fully masked row stays free of NaN.


@dataclasses.dataclass(frozen=True)
class Look:
  """How a layer's queries look at its keys.

  scale: what scores are multiplied by; 1 / sqrt(H) in most families.
  window: a query sees itself and the window - 1 tokens before it; None: all.
  cap: scores are squeezed into (-cap, cap), Gemma 2.
  """

  scale: float
  window: int | None = None
  cap: float | None = None


class Part(NamedTuple):
  """Keys, values and which of them each query sees.

  keys, values: [B, K, S, H], or [K, S, H] where all rows share them.
  """

  keys: jax.Array
  values: jax.Array
  mask_BTS: jax.Array


def weighted_values(q_BTNH, k_BKSH, v_BKSH, mask_BTS, look, sinks_N=None):
  """`over` keys and values that are all in one part."""
  return over(q_BTNH, [Part(k_BKSH, v_BKSH, mask_BTS)], look, sinks_N)


def over(q_BTNH, parts, look, sinks_N=None):
  """Softmax attention, scores in float32; N / K queries share a key head.

  parts: the keys are those of all parts together; of one or more `Part`s.
  mask_BTS is True where the query sees the key. sinks_N: a score a head that
  takes its share of the softmax and adds nothing (gpt-oss). Returns out_BTNH,
  whose H is that of the values.
  """
  batch, length, heads, size = q_BTNH.shape
  kv = parts[0].keys.shape[-3]
  # A power of two changes no digit of the queries, which are fewer; any other
  # scale would be rounded to their dtype.
  is_exact = math.frexp(look.scale)[0] == 0.5
  before, after = (look.scale, 1.0) if is_exact else (1.0, look.scale)
  q_BTNH = layers.scaled(q_BTNH, before)
  q_BTKGH = q_BTNH.reshape(batch, length, kv, heads // kv, size)
  scores = [_scores(q_BTKGH, part, look.cap, after) for part in parts]
  probs = _softmax(_joined(scores), sinks_N)
  ends = np.cumsum([part.keys.shape[-2] for part in parts])[:-1].tolist()
  out_BTKGH = sum(
    _of_values(one, part.values)
    for one, part in zip(jnp.split(probs, ends, axis=-1), parts, strict=True)
  )
  return out_BTKGH.reshape(batch, length, heads, -1)


def _scores(q_BTKGH, part, cap, scale):
  rows = 'B' if part.keys.ndim == 4 else ''
  scores = jnp.einsum(
    f'BTKGH,{rows}KSH->BKGTS', q_BTKGH, part.keys,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  scores = layers.soft_cap(layers.scaled(scores, scale), cap)
  return jnp.where(part.mask_BTS[:, None, None], scores, MASKED)


def _joined(scores):
  return scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)


def _of_values(probs_BKGTS, values):
  rows = 'B' if values.ndim == 4 else ''
  probs_BKGTS = probs_BKGTS.astype(values.dtype)
  return jnp.einsum(f'BKGTS,{rows}KSH->BTKGH', probs_BKGTS, values)


def _softmax(scores_BKGTS, sinks_N):
  """Over the keys, and over the sink where there is one."""
  if sinks_N is None:
    return jax.nn.softmax(scores_BKGTS, axis=-1)
  batch, kv, groups, length, _ = scores_BKGTS.shape
  sinks = sinks_N.astype(jnp.float32).reshape(kv, groups, 1, 1)
  sinks = jnp.broadcast_to(sinks, (batch, kv, groups, length, 1))
  scores = jnp.concatenate([scores_BKGTS, sinks], axis=-1)
  return jax.nn.softmax(scores, axis=-1)[..., :-1]


def packed(q_BTNH, k_BTKH, v_BTKH, segments_BT, look, sinks_N=None, reach=None):
  """Causal attention within segments.

  reach: a promise that no segment is longer than this many tokens.
  """
  length, window = q_BTNH.shape[1], look.window
  reach = min(r for r in (window, reach, length) if r)
  block = block_size(reach)
  back = -(-(reach - 1) // block)
  if (back + 1) * block >= length:
    mask = _sees(segments_BT, segments_BT, 0, window)
    k, v = _heads_first(k_BTKH), _heads_first(v_BTKH)
    return weighted_values(q_BTNH, k, v, mask, look, sinks_N)
  pad = -length % block
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    for x in (q_BTNH, k_BTKH, v_BTKH)
  )
  segments = jnp.pad(segments_BT, ((0, 0), (0, pad)))
  mask = _sees(
    _blocks(segments, block),
    _reachable(segments, block, back),
    back * block,
    window,
  )
  k, v = (_heads_first(_reachable(x, block, back)) for x in (k, v))
  out = weighted_values(_blocks(q, block), k, v, mask, look, sinks_N)
  return out.reshape(*q.shape[:3], v.shape[-1])[:, :length]


def block_size(reach: int) -> int:
  """Queries a block: a power of two, 64 to 512, about the reach.

  Blocks of about the reach read two blocks of keys each; smaller ones waste
  less of the products and more on small ones.
  """
  return min(512, max(64, (1 << (reach - 1).bit_length()) // 2))


def _heads_first(x_BSKH):
  return jnp.swapaxes(x_BSKH, 1, 2)


def _blocks(x, block):
  """[B, T, ...] -> [B * T/block, block, ...]."""
  return x.reshape(-1, block, *x.shape[2:])


def _reachable(x, block, back):
  """Each block's keys and those of the `back` blocks before it.

  [B, T, ...] -> [B * T/block, (back + 1) * block, ...]; blocks before the
  row's start are zeros, which is the segment of padding.
  """
  batch, length = x.shape[:2]
  x = x.reshape(batch, length // block, block, *x.shape[2:])
  wide = jnp.pad(x, ((0, 0), (back, 0)) + ((0, 0),) * (x.ndim - 2))
  shifted = [wide[:, i : i + length // block] for i in range(back + 1)]
  x = jnp.concatenate(shifted, axis=2)
  return x.reshape(-1, (back + 1) * block, *x.shape[3:])


def _sees(segments_BT, segments_BS, offset, window):
  """mask_BTS: same segment, key at or before the query, within the window.

  offset: the index among the keys of the first query.
  """
  t = jnp.arange(segments_BT.shape[1])[:, None] + offset
  s = jnp.arange(segments_BS.shape[1])[None, :]
  same = segments_BT[:, :, None] == segments_BS[:, None, :]
  return _near(t, s, window) & same


def _near(t, s, window):
  """Whether the query at t sees the key at s: not after it, nor too far."""
  return (s <= t) if window is None else (s <= t) & (t - s < window)


def positions_of_slots(last_B: jax.Array, slots: int) -> jax.Array:
  """position_BS of each slot's key in a ring that position p has slot p % S of.

  last_B: the last position written. Negative where nothing has been.
  """
  s = jnp.arange(slots)
  return last_B[:, None] - (last_B[:, None] - s) % slots


def sees(query_BT, key_BS, window) -> jax.Array:
  """mask_BTS by positions; a key of a negative position is unseen."""
  t, s = query_BT[:, :, None], key_BS[:, None, :]
  return _near(t, s, window) & (s >= 0)
