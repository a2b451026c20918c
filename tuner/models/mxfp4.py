"""Weights of four bits, as gpt-oss stores its experts: MXFP4.

A tensor is stored as two. `<name>_blocks` [E, O, G, 16] holds pairs of four-bit
floats, the first of a pair in the low bits; `<name>_scales` [E, O, G] the
exponent, plus 127, that 32 neighbouring values share (OCP Microscaling Formats
1.0, section 5.2 and 6.3). All values are numbers of bfloat16.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCKS, SCALES = '_blocks', '_scales'
SIZE = 32  # Values a scale.
# By their four bits: sign, two of exponent, one of mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_BYTES = np.arange(256)
_PAIRS = _VALUES[np.stack([_BYTES & 15, _BYTES >> 4], axis=-1)]


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """bfloat16 [..., 32 G] of blocks [..., G, 16] and scales [..., G], uint8."""
  pairs = _PAIRS[blocks].reshape(*blocks.shape[:-1], SIZE)
  exponent = scales.astype(np.int32)[..., None] - 127
  values = np.ldexp(pairs, exponent).astype(jnp.bfloat16)
  return values.reshape(*scales.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Packed:
  """The tensor [E, 32 G, O] that two stored ones stand for, read by slices."""

  blocks: Any
  scales: Any

  def get_shape(self) -> list[int]:
    experts, outputs, groups = self.scales.get_shape()
    return [experts, SIZE * groups, outputs]

  def get_dtype(self) -> str:
    return 'BF16'

  def __getitem__(self, index: Any) -> np.ndarray:
    """The part that up to three slices of step 1 name."""
    index = index if isinstance(index, tuple) else (index,)
    shape = self.get_shape()
    whole = (*index, *(slice(None),) * (len(shape) - len(index)))
    spans = [s.indices(n)[:2] for s, n in zip(whole, shape, strict=True)]
    experts, (first, last), outputs = spans
    groups = slice(first // SIZE, -(-last // SIZE))
    stored = (slice(*experts), slice(*outputs), groups)
    found = dequantise(
      np.asarray(self.blocks[stored]), np.asarray(self.scales[stored])
    )
    start = first - groups.start * SIZE
    return found[..., start : start + last - first].swapaxes(1, 2)


def present(tensors: Any) -> None:
  """Puts each tensor that is stored in four bits in its two ones' place.

  tensors: a `tensors.Tensors`. Raises ValueError where one of two is missing
  and where their shapes do not fit.
  """
  virtual, stored = {}, []
  for name in tensors.names():
    if not name.endswith((BLOCKS, SCALES)):
      continue
    plain = name.removesuffix(BLOCKS).removesuffix(SCALES)
    pair = [plain + BLOCKS, plain + SCALES]
    if missing := [other for other in pair if other not in tensors]:
      raise ValueError(
        f'{tensors.path}: {missing[0]} is missing, beside {name}'
      )
    blocks, scales = (tensors.slice_of(other) for other in pair)
    shapes = tuple(blocks.get_shape()), tuple(scales.get_shape())
    if len(shapes[0]) != 4 or shapes[0] != (*shapes[1], SIZE // 2):
      raise ValueError(
        f'{tensors.path}: {pair[0]} has shape {shapes[0]} and {pair[1]} '
        f'{shapes[1]}; wanted [E, O, G, {SIZE // 2}] and [E, O, G].'
      )
    virtual[plain] = Packed(blocks, scales)
    stored.append(name)
  tensors.replace(virtual, stored)
