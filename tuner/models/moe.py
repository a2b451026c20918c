"""Mixtures of experts: routers, and experts that meet only their tokens.

A token's `chosen` experts are found by a router; its copies are sorted by
expert and each expert multiplies its own (`linear.grouped`): no token is
dropped, whatever the balance. On a mesh every device sorts its own tokens; the
experts are divided along `expert`, whose devices see the same tokens and add
what their experts make of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from tuner import mesh
from tuner.models import blocks, layers, linear, weights


@dataclasses.dataclass(frozen=True)
class Experts:
  """The experts of a family's layers.

  count, width: E experts, I hidden channels in each; chosen: by each token.
  route: (logits_BTE, experts, correction_E) -> (gates_BTK, chosen_BTK,
    probs_BTE), K being the chosen; such as `softmax_top`.
  shared: J, the width of the expert that every token meets; 0: none.
  groups, open_groups, scale: of `sigmoid_top`.
  """

  count: int
  width: int
  chosen: int
  route: Callable
  shared: int = 0
  groups: int = 1
  open_groups: int = 1
  scale: float = 1.0

  def __post_init__(self):
    if self.chosen > self.count:
      raise ValueError(
        f'config.json: num_experts_per_tok: {self.chosen}; there are '
        f'{self.count} experts.'
      )

  @property
  def letters(self) -> dict[str, int]:
    """The sizes of the letters that experts add; U is one channel."""
    return {'E': self.count, 'I': self.width, 'J': self.shared, 'U': 1}


def softmax_top(logits_BTE, experts, correction_E):
  """Of the probabilities of all experts the highest, as they are."""
  del correction_E
  probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
  gates_BTK, chosen_BTK = jax.lax.top_k(probs_BTE, experts.chosen)
  return gates_BTK, chosen_BTK, probs_BTE


def top_softmax(logits_BTE, experts, correction_E):
  """The highest probabilities over their sum: a softmax over the chosen."""
  gates_BTK, chosen_BTK, probs_BTE = softmax_top(
    logits_BTE, experts, correction_E
  )
  total = gates_BTK.sum(-1, keepdims=True)
  return gates_BTK / total, chosen_BTK, probs_BTE


def sigmoid_top(logits_BTE, experts, correction_E):
  """The router of DeepSeek-V3 (2024, eq. 12 to 16).

  Experts are chosen by score + correction, in the groups whose best two sum
  highest; gates are the scores over their sum, times `scale`.
  """
  scores_BTE = jax.nn.sigmoid(logits_BTE)
  wanted = jax.lax.stop_gradient(scores_BTE + correction_E)
  split = wanted.reshape(*wanted.shape[:-1], experts.groups, -1)
  best = jax.lax.top_k(split, 2)[0].sum(-1)
  _, opened = jax.lax.top_k(best, experts.open_groups)
  is_open = jax.nn.one_hot(opened, experts.groups, dtype=bool).any(-2)
  wanted = jnp.where(is_open[..., None], split, -jnp.inf).reshape(wanted.shape)
  _, chosen_BTK = jax.lax.top_k(wanted, experts.chosen)
  gates_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
  gates_BTK /= gates_BTK.sum(-1, keepdims=True) + 1e-20
  probs_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
  return gates_BTK * experts.scale, chosen_BTK, probs_BTE


class Moe(nnx.Module):
  """Gated linear units, of which a router chooses a few for each token.

  With `shared_down`, plus one for all tokens; `shared_scale` is its gate.
  """

  PARTS: tuple[str, ...] = ('gate', 'up', 'down')  # What leads with E.

  def __init__(self, config, layer):
    del layer
    self._declare(config)
    self.experts, self.activation = config.experts, config.activation

  def _declare(self, config) -> None:
    del config
    w, name = weights.weight, 'mlp.experts.{{E}}.{}_proj.weight'.format
    self.router = w('DE', hf='mlp.gate.weight', layout='ED')
    self.gate = w('EDI', hf=name('gate'), layout='ID')
    self.up = w('EDI', hf=name('up'), layout='ID')
    self.down = w('EID', hf=name('down'), layout='DI')

  def _declare_shared(self, prefix: str) -> None:
    w, name = weights.weight, (prefix + '.{}_proj.weight').format
    self.shared_gate = w('DJ', hf=name('gate'), layout='JD')
    self.shared_up = w('DJ', hf=name('up'), layout='JD')
    self.shared_down = w('JD', hf=name('down'), layout='DJ')

  def __call__(self, x_BTD, call: blocks.Call):
    """(out_BTD, sums over real tokens): see `balance`."""
    count = self.experts.count
    gates_BTK, chosen_BTK, probs_BTE = self.experts.route(
      self._logits(x_BTD), self.experts, self._correction()
    )
    if call.real_BT is not None:  # Padding is no expert's work.
      real_BT1 = call.real_BT[..., None]
      chosen_BTK = jnp.where(real_BT1, chosen_BTK, count)
      probs_BTE *= real_BT1
    routed = _sums(chosen_BTK, probs_BTE)
    parts = {name: linear.value_of(getattr(self, name)) for name in self.PARTS}
    out = meet(self._expert, parts, x_BTD, gates_BTK, chosen_BTK, count)
    return out + self._shared(x_BTD), routed

  def _logits(self, x_BTD):
    """In float32, so that no choice hangs on bfloat16's rounding."""
    x32 = x_BTD.astype(jnp.float32)
    logits = linear.project('BTD,DE->BTE', x32, self.router)
    return blocks.add_bias(self, 'router', logits)

  def _correction(self):
    correction: Any = getattr(self, 'correction', None)
    return None if correction is None else correction[...]

  def _expert(self, parts, x_ND, sizes_E):
    """The experts' outputs for rows sorted by expert."""
    gate = linear.grouped(x_ND, parts['gate'], sizes_E)
    up = linear.grouped(x_ND, parts['up'], sizes_E)
    hidden = layers.ACTIVATIONS[self.activation](gate) * up
    return linear.grouped(hidden, parts['down'], sizes_E)

  def _shared(self, x_BTD):
    if not hasattr(self, 'shared_down'):
      return jnp.zeros((), x_BTD.dtype)
    gate = linear.project('BTD,DJ->BTJ', x_BTD, self.shared_gate)
    up = linear.project('BTD,DJ->BTJ', x_BTD, self.shared_up)
    hidden = layers.ACTIVATIONS[self.activation](gate) * up
    out = linear.project('BTJ,JD->BTD', hidden, self.shared_down)
    if not hasattr(self, 'shared_scale'):
      return out
    open_BTU = linear.project('BTD,DU->BTU', x_BTD, self.shared_scale)
    return jax.nn.sigmoid(open_BTU) * out


