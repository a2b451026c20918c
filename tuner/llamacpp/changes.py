"""What llama.cpp does to a weight on the way in, and how it is undone.

A `Change` is a pair of functions, each the inverse of the other. `to_gguf(hf,
heads)` gives the GGUF tensors, one or two, that a Hugging Face tensor becomes;
`to_hf(tensors, heads)` the reverse; the two shape functions say the same of
shapes, so that files can be laid out before a tensor is read. heads is (query,
key and value).
"""

import typing

import numpy as np

Shape = tuple[int, ...]
Heads = tuple[int, int]


class Change(typing.NamedTuple):
  """is_float32: llama.cpp wants the tensor in float32 whatever the file's."""

  to_gguf: typing.Callable[[np.ndarray, Heads], list[np.ndarray]]
  to_hf: typing.Callable[[list[np.ndarray], Heads], np.ndarray]
  gguf_shapes: typing.Callable[[Shape], list[Shape]] = lambda shape: [shape]
  hf_shape: typing.Callable[[list[Shape]], Shape] = lambda shapes: shapes[0]
  is_float32: bool = False


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k as llama.cpp's rope wants them, from Hugging Face's.

  rows: [heads * H, ...]. Hugging Face turns dim i of a head with dim i + H / 2,
  llama.cpp neighbours: (2, H / 2) -> (H / 2, 2) within each head.
  """
  halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """The inverse of `permute`."""
  pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
  """[..., F] twice -> [..., 2 F], in turns."""
  return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _float32(array: np.ndarray) -> np.ndarray:
  return array.astype(np.float32)


SAME = Change(lambda hf, heads: [hf], lambda ts, heads: ts[0])
FLOAT = SAME._replace(is_float32=True)
ROUTER = FLOAT
ROPE_Q = Change(
  lambda hf, heads: [permute(hf, heads[0])],
  lambda ts, heads: unpermute(ts[0], heads[0]),
)
ROPE_K = Change(
  lambda hf, heads: [permute(hf, heads[1])],
  lambda ts, heads: unpermute(ts[0], heads[1]),
)
# Gemma stores its norms less one. In float32 the sum loses what lies below
# 2**-24 of it: nothing of a bfloat16 weight above 2**-16, and what was added
# once is added again without a change.
ONE_MORE = Change(
  lambda hf, heads: [_float32(hf) + np.float32(1)],
  lambda ts, heads: _float32(ts[0]) - np.float32(1),
  is_float32=True,
)
ROW = Change(  # A matrix of one row is a vector; some files hold the matrix.
  lambda hf, heads: [hf.reshape(-1)],
  lambda ts, heads: ts[0].reshape(1, -1),
  lambda shape: [shape[1:]],
  hf_shape=lambda shapes: (1, shapes[0][-1]),
  is_float32=True,
)
TRANSPOSED = Change(
  lambda hf, heads: [hf.swapaxes(-1, -2)],
  lambda ts, heads: ts[0].swapaxes(-1, -2),
  lambda shape: [(*shape[:-2], shape[-1], shape[-2])],
  lambda shapes: (*shapes[0][:-2], shapes[0][-1], shapes[0][-2]),
)
INTERLEAVED = Change(  # [E, D, 2 F] <-> [E, F, D] twice
  lambda hf, heads: [hf[..., i::2].swapaxes(-1, -2) for i in (0, 1)],
  lambda ts, heads: _interleave([t.swapaxes(-1, -2) for t in ts]),
  lambda shape: [(shape[0], shape[2] // 2, shape[1])] * 2,
  lambda shapes: (shapes[0][0], shapes[0][2], 2 * shapes[0][1]),
)
INTERLEAVED_BIAS = Change(  # [E, 2 F] <-> [E, F] twice
  lambda hf, heads: [hf[..., i::2] for i in (0, 1)],
  lambda ts, heads: _interleave(ts),
  lambda shape: [(shape[0], shape[1] // 2)] * 2,
  lambda shapes: (shapes[0][0], 2 * shapes[0][1]),
  is_float32=True,
)
