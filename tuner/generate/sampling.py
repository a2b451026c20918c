"""Which token comes next: greedy or sampled, each row by its own settings.

A row's logits are divided by its temperature, cut to the top_k most likely
tokens, to the smallest set of those that holds top_p of their probability, and
to those at least min_p times as likely as the most likely, in this order (that
of `transformers`), and a token is drawn from what is left. The key of a draw is
a function of the row's seed and the token's position, so what else is in the
batch plays no part.

No row is sorted. A token's distance is how far its scaled logit lies below the
greatest; each cut is a radius, found by bisecting the bits of a float.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32  # Tokens in a word of a bitmask; token 32 w + i is bit i of word w.
BLOCK = 256  # Tokens summed up before one of them is drawn.
NONE = -1  # Chosen where no token can be.
LEAST_TEMPERATURE = 1e-6  # Below it float32 says no more than 0 does.


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a row's tokens are drawn. The defaults: always the most likely.

  temperature: 0 is greedy, and the rest is then without effect. top_k: how many
  of the most likely tokens may be drawn, and all as likely as the last of
  them; 0 is any. top_p: the share of probability that the most likely of these
  hold together (Holtzman et al. 2020); 1 is all. min_p: the least probability,
  as a share of the greatest (Nguyen et al. 2024); 0 is any. Raises ValueError
  for what is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    for name, is_in_range, allowed in (
      ('temperature', self._is_temperature(), 'be 0 (greedy) or at least 1e-6'),
      ('top_k', _is_count(self.top_k), 'be an integer from 0 (any) on'),
      ('top_p', _is_number(self.top_p) and 0 < self.top_p <= 1, 'be in (0, 1]'),
      (
        'min_p',
        _is_number(self.min_p) and 0 <= self.min_p <= 1,
        'be in [0, 1]',
      ),
    ):
      if not is_in_range:
        raise ValueError(
          f'sampling.{name}: {getattr(self, name)!r}; it must {allowed}.'
        )

  def _is_temperature(self):
    value = self.temperature
    return _is_number(value) and (value == 0 or value >= LEAST_TEMPERATURE)


def _is_number(value) -> bool:
  return (
    isinstance(value, int | float | np.integer | np.floating)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _is_count(value) -> bool:
  is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
  return is_int and 0 <= value < 2**31


class Settings(NamedTuple):
  """The Sampling of each row, as arrays."""

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array


def settings(rows: Sequence[Sampling]) -> Settings:
  """The rows' settings, as numpy arrays."""
  return Settings(
    np.array([row.temperature for row in rows], np.float32),
    np.array([row.top_k for row in rows], np.int32),
    np.array([row.top_p for row in rows], np.float32),
    np.array([row.min_p for row in rows], np.float32),
  )


def keys(seeds_B, positions_B) -> jax.Array:
  """keys_B for `choose`: of each row's uint32 seed and token position."""
  return jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(
    seeds_B, positions_B
  )


def choose(
  logits_BV: jax.Array,
  settings: Settings,
  keys_B: jax.Array,
  allowed_BW: jax.Array | None = None,
) -> jax.Array:
  """The next int32 token_B of each row.

  logits_BV: float32; -inf where a token is impossible. allowed_BW: uint32
  [B, ceil(V / 32)], bit i of word w is token 32 w + i; others are impossible
  before all else. Where several are the most likely, greedy is the first. The
  token is NONE for a row with nothing possible, or with nan; see `checked`.
  """
  assert logits_BV.dtype == jnp.float32, logits_BV.dtype
  if allowed_BW is not None:
    is_allowed_BV = _bits(allowed_BW, logits_BV.shape[1])
    logits_BV = jnp.where(is_allowed_BV, logits_BV, -jnp.inf)
  greatest_B = logits_BV.max(-1)
  greedy_B = _first(logits_BV == greatest_B[:, None])
  is_sampled_B = settings.temperature_B > 0
  token_B = jax.lax.cond(
    is_sampled_B.any(),
    lambda: jnp.where(
      is_sampled_B, _draw(weights(logits_BV, settings), keys_B), greedy_B
    ),
    lambda: greedy_B,
  )
  return jnp.where(jnp.isfinite(greatest_B), token_B, NONE)