def meet(
  expert: Callable,
  parts: dict[str, Any],
  x_BTD: jax.Array,
  gates_BTK: jax.Array,
  chosen_BTK: jax.Array,
  count: int,
) -> jax.Array:
  """The sum over each token's experts of gate * expert(token).

  expert(parts, x_ND, sizes_E): of rows sorted by expert. parts: weights of any
    kind, all of whose arrays lead with E. chosen_BTK: `count` is no expert.
  """
  here = jax.sharding.get_abstract_mesh()
  rows = mesh.dividing(here, 'B', len(x_BTD))
  over = mesh.dividing(here, 'E', count)
  if not rows + over:
    return _meet(expert, parts, x_BTD, gates_BTK, chosen_BTK, count)
  held = count // mesh.parts(here, over)

  def local(parts, *by_row):
    """One device's: its experts for its rows, added over the experts."""
    parts = jax.lax.pcast(parts, rows, to='varying')
    x_BTD, gates_BTK, chosen_BTK = jax.lax.pcast(by_row, over, to='varying')
    if not over:
      return _meet(expert, parts, x_BTD, gates_BTK, chosen_BTK, held)
    own_BTK = chosen_BTK - jax.lax.axis_index(over) * held
    out = _meet(expert, parts, x_BTD, gates_BTK, own_BTK, held)
    return jax.lax.psum(out, over)

  by_row = P(rows or None)
  run = jax.shard_map(
    local,
    in_specs=(P(over or None), by_row, by_row, by_row),
    out_specs=by_row,
    axis_names={*rows, *over},
  )
  return run(parts, x_BTD, gates_BTK, chosen_BTK)


def _meet(expert, parts, x_BTD, gates_BTK, chosen_BTK, held):
  """`meet` on one device; experts outside 0 .. held are not its own."""
  *lead, width = x_BTD.shape
  own_N = chosen_BTK.reshape(-1)
  own_N = jnp.where((own_N >= 0) & (own_N < held), own_N, held)
  order_N = jnp.argsort(own_N, stable=True)
  inverse_N = jnp.argsort(order_N)
  sizes_E = (own_N[:, None] == jnp.arange(held)).sum(0, dtype=jnp.int32)
  copies = jnp.broadcast_to(x_BTD[..., None, :], (*chosen_BTK.shape, width))
  x_ND = _permuted(copies.reshape(-1, width), order_N, inverse_N)
  out_ND = expert(parts, x_ND, sizes_E)
  # What is in the rows after the last group is nobody's promise.
  is_own_N1 = (own_N < held)[:, None]
  out_ND = jnp.where(is_own_N1, _permuted(out_ND, inverse_N, order_N), 0)
  out = out_ND.reshape(*lead, -1, width)
  return (out * gates_BTK[..., None]).sum(-2).astype(x_BTD.dtype)


@jax.custom_vjp
def _permuted(x_ND, order_N, inverse_N):
  """Rows in another order; the gradient's are put back, not scattered."""
  del inverse_N
  return x_ND[order_N]


_permuted.defvjp(
  lambda x, order, inverse: (x[order], inverse),
  lambda inverse, d: (d[inverse], None, None),
)


def _sums(chosen_BTK, probs_BTE):
  """What `balance` is made of; chosen_BTK is E where a token is none."""
  count = probs_BTE.shape[-1]
  is_chosen = chosen_BTK[..., None] == jnp.arange(count)
  return {
    'counts_E': is_chosen.sum((0, 1, 2)).astype(jnp.float32),
    'probs_E': probs_BTE.sum((0, 1)),
    'tokens': (chosen_BTK[..., 0] < count).sum().astype(jnp.float32),
  }


def balance(routing: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """How evenly tokens are routed, over all layers and real tokens.

  routing: of `decoder.Decoder`: probs_E, the sum over tokens of the router's
    probabilities, counts_E, how often each expert was chosen, and tokens.
  balance: E times the sum over experts of share * mean probability, the loss
    of Switch Transformers (Fedus et al. 2021, eq. 4 to 6) with shares of
    tokens, which add up to K: K when even, as `transformers` counts it.
  busiest: the highest share of the chosen that one expert has in its layer,
    mean over layers; 1 / E when even.
  """
  counts_LE, probs_LE = (
    jnp.concatenate([body[name] for body in routing])
    for name in ('counts_E', 'probs_E')
  )
  tokens = sum(body['tokens'].sum() for body in routing)
  tokens = jnp.maximum(tokens, 1)
  shares_E, probs_E = counts_LE.sum(0) / tokens, probs_LE.sum(0) / tokens
  chosen_L = jnp.maximum(counts_LE.sum(-1), 1)
  return {
    'balance': counts_LE.shape[-1] * (shares_E * probs_E).sum(),
    'busiest': (counts_LE.max(-1) / chosen_L).mean(),
  }
