"""A batch is a function of seed and step, however the work is shared out."""

import collections
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tuner.data import chat, sources

WIDTH = 16


def make_examples(lengths):
  """Example i has the tokens 100 * i + 1, ...; its second half is trained."""
  tokens = [100 * i + 1 + np.arange(n) for i, n in enumerate(lengths)]
  masks = [(np.arange(n) >= n // 2) & (np.arange(n) > 0) for n in lengths]
  return chat.Examples(
    tokens=np.concatenate(tokens).astype(np.int32),
    mask=np.concatenate(masks).astype(np.uint8),
    offsets=np.cumsum([0, *lengths]),
    where=tuple(f'file:{i}' for i in range(len(lengths))),
  )


EXAMPLES = make_examples([3, 7, 16, 2, 5, 9, 4, 12, 8, 6, 11, 1, 15, 10] * 3)


def read_back(batch):
  """[(tokens, mask)] of the examples in a batch, by its segments alone."""
  arrays = [
    batch[name].reshape(-1, batch[name].shape[-1])
    for name in ('tokens', 'mask', 'positions', 'segments')
  ]
  found = []
  for tokens, mask, positions, segments in zip(*arrays, strict=True):
    real = segments > 0
    assert not tokens[~real].any() and not mask[~real].any()
    assert not positions[~real].any()
    assert (np.diff(real.astype(int)) <= 0).all(), 'padding comes last'
    for segment in range(1, segments.max() + 1):
      own = segments == segment
      np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
      found.append((tuple(tokens[own]), tuple(mask[own])))
  return found


def expected(ids, examples=EXAMPLES):
  found = []
  for i in ids:
    own = slice(examples.offsets[i], examples.offsets[i + 1])
    found.append((tuple(examples.tokens[own]), tuple(examples.mask[own])))
  return found


def equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batch_holds_its_examples_whole():
  """Tokens, mask, positions and segments, at every step of two epochs."""
  source = sources.packed(EXAMPLES, rows=4, tokens=WIDTH, accumulate=2)
  for step in range(2 * source.steps_per_epoch):
    batch = source(step)
    assert {name: x.dtype for name, x in batch.items()} == {
      'tokens': np.int32,
      'mask': np.float32,
      'positions': np.int32,
      'segments': np.int32,
    }
    assert all(x.shape == (2, 2, WIDTH) for x in batch.values())
    assert read_back(batch) == expected(source.ids(step))


def test_golden_batch():
  """Two bins of width 8, written out."""
  examples = make_examples([3, 5, 4])
  batch = sources.packed(examples, rows=2, tokens=8)(0)
  by_fill = np.argsort(batch['segments'][0].max(-1) == 1, kind='stable')
  assert {name: x[0][by_fill].tolist() for name, x in batch.items()} == {
    'tokens': [
      [101, 102, 103, 104, 105, 1, 2, 3],
      [201, 202, 203, 204, 0, 0, 0, 0],
    ],
    'mask': [[0, 0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]],
    'positions': [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]],
    'segments': [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]],
  }


@pytest.mark.parametrize('rows', [1, 2, 3, 5, 100])
def test_every_example_as_often_as_every_other(rows):
  """Whole epochs hold each example once each, also in batches that cross."""
  source = sources.packed(EXAMPLES, rows, WIDTH)
  n = len(source.bins)
  steps = n  # n steps of `rows` bins are `rows` whole epochs.
  seen = collections.Counter(
    itertools.chain.from_iterable(source.ids(s) for s in range(steps))
  )
  assert seen == {i: rows for i in range(len(EXAMPLES))}


@hypothesis.given(
  accumulate=st.sampled_from([1, 2, 4]),
  processes=st.sampled_from([1, 2, 3]),
  step=st.integers(0, 200),
  seed=st.integers(0, 2**40),
)
def test_processes_together_make_the_batch_of_one(
  accumulate, processes, step, seed
):
  def make(index, count):
    return sources.packed(
      EXAMPLES, 24, WIDTH, accumulate, seed, process_index=index,
      process_count=count,
    )  # fmt: skip

  whole = make(0, 1)
  shares = [make(index, processes) for index in range(processes)]
  parts = [share(step) for share in shares]
  together = {
    name: np.concatenate([part[name] for part in parts], axis=1)
    for name in parts[0]
  }
  equal(together, whole(step))
  for share in shares:
    assert share.ids(step) == whole.ids(step)
    assert share.fingerprint == whole.fingerprint


def test_accumulation_holds_the_same_rows():
  """1 x 4 and 4 x 1: the same rows in the same order."""
  one = sources.packed(EXAMPLES, 4, WIDTH, accumulate=1)
  four = sources.packed(EXAMPLES, 4, WIDTH, accumulate=4)
  for step in range(20):
    a, b = one(step), four(step)
    equal(
      {name: x.reshape(4, WIDTH) for name, x in a.items()},
      {name: x.reshape(4, WIDTH) for name, x in b.items()},
    )
  assert one.fingerprint == four.fingerprint


@hypothesis.given(st.lists(st.integers(0, 500), max_size=20))
def test_any_step_at_any_time(steps):
  """A source that was at other steps before gives what a new one gives."""
  used = sources.packed(EXAMPLES, 5, WIDTH, seed=3)
  for step in steps:
    new = sources.packed(EXAMPLES, 5, WIDTH, seed=3)
    equal(used(step), new(step))
    assert used.ids(step) == new.ids(step)


