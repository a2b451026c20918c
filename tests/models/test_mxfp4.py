"""Four-bit weights are those that `transformers` reads."""

import jax.numpy as jnp
import numpy as np
import pytest

from tuner.models import mxfp4


class Held(dict):
  """Tensors as `tensors.Tensors` offers them, in memory."""

  path = 'here'
  names = dict.keys
  slice_of = dict.__getitem__

  def replace(self, virtual, stored):
    for name in stored:
      del self[name]
    self.update(virtual)


class Stored:
  def __init__(self, array):
    self.array = array

  def get_shape(self):
    return list(self.array.shape)

  def __getitem__(self, index):
    return self.array[index]


def packed(experts=3, outputs=5, groups=2):
  """(blocks, scales) that hold every byte and exponents far and near."""
  rng = np.random.default_rng(0)
  shape = (experts, outputs, groups)
  blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
  blocks.flat[:256] = np.arange(256)
  return blocks, rng.integers(100, 150, shape, np.uint8)


def test_a_block_by_hand():
  """Low bits first; 0.5 to 6, a sign bit; times 2 to the scale - 127."""
  blocks = np.zeros((1, 16), np.uint8)
  blocks[0, :3] = 0x21, 0x7F, 0x08
  found = mxfp4.dequantise(blocks, np.array([129], np.uint8))
  np.testing.assert_array_equal(found[:6], [2.0, 4.0, -24.0, 24.0, 0.0, 0.0])
  assert found.shape == (32,) and found.dtype == jnp.bfloat16
  assert np.signbit(found[4].astype(np.float32))


@pytest.mark.parity
def test_dequantised_equals_that_of_transformers():
  import torch
  from transformers.integrations import mxfp4 as theirs

  blocks, scales = packed()
  expected = theirs.convert_moe_packed_tensors(
    torch.from_numpy(blocks), torch.from_numpy(scales)
  )
  found = mxfp4.dequantise(blocks, scales).swapaxes(1, 2)
  np.testing.assert_array_equal(
    found.astype(np.float32), expected.float().numpy()
  )


@pytest.mark.parametrize(
  'index',
  [
    (slice(None),),
    (slice(1, 3), slice(0, 64), slice(2, 4)),
    (slice(0, 1), slice(5, 41), slice(None)),
    (slice(2, 3), slice(32, 64)),
  ],
)
def test_a_part_is_that_of_the_whole(index):
  blocks, scales = packed()
  found = mxfp4.Packed(Stored(blocks), Stored(scales))
  whole = mxfp4.dequantise(blocks, scales).swapaxes(1, 2)
  assert tuple(found.get_shape()) == whole.shape
  np.testing.assert_array_equal(found[index], whole[index])


def test_two_tensors_are_presented_as_one():
  blocks, scales = map(Stored, packed())
  held = Held(other=1, w_blocks=blocks, w_scales=scales)
  mxfp4.present(held)
  assert sorted(held) == ['other', 'w']
  assert held['w'].get_dtype() == 'BF16'


def test_what_does_not_fit_is_refused():
  blocks, scales = packed()
  alone = Held(w_blocks=Stored(blocks))
  with pytest.raises(ValueError, match='w_scales is missing, beside w_blocks'):
    mxfp4.present(alone)
  uneven = Held(w_blocks=Stored(blocks[:, :4]), w_scales=Stored(scales))
  with pytest.raises(ValueError, match=r'w_blocks has shape \(3, 4, 2, 16\)'):
    mxfp4.present(uneven)
