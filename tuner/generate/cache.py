"""The KV cache: a ring of slots a row, and a prefix that all rows share.

Position p of a text is p - prefix among its own, and its key is in slot
own % S. Layers that see everything have as many slots as the longest text;
those with a window have as many as it is long, if that is fewer. Where a model
is stacked, layers of one window share an array [L, B, K, S, H] that passes
through the scan; where it is not, each layer has its own, with L = 1, so that
nothing is sliced out and copied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tuner import mesh as mesh_lib
from tuner.models import attention, decoder

Memory = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is static in a cache.

  slots: own positions that a row has room for. prefix: the length of the
  prefix, 0 for none; adapters: those whose prefix is there, in order.
  """

  slots: int
  prefix: int = 0
  adapters: tuple[int, ...] = (0,)


def ring(window: int | None, slots: int) -> int:
  """The slots of a layer."""
  return slots if window is None else min(window, slots)


def empty(model: decoder.Decoder, rows: int, slots: int) -> Memory:
  """Keys and values of nothing yet, in the model's dtype."""
  heads, *sizes = model.config.cache_sizes
  dtype, memory = model.norm[...].dtype, {}
  for name, (count, window) in _stores(model).items():
    lead = (count, rows, heads, ring(window, slots))
    memory[name] = tuple(jnp.zeros((*lead, size), dtype) for size in sizes)
  return held(memory)


def grown(model: decoder.Decoder, memory: Memory, slots: int) -> Memory:
  """The same with more slots. No ring may have gone round."""
  wider = {}
  for name, (_, window) in _stores(model).items():
    size = ring(window, slots)
    wider[name] = tuple(
      jnp.pad(x, ((0, 0),) * 3 + ((0, size - x.shape[3]), (0, 0)))
      for x in memory[name]
    )
  return held(wider)


def as_prefix(memory: Memory) -> Memory:
  """The rows' slots side by side, [L, K, B * S, H], for `Step.prefix`."""

  def one(x):
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])

  return jax.tree.map(one, memory)


def held(memory: Memory) -> Memory:
  """The memory held to its sharding: rows divided, and heads over `tensor`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return memory

  def one(x):
    axes = [None, mesh_lib.RULES['B'], mesh_lib.RULES['K']]
    for i, name in enumerate(axes):
      if x.shape[i] % mesh_lib.parts(mesh, name):
        axes[i] = None
    return jax.lax.with_sharding_constraint(x, P(*axes))

  return jax.tree.map(one, memory)


def _stores(model: decoder.Decoder) -> dict[str, tuple[int, int | None]]:
  """(layers, window) of each array of the cache, by name."""
  layers = model.config.layers
  if not model.is_stacked:
    return {_name(i, layer.window): (1, layer.window)
            for i, layer in enumerate(layers)}  # fmt: skip
  windows = [layer.window for layer in layers]
  return {_name(None, w): (windows.count(w), w) for w in windows}


def _name(layer: int | None, window: int | None) -> str:
  return f'window {window}' if layer is None else f'layer {layer}'


@dataclasses.dataclass(frozen=True)
class Step:
  """The `attend` of one pass of rows [B] over T tokens, see blocks.Call.

  layout: of the cache. rows_B: each row's place in the cache; one that is not
    there is not written. own_BT: own positions. ends_B: own positions after the
    row's last real token. prefix: of `as_prefix`. adapter_B: each row's.
  has_past: whether what rows hold already is seen. is_one: T = 1 and the
    rows are those of the cache, in order.
  """

  model: decoder.Decoder
  layout: Layout
  prefix: Memory
  adapter_B: jax.Array
  own_BT: jax.Array
  ends_B: jax.Array
  rows_B: jax.Array | None = None
  has_past: bool = False

  def attend(self, q, k, v, look, sinks, layer, memory):
    name, index = self._place(layer, look.window)
    ours = memory[name]
    if self.rows_B is None:
      ours, parts = self._one(ours, index, k, v, look.window)
    else:
      ours, parts = self._many(ours, index, k, v, look.window)
    if self.layout.prefix:
      parts = [self._shared(name, index, look.window), *parts]
    out = attention.over(q, parts, look, sinks)
    return out, memory | {name: ours}

  def _place(self, layer, window) -> tuple[str, Any]:
    """(the array of a layer, its index there)."""
    if not self.model.is_stacked:
      return _name(layer, window), 0
    place_L, counts = [], dict[Any, int]()
    for one in self.model.config.layers:
      place_L.append(counts.get(one.window, 0))
      counts[one.window] = place_L[-1] + 1
    return _name(None, window), jnp.array(place_L)[layer]

  def _one(self, ours, index, k, v, window):
    """(cache, its part) after a token a row has joined it."""
    own_B = self.own_BT[:, 0]
    size = ours[0].shape[3]
    row_B = jnp.arange(len(own_B))
    keys, values = (
      x.at[index, row_B, :, own_B % size].set(new[:, 0])
      for x, new in zip(ours, (k, v), strict=True)
    )
    at_BS = attention.positions_of_slots(own_B, size)
    mask = attention.sees(self.own_BT, at_BS, window)
    return (keys, values), [attention.Part(keys[index], values[index], mask)]

  def _many(self, ours, index, k, v, window):
    """(cache, parts): each row sees its past, if any, and its own tokens."""
    start_B = self.own_BT[:, 0]
    size = ours[0].shape[3]
    new = tuple(jnp.swapaxes(x, 1, 2) for x in (k, v))
    mask = attention.sees(self.own_BT, self.own_BT, window)
    parts = [attention.Part(new[0], new[1], mask)]
    past = tuple(x[index, self.rows_B] for x in ours)
    if self.has_past:
      at_BS = attention.positions_of_slots(start_B - 1, size)
      mask = attention.sees(self.own_BT, at_BS, window)
      parts = [attention.Part(past[0], past[1], mask), *parts]
    # The last position of each slot that is no padding, if it is among these.
    last_B = jnp.minimum(self.ends_B, start_B + self.own_BT.shape[1]) - 1
    from_BS = attention.positions_of_slots(last_B, size) - start_B[:, None]
    is_new = (from_BS >= 0)[:, None, :, None]
    from_BS = jnp.maximum(from_BS, 0)[:, None, :, None]
    ours = tuple(
      x.at[index, self.rows_B].set(
        jnp.where(is_new, jnp.take_along_axis(one, from_BS, axis=2), old),
        mode='drop',
      )
      for x, one, old in zip(ours, new, past, strict=True)
    )
    return ours, parts

  def _shared(self, name, index, window):
    """The prefix: of each adapter, for the rows that go by it."""
    keys, values = (x[index] for x in self.prefix[name])
    length, adapters = self.layout.prefix, np.array(self.layout.adapters)
    size = keys.shape[1] // len(adapters)
    at_1S = attention.positions_of_slots(jnp.array([length - 1]), size)
    at_1S = jnp.tile(at_1S, len(adapters))
    mask = attention.sees(self.own_BT + length, at_1S, window)
    own_S = jnp.repeat(adapters, size)
    mask &= (own_S == self.adapter_B[:, None])[:, None]
    return attention.Part(keys, values, mask)
