"""Batches as a function of seed and step.

Epoch e is the bins in the order of a random stream keyed by (seed, e); the
epochs follow each other without end, and step s takes the bins
[s * rows, (s + 1) * rows) of that sequence. So any step is reached at once,
resuming is exact, and the order knows nothing of processes or devices: each
process makes its own rows of a step, and together they make the same step.

A batch is a dict of arrays [A, B, T]: micro-batches, rows of this process,
tokens. tokens int32; mask float32, the weight of a token as a target;
positions int32, from 0 in every example; segments int32, 0 = padding and
1, 2, ... = the examples of the row.
"""

import functools
import math

import numpy as np

from tuner.data import cache, pack

VERSION = 1  # Raise when the same arguments come to give other batches.


class Packed:
  """source(step) -> batch of packed examples; see `packed`."""

  def __init__(self, examples, bins, rows, tokens, accumulate, seed, share):
    self.rows = rows
    self.tokens = tokens
    self.accumulate = accumulate
    self.seed = seed
    self.bins = bins
    self.n_examples = len(examples)
    self.longest = int(examples.lengths.max())
    self.fill = len(examples.tokens) / (len(bins) * tokens)
    self.steps_per_epoch = math.ceil(len(bins) / rows)
    self.fingerprint = cache.key(
      VERSION, examples.fingerprint, rows, tokens, seed
    )
    self._examples = examples
    self._own_AB = _own_rows(rows, accumulate, *share)
    # A step may cross the end of an epoch: keep two.
    self._order = functools.lru_cache(maxsize=2)(
      functools.partial(permutation, len(bins), seed)
    )

  def __call__(self, step, params=None):
    """The batch of step `step` (from 0): this process's rows of it."""
    del params
    own_AB = self._own_AB
    rows = [self.bins[b] for b in self._bins_of(step)[own_AB.ravel()].tolist()]
    return _batch(self._examples, rows, self.tokens, own_AB.shape)

  def ids(self, step):
    """Ids of the examples of a step, of all processes, row by row."""
    bins = self._bins_of(step).tolist()
    return np.concatenate([self.bins[b] for b in bins]).tolist()

  def _bins_of(self, step):
    """Bin of each of the step's rows, int64 [rows]."""
    if step < 0:
      raise ValueError(f'step {step}; wanted: 0 or more')
    start, end = int(step) * self.rows, (int(step) + 1) * self.rows
    n = len(self.bins)
    parts = []
    while start < end:
      epoch, first = divmod(start, n)
      parts.append(self._order(epoch)[first : first + end - start])
      start += len(parts[-1])
    return np.concatenate(parts)


class Once:
  """Iterable of batches that hold every example once; see `once`."""

  def __init__(self, examples, bins, rows, tokens, share):
    self.rows = rows
    self.tokens = tokens
    self.bins = bins
    self.longest = int(examples.lengths.max())
    self._examples = examples
    self._own_AB = _own_rows(rows, 1, *share)

  def __len__(self):
    return math.ceil(len(self.bins) / self.rows)

  def __iter__(self):
    return (self[i] for i in range(len(self)))

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    own_B = self._own_AB.ravel() + i * self.rows
    rows = [self._bin(b) for b in own_B.tolist()]
    return _batch(self._examples, rows, self.tokens, self._own_AB.shape)

  def ids(self, i):
    """Example ids of each row of batch i, of all processes."""
    return [self._bin(b) for b in range(i * self.rows, (i + 1) * self.rows)]

  def _bin(self, b):
    return self.bins[b] if b < len(self.bins) else np.zeros(0, np.int64)


def packed(
  examples,
  rows,
  tokens,
  accumulate=1,
  seed=0,
  process_index=0,
  process_count=1,
  cache_dir=None,
):
  """Packed source of `rows` rows of `tokens` tokens a step, over all processes.

  A step is `accumulate` micro-batches; of each, a process makes a contiguous
  share. Raises ValueError where the rows cannot be shared out evenly or an
  example is longer than a row.
  """
  own = rows, accumulate, process_index, process_count
  _check(*own)
  if type(seed) is not int or not 0 <= seed < 2**63:
    raise ValueError(f'seed is {seed!r}; wanted: an integer from 0 to 2^63 - 1')
  if not len(examples):
    raise ValueError('no examples to pack')

  def build():
    bins = pack.pack(examples.lengths, tokens, examples.where)
    return {'order': bins.order, 'offsets': bins.offsets}

  key = cache.key(pack.VERSION, examples.fingerprint, tokens)
  bins = pack.Bins(**cache.cached(cache_dir, key, build))
  share = process_index, process_count
  return Packed(examples, bins, rows, tokens, accumulate, seed, share)


def once(examples, rows, tokens, process_index=0, process_count=1):
  """Packed batches [1, B, T] of every example once, for evaluation.

  `rows` rows a batch, over all processes. The last batch is filled up with
  rows of padding, whose mask is 0, so that sum over weight is exact.
  """
  _check(rows, 1, process_index, process_count)
  if not len(examples):
    raise ValueError('no examples to evaluate')
  bins = pack.pack(examples.lengths, tokens, examples.where)
  return Once(examples, bins, rows, tokens, (process_index, process_count))


def permutation(n, seed, epoch):
  """The order of `n` bins in an epoch, int64 [n].

  From the raw words of Philox (Salmon et al. 2011) with the key (seed, epoch):
  numpy keeps those the same in all versions, which it does not say of shuffle.
  """
  words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
  return np.argsort(words, kind='stable')


def _check(rows, accumulate, process_index, process_count):
  for name, value in (('rows', rows), ('accumulate', accumulate)):
    if type(value) is not int or value < 1:
      raise ValueError(f'{name} is {value!r}; wanted: an integer from 1')
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process {process_index} of {process_count}; wanted: an index below the '
      'count'
    )
  parts = accumulate * process_count
  if rows % parts:
    raise ValueError(
      f'{rows} rows cannot be shared out to {accumulate} micro-batches x '
      f'{process_count} processes; wanted: a multiple of {parts}'
    )


def _own_rows(rows, accumulate, process_index, process_count):
  """Which rows of a step this process makes, int64 [A, B]."""
  return np.arange(rows).reshape(accumulate, process_count, -1)[
    :, process_index
  ]


def _batch(examples, rows, tokens, shape):
  """The batch whose row i holds the examples rows[i], one after the other."""
  counts = np.array([len(row) for row in rows])
  ids = np.concatenate(rows)
  starts = examples.offsets[ids]
  lengths = examples.offsets[ids + 1] - starts
  ends = np.cumsum(lengths)
  begins = ends - lengths  # Of each example, were there no padding.
  real = np.repeat(np.arange(len(rows)), counts)  # Row of each example.
  fills = np.bincount(real, lengths, minlength=len(rows)).astype(np.int64)
  shift = real * tokens - (np.cumsum(fills) - fills)[real]
  segment = np.arange(len(ids)) - (np.cumsum(counts) - counts)[real] + 1

  flat = np.arange(lengths.sum())
  source = flat + np.repeat(starts - begins, lengths)
  target = flat + np.repeat(shift, lengths)
  size = len(rows) * tokens

  def place(values, dtype):
    out = np.zeros(size, dtype)
    out[target] = values
    return out.reshape(*shape, tokens)

  return {
    'tokens': place(examples.tokens[source], np.int32),
    'mask': place(examples.mask[source], np.float32),
    'positions': place(flat - np.repeat(begins, lengths), np.int32),
    'segments': place(np.repeat(segment, lengths), np.int32),
  }
