"""Log-probabilities of given tokens, without ever holding [B, T, V].

The head is applied to chunks of tokens. Trained tokens are sorted to the front
of each row, and a chunk in which no row has one is skipped, so that the head
costs what the targets cost. While differentiating, the forward pass computes
d logprob / d hidden beside the log-probability: the backward pass through a
frozen head is then one multiplication, with no product computed again.
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
  order = jnp.argsort(wanted_BT == 0, axis=1, stable=True)
  pad = -order.shape[1] % chunk
  take = functools.partial(jnp.take_along_axis, axis=1)
  x = jnp.pad(take(x_BTD, order[..., None]), ((0, 0), (0, pad), (0, 0)))
  tokens = jnp.pad(take(tokens_BT, order), ((0, 0), (0, pad)))
  wanted = jnp.pad(take(wanted_BT != 0, order), ((0, 0), (0, pad)))
  out = _chunked(head, chunk, params, x, tokens, wanted)
  return take(out, jnp.argsort(order, axis=1))


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


def _scan(one, chunk, x, tokens, wanted):
  """one() over chunks of the time axis; zeros for chunks without a target."""

  def body(_, args):
    shapes = jax.eval_shape(one, *args)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return None, jax.lax.cond(args[2].any(), lambda: one(*args), lambda: zeros)

  parts = tuple(_to_chunks(a, chunk) for a in (x, tokens, wanted))
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
