"""How far a policy's predictions are from a reference's, chunk by chunk.

As for log-probabilities, [B, T, V] is never held: both heads are applied to
chunks of tokens, only where a row has a wanted one. While differentiating, the
forward pass keeps d divergence / d hidden of each token, so that the backward
pass through a frozen head multiplies nothing again. The reference gets no
gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tuner.models import logprobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """A model's hidden states x_BTD, and the head that makes logits of them."""

  params: Any
  x_BTD: jax.Array
  head: logprobs.Head = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def of(cls, policy: Any, x_BTD: jax.Array) -> 'Side':
    """Of a policy.Policy and hidden states of its model."""
    return cls(policy.model.head_weight(), x_BTD, policy.model.head_function())


def kl(
  policy: Side, reference: Side, wanted_BT: jax.Array, chunk: int = 128
) -> jax.Array:
  """float32 KL(policy || reference) in nats, [B, T], at least 0.

  The sum over the vocabulary of p (log p - log q). 0 where `wanted_BT` is 0,
  and where both predict the same. Differentiable through the policy.
  """
  # What lies beside the wanted tokens may be anything, infinite too.
  x_BTD = jnp.where(wanted_BT[..., None] != 0, policy.x_BTD, 0)
  heads = policy.head, reference.head
  others = reference.params, reference.x_BTD
  return _kl(heads, chunk, policy.params, x_BTD, *others, wanted_BT)


def compare(
  policy: Side, reference: Side, wanted_BT: jax.Array, chunk: int = 128
) -> tuple[jax.Array, jax.Array]:
  """(`kl`, whether both find the same token the most likely, bool [B, T]).

  Of logits that are equal the first counts. False where `wanted_BT` is 0.
  """

  def one(x, y):
    logits = policy.head(policy.params, x)
    others = reference.head(reference.params, y)
    agrees = logits.argmax(-1) == others.argmax(-1)
    return _value(*_logs(logits, others)), agrees

  return logprobs.over_chunks(
    one, wanted_BT, policy.x_BTD, reference.x_BTD, chunk=chunk
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kl(heads, chunk, params, x, reference_params, y, wanted):
  head, reference_head = heads

  def one(x, y):
    logits = head(params, x)
    return _value(*_logs(logits, reference_head(reference_params, y)))

  return logprobs.over_chunks(one, wanted, x, y, chunk=chunk)


def _forward(heads, chunk, params, x, reference_params, y, wanted):
  head, reference_head = heads

  def one(x, y):
    logits, pull = jax.vjp(lambda x: head(params, x), x)
    logs = _logs(logits, reference_head(reference_params, y))
    value = _value(*logs)
    (slope,) = pull(_slope(*logs))
    return value, slope

  value, slope = logprobs.over_chunks(one, wanted, x, y, chunk=chunk)
  return value, (params, x, reference_params, y, wanted, slope)


def _backward(heads, chunk, residuals, d_out):
  params, x, reference_params, y, wanted, slope = residuals
  d_x = (d_out[..., None] * slope).astype(x.dtype)
  head, reference_head = heads

  def one(d_params, args):
    x, y, wanted, d_out = args

    def add():
      logits, pull = jax.vjp(lambda params: head(params, x), params)
      slope = _slope(*_logs(logits, reference_head(reference_params, y)))
      kept = jnp.where(wanted[..., None] != 0, d_out[..., None] * slope, 0.0)
      (grads,) = pull(kept)
      return jax.tree.map(lambda t, g: t + g.astype(t.dtype), d_params, grads)

    return jax.lax.cond((wanted != 0).any(), add, lambda: d_params), None

  # Dead code, and removed by XLA, when the head is frozen.
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  parts = [_to_chunks(a, chunk) for a in (x, y, wanted, d_out)]
  d_params, _ = jax.lax.scan(one, zeros, parts)
  d_params = jax.tree.map(lambda p, d: d.astype(p.dtype), params, d_params)
  return d_params, d_x, None, None, None


_kl.defvjp(_forward, _backward)


def _to_chunks(a, chunk):
  """[B, T, ...] -> [T / chunk, B, chunk, ...], padded with zeros."""
  pad = ((0, 0), (0, -a.shape[1] % chunk), *((0, 0),) * (a.ndim - 2))
  padded = jnp.pad(a, pad)
  parts = padded.reshape(len(a), -1, chunk, *a.shape[2:])
  return jnp.moveaxis(parts, 1, 0)


def _logs(logits, others):
  return jax.nn.log_softmax(logits), jax.nn.log_softmax(others)


def _value(log_p, log_q):
  """sum p (log p - log q): never below 0, as rounding would have it."""
  return jnp.maximum(_terms(log_p, log_q).sum(-1), 0.0)


def _slope(log_p, log_q):
  """d value / d logits = p (log p - log q - value)."""
  terms = _terms(log_p, log_q)
  return terms - jnp.exp(log_p) * terms.sum(-1, keepdims=True)


def _terms(log_p, log_q):
  p = jnp.exp(log_p)
  return jnp.where(p > 0, p * (log_p - log_q), 0.0)