def weights(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """weight_BV in proportion to which `choose` draws; the greatest is 1.

  It is 0 for what the settings cut off. A greedy row's mean nothing.
  """
  distance_BV = _distances(logits_BV, settings.temperature_B)
  weight_BV = jnp.exp(-distance_BV)
  is_kept_BV = _is_kept(distance_BV, weight_BV, settings)
  return jnp.where(is_kept_BV, weight_BV, 0)


def checked(token_B: np.ndarray) -> np.ndarray:
  """The same tokens. Raises RuntimeError if one of them is NONE."""
  if (token_B == NONE).any():
    rows = np.flatnonzero(token_B == NONE).tolist()
    raise RuntimeError(
      f'no token can follow in rows {rows} of the batch: their logits are nan '
      'or infinite, or a constraint allows nothing that the model has.'
    )
  return token_B


def _bits(words_BW, vocabulary: int):
  """bool [B, V]: whether each token's bit is set."""
  assert words_BW.dtype == jnp.uint32, words_BW.dtype
  assert words_BW.shape[1] == -(-vocabulary // WORD), words_BW.shape
  bits = words_BW[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
  return bits.reshape(len(words_BW), -1)[:, :vocabulary].astype(bool)


def _first(is_it_BV):
  """The first index that is it: V if none is.

  Two plain reductions, which XLA:CPU does in a fifth of its argmax's time.
  """
  index_BV = jax.lax.broadcasted_iota(jnp.int32, is_it_BV.shape, 1)
  return jnp.where(is_it_BV, index_BV, is_it_BV.shape[1]).min(-1)


def _draw(weight_BV, keys_B):
  """Index of each row in proportion to its weights, never one of weight 0.

  First a block, then a token of it, each by one uniform number: a number a
  token, for Gumbel's trick, would take longer than all else together.
  """
  uniform_2B = jax.vmap(lambda key: jax.random.uniform(key, 2), out_axes=1)(
    keys_B
  )
  padding = -weight_BV.shape[1] % BLOCK
  padded_BV = jnp.pad(weight_BV, ((0, 0), (0, padding)))
  blocks = padded_BV.reshape(len(weight_BV), -1, BLOCK)
  block_B = _at_share(blocks.sum(-1), uniform_2B[0])
  inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
  return block_B * BLOCK + _at_share(inside, uniform_2B[1])


def _at_share(weight_BV, share_B):
  """The first index up to which the weights' sum exceeds a share of it all."""
  sum_BV = weight_BV.cumsum(-1)
  is_past_BV = sum_BV > share_B[:, None] * sum_BV[:, -1:]
  # A parallel sum may step by its rounding where the weight is 0.
  is_past_BV &= weight_BV > 0
  return jnp.where(
    is_past_BV.any(-1), _first(is_past_BV), weight_BV.argmax(-1)
  ).astype(jnp.int32)


def _distances(logits_BV, temperature_B):
  """How far below the greatest each scaled logit lies: 0 to inf."""
  greedy_as_1_B = jnp.where(temperature_B > 0, temperature_B, 1)
  below_BV = logits_BV.max(-1, keepdims=True) - logits_BV
  return below_BV / greedy_as_1_B[:, None]


def _is_kept(distance_BV, weight_BV, settings):
  """bool [B, V]: the tokens that top_k, then top_p, then min_p leave.

  A cut that no row asks for costs nothing. Tokens of one probability are kept
  or left together; the most likely is always kept.
  """

  def within_k():
    k_B = jnp.minimum(settings.top_k_B, distance_BV.shape[1])
    radius_B = _radius(
      distance_BV, jnp.ones_like(distance_BV), k_B.astype(jnp.float32)
    )
    return jnp.where(settings.top_k_B > 0, radius_B, jnp.inf)

  radius_B = jax.lax.cond(
    (settings.top_k_B > 0).any(),
    within_k,
    lambda: jnp.full(len(distance_BV), jnp.inf),
  )

  def within_p():
    left_BV = jnp.where(distance_BV <= radius_B[:, None], weight_BV, 0)
    mass_B = settings.top_p_B * left_BV.sum(-1)
    narrower_B = _radius(distance_BV, left_BV, mass_B)
    return jnp.where(settings.top_p_B < 1, narrower_B, radius_B)

  radius_B = jax.lax.cond(
    (settings.top_p_B < 1).any(), within_p, lambda: radius_B
  )
  is_near_BV = distance_BV <= radius_B[:, None]
  return is_near_BV & (weight_BV >= settings.min_p_B[:, None])


def _radius(distance_BV, weight_BV, target_B):
  """The least float32 radius within which the weights' sum is >= target.

  Floats that are not negative are ordered as their bits are, so 31 halvings of
  the bits find it exactly; the sum grows with the radius in floats, too, as
  long as it is always added up in one order.
  """
  order_BV = jax.lax.bitcast_convert_type(distance_BV, jnp.int32)
  infinity = np.float32(np.inf).view(np.int32)

  def halve(_, bounds):
    low_B, high_B = bounds
    middle_B = low_B + (high_B - low_B) // 2
    is_within_BV = order_BV <= middle_B[:, None]
    is_enough_B = jnp.where(is_within_BV, weight_BV, 0).sum(-1) >= target_B
    return (
      jnp.where(is_enough_B, low_B, middle_B + 1),
      jnp.where(is_enough_B, middle_B, high_B),
    )

  start = (
    jnp.zeros_like(order_BV[:, 0]),
    jnp.full_like(order_BV[:, 0], infinity),
  )
  bits_B = jax.lax.fori_loop(0, 31, halve, start)[1]
  return jax.lax.bitcast_convert_type(bits_B, jnp.float32)
