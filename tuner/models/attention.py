"""Attention: a plain one for cached decoding, a banded one for packed rows.

A query sees the keys of its own segment, at or before its own place, at most
`window` back. `reach` is a static bound on how far back any query looks: the
model's window or the longest packed example, whichever is less. With it only
the blocks of keys within reach are ever multiplied, so that time and memory
are linear in the row's length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

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


def weighted_values(q_BTNH, k_BKSH, v_BKSH, mask_BTS, look, sinks_N=None):
  """Softmax attention, scores in float32; N / K queries share a key head.

  mask_BTS is True where the query sees the key. sinks_N: a score a head that
  takes its share of the softmax and adds nothing (gpt-oss). Returns out_BTNH,
  whose H is that of v.
  """
  batch, length, heads, size = q_BTNH.shape
  groups = heads // k_BKSH.shape[1]
  # A power of two changes no digit of the queries, which are fewer; any other
  # scale would be rounded to their dtype.
  is_exact = math.frexp(look.scale)[0] == 0.5
  before, after = (look.scale, 1.0) if is_exact else (1.0, look.scale)
  q_BTNH = layers.scaled(q_BTNH, before)
  q_BTKGH = q_BTNH.reshape(batch, length, -1, groups, size)
  scores = jnp.einsum(
    'BTKGH,BKSH->BKGTS', q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
  )
  scores = layers.scaled(scores, after)
  scores = layers.soft_cap(scores, look.cap)
  scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
  probs = _softmax(scores, sinks_N).astype(v_BKSH.dtype)
  out_BTKGH = jnp.einsum('BKGTS,BKSH->BTKGH', probs, v_BKSH)
  return out_BTKGH.reshape(batch, length, heads, v_BKSH.shape[-1])


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


def cached(q_BTNH, k_BKSH, v_BKSH, positions_BT, look, sinks_N=None):
  """Attention over a cache whose slot s holds the key of position s.

  Slots after a query's position are unwritten or stale, and unseen.
  """
  s = jnp.arange(k_BKSH.shape[2])[None, None, :]
  t = positions_BT[:, :, None]
  mask_BTS = _near(t, s, look.window)
  return weighted_values(q_BTNH, k_BKSH, v_BKSH, mask_BTS, look, sinks_N)
