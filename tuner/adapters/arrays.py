"""One layer's factors as `peft` lays them out, and back.

`peft`: lora_A [R, in], lora_B [out, R], magnitude [out], an axis fusing letters
in the order of the matrix's Hugging Face layout. Here: a [R, inputs], b
[R, outputs], m [outputs], letters in the order of dims. Experts of one
parameter: lora_A [E R, in], an expert's rows together, and lora_B [out, R E],
a rank's columns together.
"""

from collections.abc import Mapping

import numpy as np

from tuner.models import weights

Row = weights.Row
Sizes = Mapping[str, int]


def group(row: Row, side: str) -> str:
  """The letters of one side in the order of the Hugging Face layout."""
  letters = ''.join(row.groups)
  return ''.join(d for d in letters if d in side)


def width(row: Row, side: str, sizes: Sizes) -> int:
  """The number of a side's channels."""
  return int(np.prod([sizes[d] for d in side], dtype=np.int64))


def out(factor: np.ndarray, row: Row, side: str) -> np.ndarray:
  """[..., side's letters] -> [..., fused as on disk]."""
  first = factor.ndim - len(side)
  order = [first + side.index(d) for d in group(row, side)]
  moved = factor.transpose(*range(first), *order)
  return moved.reshape(*moved.shape[:first], -1)


def back(flat: np.ndarray, row: Row, side: str, sizes: Sizes) -> np.ndarray:
  """[..., fused as on disk] -> [..., side's letters]."""
  letters = group(row, side)
  lead = flat.shape[:-1]
  apart = flat.reshape(*lead, *(sizes[d] for d in letters))
  order = [len(lead) + letters.index(d) for d in side]
  return apart.transpose(*range(len(lead)), *order)


def experts_out(a_ERI: np.ndarray, b_ERO: np.ndarray):
  """(lora_A [E R, in], lora_B [out, R E])."""
  lora_a = a_ERI.reshape(-1, a_ERI.shape[-1])
  lora_b = b_ERO.transpose(2, 1, 0).reshape(b_ERO.shape[-1], -1)
  return lora_a, lora_b


def experts_back(lora_a: np.ndarray, lora_b: np.ndarray, count: int):
  """(a [E, R, in], b [E, R, out]) of those of `count` experts."""
  a_ERI = lora_a.reshape(count, -1, lora_a.shape[-1])
  b_ERO = lora_b.reshape(lora_b.shape[0], -1, count).transpose(2, 1, 0)
  return a_ERI, b_ERO


def side_by_side(parts: list[tuple[np.ndarray, np.ndarray]]):
  """The factors of matrices whose outputs follow each other, as one's.

  parts: (a [E, R, in], b [E, R, out]) of each. b is block-diagonal.
  """
  a = np.concatenate([a for a, _ in parts], axis=1)
  outputs = [b.shape[2] for _, b in parts]
  ranks = [b.shape[1] for _, b in parts]
  b = np.zeros((a.shape[0], sum(ranks), sum(outputs)), parts[0][1].dtype)
  row = column = 0
  for (_, own), rank, output in zip(parts, ranks, outputs, strict=True):
    b[:, row : row + rank, column : column + output] = own
    row, column = row + rank, column + output
  return a, b


def apart(a_ERI: np.ndarray, b_ERO: np.ndarray, count: int):
  """The factors of `count` matrices whose outputs follow each other.

  Of block-diagonal ones, each its own ranks; else each has a copy of all of a.
  """
  rank, each = a_ERI.shape[1], b_ERO.shape[2] // count
  blocks = b_ERO.reshape(*b_ERO.shape[:2], count, each)
  own = rank // count
  if count > 1 and rank % count == 0 and _is_block_diagonal(blocks, own):
    spans = [slice(i * own, (i + 1) * own) for i in range(count)]
    return [(a_ERI[:, s], blocks[:, s, i]) for i, s in enumerate(spans)]
  return [(a_ERI, blocks[:, :, i]) for i in range(count)]


def _is_block_diagonal(blocks: np.ndarray, own: int) -> bool:
  """Whether each part's columns have ranks of their own, and use them."""
  count = blocks.shape[2]
  for i in range(count):
    mine = blocks[:, i * own : (i + 1) * own]
    others = [mine[:, :, j] for j in range(count) if j != i]
    if not mine[:, :, i].any() or any(other.any() for other in others):
      return False
  return True