def test_epochs_and_seeds_differ():
  """The order is new in each epoch and for each seed."""
  orders = {
    tuple(sources.permutation(50, seed, epoch))
    for seed in range(4)
    for epoch in range(4)
  }
  assert len(orders) == 16
  assert all(sorted(order) == list(range(50)) for order in orders)


def test_each_epoch_is_a_new_order():
  """A step of as many rows as there are bins is an epoch."""
  bins = len(sources.packed(EXAMPLES, 1, WIDTH).bins)
  source = sources.packed(EXAMPLES, bins, WIDTH)
  epochs = [source.ids(step) for step in range(3)]
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_order_is_pinned():
  """A stored run must find its own order again, in every version of numpy."""
  assert sources.permutation(8, 0, 0).tolist() == PINNED[0]
  assert sources.permutation(8, 1, 2).tolist() == PINNED[1]


PINNED = [[0, 2, 1, 5, 4, 3, 6, 7], [4, 2, 0, 6, 1, 5, 7, 3]]


def test_attributes():
  source = sources.packed(EXAMPLES, 4, WIDTH, accumulate=2)
  assert (source.rows, source.tokens, source.accumulate) == (4, WIDTH, 2)
  assert source.longest == 16
  assert source.n_examples == 42
  bins = len(source.bins)
  assert source.fill == EXAMPLES.lengths.sum() / (bins * WIDTH) > 0.97
  assert source.steps_per_epoch == -(-bins // 4)


def test_fingerprint_knows_all_that_orders_the_data():
  def print_of(examples=EXAMPLES, rows=4, tokens=WIDTH, seed=0):
    return sources.packed(examples, rows, tokens, seed=seed).fingerprint

  others = [
    print_of(make_examples([3, 7])),
    print_of(rows=2),
    print_of(tokens=WIDTH + 1),
    print_of(seed=1),
  ]
  assert len({print_of(), *others}) == 5
  assert print_of() == print_of()


def test_cached_bins_are_the_same(tmp_path):
  plain, built, read = (
    sources.packed(EXAMPLES, 4, WIDTH, cache_dir=where)
    for where in (None, tmp_path, tmp_path)
  )
  for step in range(10):
    equal(plain(step), built(step))
    equal(plain(step), read(step))


@pytest.mark.parametrize(
  'rows, processes', [(1, 1), (4, 1), (6, 2), (100, 1), (100, 4)]
)
def test_once_is_every_example_once(rows, processes):
  """All processes together; the last batch is filled up with empty rows."""
  shares = [
    sources.once(EXAMPLES, rows, WIDTH, index, processes)
    for index in range(processes)
  ]
  seen, total = [], 0
  for i, parts in enumerate(zip(*shares, strict=True)):
    batch = {
      name: np.concatenate([part[name] for part in parts], axis=1)
      for name in parts[0]
    }
    assert all(x.shape == (1, rows, WIDTH) for x in batch.values())
    ids = [share.ids(i) for share in shares]
    for other in ids:
      assert [x.tolist() for x in other] == [x.tolist() for x in ids[0]]
    assert len(ids[0]) == rows
    flat = np.concatenate(ids[0]).tolist()
    assert read_back(batch) == expected(flat)
    seen += flat
    total += batch['mask'].sum()
  assert sorted(seen) == list(range(len(EXAMPLES)))
  assert total == EXAMPLES.trained_tokens
  assert len(shares[0]) == -(-len(shares[0].bins) // rows)


@pytest.mark.parametrize(
  'given, text',
  [
    (
      {'rows': 8, 'accumulate': 3},
      '8 rows cannot be shared out to 3 micro-batches x 1 processes; '
      'wanted: a multiple of 3',
    ),
    (
      {'rows': 8, 'accumulate': 2, 'process_count': 8},
      '8 rows cannot be shared out to 2 micro-batches x 8 processes; '
      'wanted: a multiple of 16',
    ),
    (
      {'rows': 8, 'process_index': 2, 'process_count': 2},
      'process 2 of 2; wanted: an index below the count',
    ),
    ({'rows': 0}, 'rows is 0; wanted: an integer from 1'),
    (
      {'rows': 8, 'accumulate': 2.0},
      'accumulate is 2.0; wanted: an integer from 1',
    ),
    (
      {'rows': 8, 'seed': -1},
      'seed is -1; wanted: an integer from 0 to 2^63 - 1',
    ),
    (
      {'rows': 8, 'tokens': 15},
      'file:2 has 16 tokens and a row holds 15 (3 examples are too long); '
      'wanted: wider rows, or the policy that drops them',
    ),
  ],
)
def test_faults(given, text):
  with pytest.raises(ValueError) as error:
    sources.packed(EXAMPLES, **{'tokens': WIDTH} | given)
  assert str(error.value) == text


def test_negative_step():
  with pytest.raises(ValueError, match='^step -1; wanted: 0 or more$'):
    sources.packed(EXAMPLES, 4, WIDTH)(-1)


def test_once_faults():
  with pytest.raises(ValueError) as error:
    sources.once(EXAMPLES, 4, 15)
  assert str(error.value) == (
    'file:2 has 16 tokens and a row holds 15 (3 examples are too long); '
    'wanted: wider rows, or the policy that drops them'
  )
  with pytest.raises(ValueError, match='^9 rows cannot be shared out to 1 '):
    sources.once(EXAMPLES, 9, WIDTH, 0, 2)
