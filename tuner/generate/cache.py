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

  prefix: the length of what rows share, 0 for nothing; adapters: those whose
  prefix is there, in order.
  """

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


def resized(model: decoder.Decoder, memory: Memory, slots: int) -> Memory:
  """The same with more slots, or with fewer where no row needs the others."""
  found = {}
  for name, (_, window) in _stores(model).items():
    size = ring(window, slots)
    found[name] = tuple(_resized(x, size) for x in memory[name])
  return held(found)


def _resized(x, size):
  """No ring goes round that is not as long as its window, and stays so."""
  more = max(size - x.shape[3], 0)
  return jnp.pad(x, ((0, 0),) * 3 + ((0, more), (0, 0)))[:, :, :, :size]


def put(
  stacked: decoder.Decoder, memory: Memory, group: Memory, places_B
) -> Memory:
  """The cache with a stacked model's rows at these places, where they are.

  Their slots may be fewer: no row of theirs has more own positions.
  Layer by layer where the cache is so: one small program serves them all.
  """
  if _own_name(0) not in memory:
    return {
      name: _put(memory[name], group[name], None, places_B) for name in memory
    }
  return {
    _own_name(layer): _put(
      memory[_own_name(layer)], group[name], np.int32(index), places_B
    )
    for layer, (name, index) in enumerate(_places(stacked))
  }


@jax.jit(donate_argnums=0)
def _put(pair, new, index, places_B):
  """An array of the cache with all, or one, of the group's layers in it."""
  if index is not None:
    new = _map(lambda x: x[index][None], new)
  both = zip(pair, new, strict=True)
  found = tuple(
    x.at[:, places_B, :, : one.shape[3]].set(one, mode='drop')
    for x, one in both
  )
  return held({'': found})['']


def as_prefix(memory: Memory) -> Memory:
  """The rows of a stacked model's cache side by side, [L, K, B * S, H]."""

  def one(x):
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])

  return jax.tree.map(one, memory)


def split(stacked: decoder.Decoder, prefix: Memory) -> Memory:
  """A stacked model's prefix layer by layer."""
  found = {}
  for layer, (name, index) in enumerate(_places(stacked)):
    found[_own_name(layer)] = tuple(x[index][None] for x in prefix[name])
  return found


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
  windows = [layer.window for layer in model.config.layers]
  if not model.is_stacked:
    return {_own_name(i): (1, window) for i, window in enumerate(windows)}
  return {_shared_name(w): (windows.count(w), w) for w in windows}


def _places(stacked: decoder.Decoder) -> list[tuple[str, int]]:
  """Where each layer of a stacked model is: an array's name, an index in it."""
  places, counts = [], dict[str, int]()
  for layer in stacked.config.layers:
    name = _shared_name(layer.window)
    places.append((name, counts.get(name, 0)))
    counts[name] = places[-1][1] + 1
  return places


def _own_name(layer: int) -> str:
  return f'layer {layer}'


def _shared_name(window: int | None) -> str:
  return f'window {window}'


def _map(function, pair):
  return tuple(function(x) for x in pair)


@dataclasses.dataclass(frozen=True)
class Step:
  """The `attend` of one pass over T tokens of rows [B], see blocks.Call.

  layout, prefix: what the rows share, by `as_prefix` or `split`. adapter_B:
  each row's. own_BT: own positions, the first the same in all rows unless T
  is 1. ends_B: own positions after each row's last real token.
  kind: 'decode' of one token; 'prefill' of texts that begin with these
  tokens; 'chunk' of texts of which the rows hold what came before.
  """

  model: decoder.Decoder
  layout: Layout
  prefix: Memory
  adapter_B: jax.Array
  own_BT: jax.Array
  ends_B: jax.Array
  kind: str

  def attend(self, q, k, v, look, sinks, layer, memory):
    name, index = self._place(layer, look.window)
    advance = self._one if self.kind == 'decode' else self._many
    ours, parts = advance(memory[name], index, k, v, look.window)
    if self.layout.prefix:
      parts = [self._shared(name, index, look.window), *parts]
    out = attention.over(q, parts, look, sinks)
    return out, memory | {name: ours}

  def _place(self, layer, window) -> tuple[str, Any]:
    """(the name of a layer's array, its index there)."""
    if not self.model.is_stacked:
      return _own_name(layer), 0
    index_L = jnp.array([index for _, index in _places(self.model)])
    return _shared_name(window), index_L[layer]

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
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    mask = attention.sees(self.own_BT, self.own_BT, window)
    parts = [attention.Part(k, v, mask)]
    old = tuple(x[index] for x in ours)
    if self.kind == 'chunk':
      at_BS = attention.positions_of_slots(start_B - 1, size)
      mask = attention.sees(self.own_BT, at_BS, window)
      parts = [attention.Part(old[0], old[1], mask), *parts]
    # The last position of each slot that is no padding, if it is among these.
    last_B = jnp.minimum(self.ends_B, start_B + self.own_BT.shape[1]) - 1
    from_BS = attention.positions_of_slots(last_B, size) - start_B[:, None]
    is_new = (from_BS >= 0)[:, None, :, None]
    from_BS = jnp.maximum(from_BS, 0)[:, None, :, None]
    ours = tuple(
      x.at[index].set(
        jnp.where(is_new, jnp.take_along_axis(new, from_BS, axis=2), was)
      )
      for x, new, was in zip(ours, (k, v), old, strict=True)
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
