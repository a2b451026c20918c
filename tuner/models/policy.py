"""What an objective sees of a model: `.logprobs(batch)`, `.logits(batch)`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tuner.models import decoder, divergence, logprobs, moe


@dataclasses.dataclass(frozen=True)
class Policy:
  """A filled decoder and how to run it over a batch of packed rows.

  batch holds tokens, mask, positions and segments, [..., T] with any leading
  axes ([B, T], or [B, C, T] for pairs).
  reach: a bound on the length of a segment, in tokens (attention.packed).
  remat: what the backward pass computes again, see decoder.REMAT.
  chunk: tokens a row that meet the head at a time.
  """

  model: decoder.Decoder
  reach: int | None = None
  remat: str = 'none'
  chunk: int = 128

  def hidden(self, batch: dict[str, jax.Array]) -> jax.Array:
    """The last hidden states, [rows, T, D], leading axes made one."""
    return self._run(batch)[0]

  def _run(self, batch):
    """(hidden states, what each body of layers says of its routing)."""
    rows = {k: _rows(batch[k]) for k in ('tokens', 'positions', 'segments')}
    attend = decoder.attend_packed(rows['segments'], self.reach)
    x_BTD, _, routing = self.model(
      rows['tokens'], rows['positions'], attend, remat=self.remat,
      real_BT=rows['segments'] > 0,
    )  # fmt: skip
    return x_BTD, routing

  def logprobs(self, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 log p of each token given those before it, shaped as tokens.

    0 where batch['mask'] is 0: those are not computed. The first token of a
    row has no prediction and 0.
    """
    return self._logprobs(self.hidden(batch), batch)

  def predictions(
    self, batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    """(`logprobs`, whether the token is the most likely one there).

    False where batch['mask'] is 0, and for the first token of a row.
    """
    return self._next_tokens(logprobs.predictions, self.hidden(batch), batch)

  def routed_logprobs(
    self, batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`logprobs`, and how evenly the tokens were routed: `moe.balance`.

    Raises ValueError for a model without experts.
    """
    x_BTD, routing = self._run(batch)
    if not routing:
      raise ValueError('config.objective.balance: this model has no experts.')
    return self._logprobs(x_BTD, batch), moe.balance(routing)

  def compared_logprobs(
    self, reference: 'Policy', batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(`logprobs`, KL(self || reference) in nats, `moe.balance`).

    The divergence is of the predictions before each token, shaped as tokens, 0
    where batch['mask'] is 0; it is differentiable through this policy alone.
    {} for a model without experts.
    """
    x_BTD, routing = self._run(batch)
    own = divergence.Side.of(self, x_BTD[:, :-1])
    other = divergence.Side.of(reference, reference.hidden(batch)[:, :-1])
    wanted_BT = _rows(batch['mask'])[:, 1:]
    kl_BT = divergence.kl(own, other, wanted_BT, self.chunk)
    kl_BT = jnp.pad(kl_BT, ((0, 0), (1, 0))).reshape(batch['tokens'].shape)
    balance = moe.balance(routing) if routing else {}
    return self._logprobs(x_BTD, batch), kl_BT, balance

  def _logprobs(self, x_BTD, batch):
    return self._next_tokens(logprobs.logprobs, x_BTD, batch)

  def _next_tokens(self, fn: Callable[..., Any], x_BTD, batch):
    """fn of each token and the hidden state before it, shaped as tokens."""
    tokens_BT, mask_BT = _rows(batch['tokens']), _rows(batch['mask'])
    out = fn(
      self.model.head_function(),
      self.model.head_weight(),
      x_BTD[:, :-1],
      tokens_BT[:, 1:],
      mask_BT[:, 1:],
      self.chunk,
    )
    shape = batch['tokens'].shape
    pad = lambda a: jnp.pad(a, ((0, 0), (1, 0))).reshape(shape)
    return jax.tree.map(pad, out)

  def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [..., T, V]: the prediction after each token. Large."""
    out = self.model.logits(self.hidden(batch))
    return out.reshape(*batch['tokens'].shape, -1)


def _rows(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])
