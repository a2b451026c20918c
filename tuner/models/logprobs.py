"""Log-probabilities of given tokens, without ever holding [B, T, V].

The head is applied to chunks of tokens. Trained tokens are sorted to the front
of each row, and a chunk in which no row has one is skipped, so that the head
costs what the targets cost. While differentiating, the forward pass computes
d logprob / d hidden beside the log-probability: the backward pass through a
frozen head is then one multiplication, with no product computed again.

`over_chunks` is that walk for any other function of the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Head = Callable[[Any, jax.Array], jax.Array]


def logprobs(
  head: Head,
  params: Any,
  x_BTD: jax.Array,
  tokens_BT: jax.Array,
  wanted_BT: jax.Array,
  chunk: int = 128,
) -> jax.Array:
  """float32 log p(tokens_BT[b, t]) under head(params, x_BTD[b, t]).

  0 where `wanted_BT` is 0; rows without a wanted token cost nothing. head maps
  (params, [B, t, D]) to logits [B, t, V]; chunk is t, in tokens a row.
  """
  order = _wanted_first(wanted_BT)
  given = (x_BTD, tokens_BT, wanted_BT != 0)
  parts = (_sorted(a, order, chunk) for a in given)
  return _unsorted(_chunked(head, chunk, params, *parts), order)


def predictions(
  head: Head,
  params: Any,
  x_BTD: jax.Array,
  tokens_BT: jax.Array,
  wanted_BT: jax.Array,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """`logprobs`, and whether each token is the most likely one, bool [B, T].

  Of logits that are equal the first is the most likely. False where
  `wanted_BT` is 0.
  """

  def one(x, tokens):
    logits = head(params, x)
    return _pick(logits, tokens), logits.argmax(-1) == tokens

  return over_chunks(one, wanted_BT, x_BTD, tokens_BT, chunk=chunk)


def over_chunks(
  one: Callable[..., Any],
  wanted_BT: jax.Array,
  *arrays: jax.Array,
  chunk: int = 128,
) -> Any:
  """one(*arrays), a tree of [B, T, ...], as if applied to all tokens at once.

  one sees [B, chunk, ...] of each array, only where a row has a wanted token,
  and must treat each token by itself; zeros where `wanted_BT` is 0. To be
  differentiated, `one` should be wrapped in jax.checkpoint: what it keeps for
  the backward pass is kept for all tokens.
  """
  order = _wanted_first(wanted_BT)

  def only_wanted(*args):
    *parts, wanted = args

    def keep(a):
      there = wanted.reshape(*wanted.shape, *(1,) * (a.ndim - 2))
      return jnp.where(there, a, jnp.zeros((), a.dtype))

    return jax.tree.map(keep, one(*parts))

  parts = [_sorted(a, order, chunk) for a in (*arrays, wanted_BT != 0)]
  out = _scan(only_wanted, chunk, *parts)
  return jax.tree.map(lambda a: _unsorted(_unchunk(a), order), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(head, chunk, params, x, tokens, wanted):
  """[B, T] log-probabilities; T is a multiple of chunk."""

  def one(x, tokens, wanted):
    return jnp.where(wanted, _pick(head(params, x), tokens), 0.0)

  return _unchunk(_scan(one, chunk, x, tokens, wanted))


def _forward(head, chunk, params, x, tokens, wanted):
  def one(x, tokens, wanted):
    logits, pull = jax.vjp(lambda x: head(params, x), x)
    chosen = _pick(logits, tokens)
    (slope,) = pull(_slope(logits, tokens))
    picked = jnp.where(wanted, chosen, 0.0)
    return picked, jnp.where(wanted[..., None], slope, 0)

  picked, slope = map(_unchunk, _scan(one, chunk, x, tokens, wanted))
  return picked, (params, x, tokens, wanted, slope)


def _backward(head, chunk, residuals, d_out):
  params, x, tokens, wanted, slope = residuals
  d_x = (d_out[..., None] * slope).astype(x.dtype)

  def one(d_params, args):
    x, tokens, wanted, d_out = args

    def add():
      logits, pull = jax.vjp(lambda params: head(params, x), params)
      d_out32 = jnp.where(wanted, d_out, 0.0)[..., None]
      (grads,) = pull(d_out32 * _slope(logits, tokens))
      return jax.tree.map(lambda t, g: t + g.astype(t.dtype), d_params, grads)

    return jax.lax.cond(wanted.any(), add, lambda: d_params), None

  # Dead code, and removed by XLA, when the head is frozen.
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  parts = tuple(_to_chunks(a, chunk) for a in (x, tokens, wanted, d_out))
  d_params, _ = jax.lax.scan(one, zeros, parts)
  d_params = jax.tree.map(lambda p, d: d.astype(p.dtype), params, d_params)
  return d_params, d_x, None, None


_chunked.defvjp(_forward, _backward)


def _pick(logits, tokens):
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _slope(logits, tokens):
  """d log p(token) / d logits = onehot(token) - softmax(logits)."""
  vocabulary = jnp.arange(logits.shape[-1])
  onehot = tokens[..., None] == vocabulary
  return onehot - jax.nn.softmax(logits, axis=-1)


def _wanted_first(wanted_BT):
  """Indices [B, T] that sort wanted tokens to the front of their rows."""
  return jnp.argsort(wanted_BT == 0, axis=1, stable=True)


def _sorted(a, order, chunk):
  """[B, T, ...] in that order, padded to a multiple of the chunk."""
  trailing = a.ndim - 2
  index = order.reshape(*order.shape, *(1,) * trailing)
  pad = ((0, 0), (0, -order.shape[1] % chunk), *((0, 0),) * trailing)
  return jnp.pad(jnp.take_along_axis(a, index, axis=1), pad)


def _unsorted(a, order):
  """[B, T, ...] in its first order, without the padding."""
  back = jnp.argsort(order, axis=1)
  index = back.reshape(*back.shape, *(1,) * (a.ndim - 2))
  return jnp.take_along_axis(a, index, axis=1)


def _scan(one, chunk, *arrays):
  """one() over chunks of the time axis; zeros for chunks without a target.

  The last array says what is a target.
  """

  def body(_, args):
    shapes = jax.eval_shape(one, *args)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return None, jax.lax.cond(args[-1].any(), lambda: one(*args), lambda: zeros)

  parts = tuple(_to_chunks(a, chunk) for a in arrays)
  return jax.lax.scan(body, None, parts)[1]


def _to_chunks(a, chunk):
  """[B, T, ...] -> [T / chunk, B, chunk, ...]."""
  batch, length = a.shape[:2]
  return jnp.moveaxis(
    a.reshape(batch, length // chunk, chunk, *a.shape[2:]), 1, 0
  )


def _unchunk(a):
  """[T / chunk, B, chunk, ...] -> [B, T, ...]."""
  a = jnp.moveaxis(a, 0, 1)
  return a.reshape(a.shape[0], -1, *a.shape[3:])
