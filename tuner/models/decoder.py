"""The decoder: embedding, scanned layers, norm and head.

A family (models/families/) turns a config.json into a `DecoderConfig`, which
says of each layer what is static in it: its parts, its window, its rope.
Layers that repeat as a group are stacked and scanned group by group, so that
what is static stays so: Gemma 3's five local layers and a global one are six
bodies of one scan. A decoder is a plain pytree: fill its weights
(`weights.fill`) and pass it through jit, grad and scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tuner import mesh
from tuner.models import attention, blocks, linear, rope, weights
from tuner.models import layers as layers_lib

REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Norms:
  """The norms of a block by their Hugging Face names; None: not there.

  attention, mlp: of what goes in; attention_post, mlp_post: of what comes out.
  """

  attention: str | None = 'input_layernorm'
  attention_post: str | None = None
  mlp: str | None = 'post_attention_layernorm'
  mlp_post: str | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
  """What is static in a layer.

  window: how far back it looks, in tokens; None: everything.
  rope: which of the model's ropes turns its queries and keys; None: none.
  block, attention, mlp: its parts, made by part(config, layer).
  """

  window: int | None = None
  rope: int | None = 0
  attention: Callable = blocks.Attention
  mlp: Callable = blocks.Mlp
  block: Callable = blocks.Block


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a config.json says, in this project's letters (CONTRIBUTING.md).

  layers: each layer, first to last.
  attention_biases: which of 'q', 'k', 'v', 'o' have one.
  qk_norm: '', 'head' (over the channels of each head) or 'heads' (of all).
  attention_scale: what scores are multiplied by.
  embed_scale, residual_scale: what embeddings and each layer's two additions
    are multiplied by; logit_divisor: what logits are divided by.
  experts, latent: what only some families have, with letters of their own.
  ignored: what names of tensors begin with that files may hold beside the
    model's; no part of what the model is.
  """

  D: int
  N: int
  K: int
  H: int
  F: int
  V: int
  ropes: tuple[rope.Rope, ...]
  layers: tuple[Layer, ...]
  norm: layers_lib.Norm
  max_positions: int
  attention_scale: float
  tied: bool = False
  norms: Norms = Norms()
  activation: str = 'silu'
  attention_biases: tuple[str, ...] = ()
  attention_cap: float | None = None
  mlp_bias: bool = False
  qk_norm: str = ''
  sinks: bool = False
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  logit_divisor: float = 1.0
  logit_cap: float | None = None
  experts: Any = None
  latent: Any = None
  ignored: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  @property
  def L(self) -> int:
    """The number of layers."""
    return len(self.layers)

  @property
  def sizes(self) -> dict[str, int]:
    """The size of every letter; L is the whole model's."""
    sizes = {letter: getattr(self, letter) for letter in 'LDNKHFV'}
    sizes |= {'Z': self.N + 2 * self.K, 'C': 2}
    for part in (self.experts, self.latent):
      sizes |= part.letters if part is not None else {}
    return sizes

  @property
  def cache_sizes(self) -> tuple[int, int, int]:
    """(heads, channels of a key, channels of a value) of the KV cache."""
    if self.latent is not None:
      return self.latent.cache_sizes(self)
    return self.K, self.H, self.H


class Segment(NamedTuple):
  """Layers first, first + 1, ...: a group of `period` layers, `times` over."""

  first: int
  period: int
  times: int

  def numbers(self, place: int) -> range:
    """The layers at one place of the group."""
    start = self.first + place
    return range(start, start + self.period * self.times, self.period)


@functools.cache
def segments(kinds: tuple[Layer, ...]) -> tuple[Segment, ...]:
  """The layers as repeating groups, with as few different bodies as may be."""

  def repeats(first, period):
    group, times = kinds[first : first + period], 1
    while True:
      start = first + times * period
      if kinds[start : start + period] != group:
        return times
      times += 1

  best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())]
  for first in reversed(range(len(kinds))):
    found = []
    for period in range(1, len(kinds) - first + 1):
      times = repeats(first, period)
      bodies, count, rest = best[len(kinds) - first - period * times]
      segment = Segment(first, period, times)
      found.append((bodies + period, count + 1, (segment, *rest)))
    best.append(min(found, key=lambda option: option[:2]))
  return best[-1][2]


