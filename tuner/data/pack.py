"""Packing: examples into rows of one width, with as few rows as will do.

Two ways, and the one that needs fewer rows is taken. Best fit decreasing
(Johnson 1973): longest first, each into the row whose free space it fills
best; all but perfect where lengths vary much. Where a row holds only a few
examples of like lengths it leaves 3 to 5 % empty, and there fullest subset
(Gupta and Ho 1999, minimum bin slack) closes the gap: the longest example
left, and with it those that together fill the row best.

Both work on the histogram of lengths, so the work grows with the number of
distinct lengths; only the copying grows with the number of examples.
"""

import dataclasses

import numpy as np

VERSION = 1  # Raise when the same lengths come to give other bins.
GOOD = 1.004  # Rows needed, over the fewest thinkable: not worth more search.
DISTINCT = 2048  # Lengths beyond which the search would take a minute.


@dataclasses.dataclass(frozen=True)
class Bins:
  """Bin i holds the examples order[offsets[i]:offsets[i + 1]]."""

  order: np.ndarray  # int64 [examples]
  offsets: np.ndarray  # int64 [bins + 1]

  def __len__(self):
    return len(self.offsets) - 1

  def __getitem__(self, i):
    return self.order[self.offsets[i] : self.offsets[i + 1]]


def pack(lengths, width, where=None):
  """Bins of at most `width` tokens; every example in one, none is cut.

  Deterministic. `where` names the examples in errors. Raises ValueError for
  one that is longer than `width`.
  """
  lengths = np.asarray(lengths, np.int64)
  if width < 1:
    raise ValueError(f'the width of a row is {width} tokens; wanted: 1 or more')
  if len(lengths) and lengths.min() < 1:
    raise ValueError(f'{_name(lengths.argmin(), where)} has no tokens')
  if len(lengths) and lengths.max() > width:
    long = np.flatnonzero(lengths > width)
    raise ValueError(
      f'{_name(long[0], where)} has {lengths[long[0]]} tokens and a row holds '
      f'{width} ({len(long)} examples are too long); wanted: wider rows, or '
      'the policy that drops them'
    )
  by_length = np.argsort(-lengths, kind='stable')
  bin_of, count = _best_fit(lengths, int(width))
  fewest = -(-int(lengths.sum()) // width)
  if count > fewest * GOOD and len(np.unique(lengths)) <= DISTINCT:
    other = _fullest_subset(lengths, int(width))
    bin_of, count = min((bin_of, count), other, key=lambda pair: pair[1])
  order = by_length[np.argsort(bin_of, kind='stable')]
  sizes = np.bincount(bin_of, minlength=count)
  return Bins(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _best_fit(lengths, width):
  """(bin of each example, longest example first; number of bins)."""
  bins_by_space: list[list[int]] = [[] for _ in range(width + 1)]
  open_spaces = 0  # Bit s is set where a bin has s tokens free.
  bin_of: list[int] = []
  count = 0
  sizes, counts = np.unique(lengths, return_counts=True)
  groups = zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True)
  for length, left in groups:
    while left:
      roomy = open_spaces >> length
      if roomy:
        space = length + (roomy & -roomy).bit_length() - 1
      else:  # No bin has room: open as many as the examples left will fill.
        space = width
        new = -(-left // (width // length))
        bins_by_space[width].extend(range(count, count + new))
        count += new
      each = space // length  # A bin that fits best stays it until it is full.
      bins = bins_by_space[space]
      first = max(0, len(bins) - (left + each - 1) // each)
      used = bins[first:]
      del bins[first:]
      placed = min(left, each * len(used))
      bin_of.extend(
        used if each == 1 else np.repeat(used, each)[:placed].tolist()
      )
      last = placed - each * (len(used) - 1)
      bins_by_space[space - each * length].extend(used[:-1])
      bins_by_space[space - last * length].append(used[-1])
      for touched in (space, space - each * length, space - last * length):
        bit = 1 << touched
        open_spaces = open_spaces & ~bit | bit * bool(bins_by_space[touched])
      left -= placed
  return np.array(bin_of, np.int64), count


def _fullest_subset(lengths, width):
  """(bin of each example, longest example first; number of bins)."""
  sizes, counts = np.unique(lengths, return_counts=True)
  left = dict(zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True))
  bins_by_size: dict[int, list] = {
    size: [] for size in left
  }  # One entry an example.
  count = 0
  while left:
    pattern = _fullest(left, width)
    # The same pattern again for as long as its examples last.
    times = min(left[size] // copies for size, copies in pattern.items())
    bins = np.arange(count, count + times)
    count += times
    for size, copies in pattern.items():
      bins_by_size[size].append(np.repeat(bins, copies))
      left[size] -= copies * times
      if not left[size]:
        del left[size]
  parts = [part for bins in bins_by_size.values() for part in bins]
  return np.concatenate(parts), count


def _fullest(left, width):
  """{size: copies}: the longest left, and what fills the row best beside it.

  `left` is {size: count}, longest first. Sums that can be reached are the bits
  of one integer. Of equal sums the one with longer examples is taken: short
  ones are easier to place later.
  """
  longest = next(iter(left))
  room = width - longest
  reached, steps = 1, []
  for size, count in left.items():
    if size > room:
      continue
    steps.append((size, reached))
    for _ in range(min(count - (size == longest), room // size)):
      reached |= reached << size & (2 << room) - 1
    if reached >> room:
      break
  total = reached.bit_length() - 1
  pattern = {longest: 1}
  for size, before in reversed(steps):
    copies = 0
    while not before >> total & 1:
      total -= size
      copies += 1
    if copies:
      pattern[size] = pattern.get(size, 0) + copies
  return pattern


def _name(i, where):
  return f'example {i}' if where is None else where[i]