class Decoder(nnx.Module):
  """A causal language model whose weights are declared, not yet filled."""

  def __init__(self, config: DecoderConfig):
    self.embed = weights.weight('VD', hf='model.embed_tokens.weight')
    bodies = []
    for segment in segments(config.layers):
      for place in range(segment.period):
        numbers = segment.numbers(place)
        layer = config.layers[numbers[0]]
        block = layer.block(config, layer)
        bodies.append(weights.stack(block, 'model.layers.{L}.', numbers))
    self.blocks = nnx.List(bodies)
    self.is_stacked = True
    self.norm = weights.weight(
      'D', hf='model.norm.weight', init=config.norm.init
    )
    if not config.tied:
      self.head = weights.weight('DV', hf='lm_head.weight', layout='VD')
    self.config = config

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Callable,
    memory: Any = None,
    remat: str = 'none',
    real_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Any, list[Any]]:
    """(hidden_BTD after the last norm, memory, routing).

    attend: see blocks.Call; such as `attend_packed` or generate.cache's.
      memory is carried through the layers.
    remat: 'none', 'dots' or 'full': what the backward pass computes again.
    lengths_B: how long each row's text may become, see rope.tables.
    routing: what the routers of each body say, stacked along its layers;
      without those bodies that route nothing.
    """
    config = self.config
    embed = mesh.constrain(linear.value_of(self.embed), 'VD')
    x = jnp.take(embed, tokens_BT, axis=0)
    x = mesh.constrain(x * jnp.asarray(config.embed_scale, x.dtype), 'BTD')
    tables = tuple(
      rope.tables(r, positions_BT, lengths_B) for r in config.ropes
    )
    call = blocks.Call(tables, attend, real_BT)
    if self.is_stacked:
      x, memory, routing = self._scanned(x, call, memory, remat)
    else:
      routing = []
      for number, block in enumerate(self.blocks):
        x, memory, _ = block(x, call, number, memory)
    return layers_lib.rms_norm(x, self.norm[...], config.norm), memory, routing

  def _scanned(self, x, call, memory, remat):
    """(x, memory, routing) after all layers, segment by segment."""
    routing, bodies = [], list(self.blocks)
    for segment in segments(self.config.layers):
      own, bodies = bodies[: segment.period], bodies[segment.period :]
      (x, memory), routed = _scan(own, segment, call, (x, memory), remat)
      routing += [r for r in routed if r is not None]
    return x, memory, routing

  def head_weight(self) -> Any:
    """The array or weight kind that makes logits: the head or the embedding."""
    return linear.value_of(self.embed if self.config.tied else self.head)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """float32 logits_BTV of hidden states."""
    return self.head_function()(self.head_weight(), x_BTD)

  def head_function(self) -> Callable:
    """(head_weight, x_BTD) -> logits_BTV, as this model makes them."""
    own = self.config
    return functools.partial(
      head_logits, tied=own.tied, divisor=own.logit_divisor, cap=own.logit_cap
    )


def unstacked(model: Decoder) -> Decoder:
  """The filled model with one block a layer, for forward passes alone.

  XLA:CPU copies what it slices out of a stack, so that a scan reads all
  weights three times; where a pass is short, as in decoding, that is most of
  its time. Layers are then numbered by ints, and nothing says its routing.
  """
  found: list[Any] = [None] * model.config.L
  bodies = iter(model.blocks)
  for segment in segments(model.config.layers):
    for place in range(segment.period):
      body = next(bodies)
      for i, number in enumerate(segment.numbers(place)):
        found[number] = jax.tree.map(functools.partial(_at, i=i), body)
  model = jax.tree.map(lambda x: x, model)  # The caller's stays as it is.
  model.blocks, model.is_stacked = nnx.List(found), False
  return model


@jax.jit
def _at(x: jax.Array, i: int) -> jax.Array:
  """x[i]; one program for all i."""
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _scan(bodies: Sequence, segment: Segment, call, carry, remat):
  """The layers of a segment, group by group: (carry, routing of each body)."""

  def one(carry, block, index):
    x, memory, routed = block(carry[0], call, index, carry[1])
    return (x, memory), routed

  if REMAT[remat] is not None:
    one = jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)

  def group(carry, blocks_and_indices):
    routing = []
    for block, index in zip(*blocks_and_indices, strict=True):
      carry, routed = one(carry, block, index)
      routing.append(routed)
    return carry, tuple(routing)

  indices = [
    jnp.array(segment.numbers(place)) for place in range(segment.period)
  ]
  return jax.lax.scan(group, carry, (list(bodies), indices))


def head_logits(
  head: Any,
  x_BTD: jax.Array,
  tied: bool,
  divisor: float = 1.0,
  cap: float | None = None,
) -> jax.Array:
  """float32 logits_BTV by a head of dims DV, or VD if it is the embedding."""
  spec = 'BTD,VD->BTV' if tied else 'BTD,DV->BTV'
  logits = linear.project(spec, x_BTD, head).astype(jnp.float32)
  return layers_lib.soft_cap(logits / divisor, cap)


def attend_packed(segments_BT: jax.Array, reach: int | None = None) -> Callable:
  """An `attend` over whole rows; see `attention.packed`."""

  def attend(q, k, v, look, sinks, layer, memory):
    del layer
    out = attention.packed(q, k, v, segments_BT, look, sinks, reach)
    return out, memory

  return attend
