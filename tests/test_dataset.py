"""A config's data: its sources, its sides, its mixtures, what leaks."""

import gzip
import json

import numpy as np
import pytest
import support

from tuner import batches, dataset, sections


@pytest.fixture
def tokenizer():
  return support.make_tokenizer()


def write(path, pairs):
  lines = [json.dumps({'input': a, 'output': b}) for a, b in pairs]
  path.write_text('\n'.join(lines))
  return str(path)


def pairs(name, n):
  return [(f'{name} {i}', f'{i}') for i in range(n)]


@pytest.fixture
def config(tmp_path):
  """A function: data keys -> a checked config."""

  def make(batch=None, steps=2, **data):
    c = support.config(tmp_path, tmp_path / 'rows.jsonl')
    c.data = {'test': 0.0, 'dev': 0.0, 'max_tokens': 96, **data}
    c.batch = {'rows': 4, 'tokens': 96, **(batch or {})}
    c.train.steps = steps
    return sections.read(c)

  return make


def load(config, tokenizer):
  return dataset.load(config, tokenizer, (2,))


def prompts(rows):
  return [row.prompt[-1]['content'] for row in rows]


def test_held_out_files_in_place_of_fractions(config, tokenizer, tmp_path):
  names = {
    name: write(tmp_path / f'{name}.jsonl', pairs(name, n))
    for name, n in (('train', 9), ('dev', 2), ('test', 3))
  }
  own = config(path=names['train'], test=names['test'], dev=(names['dev'],))
  split = load(own, tokenizer).split
  assert prompts(split.train) == [f'train {i}' for i in range(9)]
  assert prompts(split.dev) == ['dev 0', 'dev 1']
  assert prompts(split.test) == ['test 0', 'test 1', 'test 2']


def test_a_source_of_its_own_fraction(config, tokenizer, tmp_path):
  """General data for replay is not measured on."""
  task = write(tmp_path / 'a.jsonl', pairs('task', 100))
  replay = write(tmp_path / 'b.jsonl', pairs('replay', 100))
  own = config(
    sources={
      'task': {'path': task},
      'replay': {'path': replay, 'test': 0.0, 'system': 'Be'},
    },
    test=0.3,
  )
  data = load(own, tokenizer)
  assert all('task' in prompt for prompt in prompts(data.split.test))
  assert 15 < len(data.split.test) < 45
  roles = [row.messages[0]['role'] for row in data.split.train]
  assert roles.count('system') == 100
  # The same rows are held out when there is no other source.
  alone = load(config(path=task, test=0.3), tokenizer)
  assert prompts(alone.split.test) == prompts(data.split.test)


def drawn(data, source, steps):
  """Examples of each source in so many steps."""
  part = data.split.train.part_of[data.examples.row]
  ids = np.concatenate([source.ids(step) for step in range(steps)])
  return np.bincount(part[ids])


def test_shares_are_of_tokens(config, tokenizer, tmp_path):
  task = write(tmp_path / 'a.jsonl', pairs('task', 60))
  replay = write(tmp_path / 'b.jsonl', pairs('replay', 60))
  own = config(
    sources={
      'task': {'path': task, 'share': 3},
      'replay': {'path': replay, 'share': 1.0},
    }
  )
  data = load(own, tokenizer)
  source = batches.source(own, data)
  found = batches.epoch(own, data, source)
  assert found['sources']['task']['share'] == pytest.approx(0.75, abs=0.03)
  assert found['sources']['task']['passes'] > 2.5
  assert found['sources']['replay']['passes'] == 1
  replay_n, task_n = drawn(data, source, source.steps_per_epoch)
  assert replay_n == 60 and task_n > 150
  tokens = sum(
    (source(step)['segments'] > 0).sum()
    for step in range(source.steps_per_epoch)
  )
  # An epoch ends within a step.
  assert found['tokens'] == pytest.approx(tokens, rel=0.1)


@pytest.mark.parametrize('layout', ['packed', 'bucketed'])
def test_counts_are_of_examples(layout, config, tokenizer, tmp_path):
  task = write(tmp_path / 'a.jsonl', pairs('task', 30))
  replay = write(tmp_path / 'b.jsonl', pairs('replay', 30))
  own = config(
    batch={'rows': 1, 'layout': layout},
    sources={
      'task': {'path': task, 'count': 70},
      'replay': {'path': replay, 'count': 7},
    },
  )
  data = load(own, tokenizer)
  source = batches.source(own, data)
  found = drawn(data, source, source.steps_per_epoch).tolist()
  assert found == [7, 70]  # in the order of their names
  epoch = batches.epoch(own, data, source)
  assert epoch['examples'] == 77
  assert epoch['sources']['replay']['rows'] == 7


def test_a_plain_config_is_one_packed_source(config, tokenizer, tmp_path):
  own = config(path=write(tmp_path / 'a.jsonl', pairs('task', 30)))
  data = load(own, tokenizer)
  source = batches.source(own, data)
  epoch = batches.epoch(own, data, source)
  assert epoch['sources'] is None and source.n_examples == 30
  assert epoch['tokens'] == len(data.examples.tokens)
  assert epoch['trained'] == data.examples.trained_tokens


def leaky(tmp_path):
  train = write(tmp_path / 'a.jsonl', [('Who?', 'me'), *pairs('task', 9)])
  test = write(
    tmp_path / 'b.jsonl', [('who? ', 'you'), ('task 3', '3'), ('new', 'x')]
  )
  return {'path': train, 'test': test}


def test_leaks_are_errors_by_default(config, tokenizer, tmp_path):
  data = load(config(**leaky(tmp_path)), tokenizer)
  assert data.faults.found == [
    (
      f'{tmp_path}/b.jsonl:2',
      f'messages: the prompt of this test row is that of '
      f'{tmp_path}/a.jsonl:5, a training row; wanted: rows apart (or '
      "config.data.leaks='move' or 'keep')",
    ),
    (
      f'{tmp_path}/b.jsonl:1',
      f'messages: the prompt of this test row is that of '
      f'{tmp_path}/a.jsonl:1, a training row; wanted: rows apart (or '
      "config.data.leaks='move' or 'keep')",
    ),
  ]
  assert [leak['kind'] for leak in data.leaks] == ['exact', 'normalised']


def test_leaks_are_moved_to_training(config, tokenizer, tmp_path):
  data = load(config(leaks='move', **leaky(tmp_path)), tokenizer)
  assert not len(data.faults) and data.moved == 2
  assert prompts(data.split.test) == ['new']
  assert len(data.split.train) == 12 == len(data.examples)


def test_leaks_are_kept_and_told(config, tokenizer, tmp_path):
  data = load(config(leaks='keep', **leaky(tmp_path)), tokenizer)
  assert not len(data.faults) and len(data.leaks) == 2
  assert len(data.split.test) == 3


def test_rows_of_other_kinds_are_not_trained_on(config, tokenizer, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
  data = load(config(path=str(path)), tokenizer)
  assert data.faults.found == [
    (
      f'{path}:1',
      "row: found the kind 'preference', which config.objective does not take "
      '(1 of 1 rows); wanted: chat or text rows',
    )
  ]
  assert len(data.examples) == 2  # The chosen one and the rejected one.


def test_weights_reach_the_batch(config, tokenizer, tmp_path):
  path = tmp_path / 'rows.jsonl'
  lines = [
    {'prompt': f'{i}', 'completion': 'yes', 'weight': 0.5 + i} for i in range(4)
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  own = config(path=str(path), batch={'rows': 1})
  data = load(own, tokenizer)
  source = batches.source(own, data)
  batch = source(0)
  seen = {float(x) for x in np.unique(batch['mask'])} - {0.0}
  assert seen == {0.5 + data.examples.row[i] for i in source.ids(0)}


def test_columns_by_name(config, tokenizer, tmp_path):
  path = tmp_path / 'rows.csv'
  path.write_text('text,category\nhi,greeting\n"a, b",list\n')
  for columns in ({'prompt': 'text', 'completion': 'category'},
                  'prompt=text, completion=category'):  # fmt: skip
    rows = load(config(path=str(path), columns=columns), tokenizer).split.train
    assert prompts(rows) == ['hi', 'a, b']
    assert [row.reference for row in rows] == ['greeting', 'list']


def test_a_stream_gives_the_rows_of_its_file(config, tokenizer, tmp_path):
  path = write(tmp_path / 'a.jsonl', pairs('task', 30))
  own = config(path=path, access='stream', steps=9)
  data = load(own, tokenizer)
  assert len(data.split.train) == 30  # the first rows, looked at
  source = batches.streamed(own, tokenizer, (2,))
  whole = load(config(path=path), tokenizer)
  ids = sorted(set(np.concatenate([source.ids(s) for s in range(9)]).tolist()))
  assert ids == list(range(30))
  batch = source(0)
  assert batch['tokens'].shape == (1, 4, 96)
  first = whole.examples.tokens[: whole.examples.offsets[1]].tolist()
  flat = [source(s)['tokens'].ravel().tolist() for s in range(3)]
  text = ','.join(map(str, first))
  assert any(text in ','.join(map(str, row)) for row in flat)


def test_a_stream_names_its_broken_row(config, tokenizer, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"prompt": "a", "completion": "b"}\n[]\n')
  own = config(path=str(path), access='stream', steps=9)
  faults = load(own, tokenizer).faults
  assert faults.found == [
    (f'{path}:2', 'line: found a list; wanted: an object')
  ]
  source = batches.streamed(own, tokenizer, (2,))
  with pytest.raises(ValueError, match=r'a.jsonl:2: line: found a list'):
    source(0)


REFUSED = {
  'path and sources': (
    {'path': 'a', 'sources': {'x': {'path': 'b'}}},
    "config.data: path 'a' and sources",
  ),
  'neither': ({}, 'config.data: path None and sources None; say one of them.'),
  'a source without a path': (
    {'sources': {'x': {'share': 1.0}}},
    'config.data.sources.x: missing path',
  ),
  'an unknown key of a source': (
    {'sources': {'x': {'path': 'a', 'shares': 1.0}}},
    "config.data.sources.x: unknown key 'shares'; did you mean 'share'?",
  ),
  'share and count': (
    {'sources': {'x': {'path': 'a', 'share': 1.0, 'count': 2}}},
    'config.data.sources.x: share and count may not meet; say one of them.',
  ),
  'a share for some': (
    {'sources': {'x': {'path': 'a', 'share': 1.0}, 'y': {'path': 'b'}}},
    'config.data.sources: x have a share, y none; all or none must.',
  ),
  'share 0': (
    {'sources': {'x': {'path': 'a', 'share': 0.0}}},
    'config.data.sources.x.share: 0.0; it must be above 0.',
  ),
  'count 0': (
    {'sources': {'x': {'path': 'a', 'count': 0}}},
    'config.data.sources.x.count: 0; it must be in [1, 100000000].',
  ),
  'a fraction beside files': (
    {'sources': {'x': {'path': 'a', 'test': 0.1}}, 'test': 'b'},
    'config.data.sources.x.test: config.data.test names files; say one of '
    'them.',
  ),
  'columns': (
    {'path': 'a', 'columns': 'prompt'},
    "config.data.columns: 'prompt', wanted pairs like 'a=x,b=y'",
  ),
  'a stream with a fraction': (
    {'path': 'a', 'access': 'stream', 'test': 0.1},
    'config.data.test: 0.1; a stream has no fraction to hold out. Name a '
    'file, or make it 0.',
  ),
  'shares of unpacked rows': (
    {
      'sources': {'x': {'path': 'a', 'share': 1.0}},
      'batch': {'layout': 'bucketed'},
    },
    "config.batch.layout: shares are of packed rows; make it 'packed', or give "
    'counts.',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case, config):
  given, text = REFUSED[case]
  with pytest.raises(ValueError) as error:
    config(**given)
  assert str(error.value).startswith(text)


def test_a_stream_takes_no_rows_of_other_kinds(config, tokenizer, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
  own = config(path=str(path), access='stream', steps=9)
  with pytest.raises(ValueError, match="row: found the kind 'preference'"):
    batches.streamed(own, tokenizer, (2,))(0)


def test_a_stream_is_known_by_all_that_makes_its_tokens(
  config, tokenizer, tmp_path
):
  path = write(tmp_path / 'a.jsonl', pairs('task', 30))
  given = {'path': path, 'access': 'stream', 'steps': 9}
  found = {
    batches.streamed(config(**given, **more), tokenizer, (2,)).fingerprint
    for more in (
      {}, {'loss': 'last'}, {'max_tokens': 50}, {'too_long': 'drop'},
      {'long_text': 'split'}, {'system': 'Be'},
    )
  }  # fmt: skip
  write(tmp_path / 'a.jsonl', pairs('task', 31))
  found.add(batches.streamed(config(**given), tokenizer, (2,)).fingerprint)
  assert len(found) == 7


@pytest.mark.parametrize('side', ['dev', 'test'])
def test_held_out_rows_have_faults_too(side, config, tokenizer, tmp_path):
  path = write(tmp_path / 'a.jsonl', pairs('task', 9))
  held = write(tmp_path / 'b.jsonl', [('long', 'x' * 99), ('ok', '1')])
  data = load(config(path=path, **{side: held}), tokenizer)
  (fault,) = data.faults.found
  assert fault[0] == f'{held}:1' and 'tokens; wanted: at most 96' in fault[1]


def test_rows_of_no_weight_are_left_out_and_counted(
  config, tokenizer, tmp_path
):
  path = tmp_path / 'rows.jsonl'
  rows = [
    {'prompt': f'{i}', 'completion': 'yes', 'weight': i} for i in range(3)
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  data = load(config(path=str(path)), tokenizer)
  assert data.examples.weightless == 1 and data.examples.row.tolist() == [1, 2]
  path.write_text(json.dumps(rows[0]))
  data = load(config(path=str(path)), tokenizer)
  assert data.faults.found == [
    ('config.data', 'no row is left to train on; wanted: one or more')
  ]


def test_a_source_with_no_row_left_is_named(config, tokenizer, tmp_path):
  task = write(tmp_path / 'a.jsonl', pairs('task', 9))
  long = write(tmp_path / 'b.jsonl', [('long', 'x' * 99)])
  own = config(
    sources={
      'task': {'path': task, 'count': 5},
      'long': {'path': long, 'count': 5},
    },
    too_long='drop',
  )
  assert load(own, tokenizer).faults.found == [
    (
      'config.data.sources.long',
      'none of its rows is left to train on; wanted: one or more',
    )
  ]


def test_a_fraction_that_holds_nothing_stands_beside_other_faults(
  config, tokenizer, tmp_path
):
  path = tmp_path / 'a.jsonl'
  path.write_text('[]\n{"input": "a", "output": "b"}\n')
  data = load(config(path=str(path), test=1e-9), tokenizer)
  assert data.faults.found == [
    (f'{path}:1', 'line: found a list; wanted: an object'),
    (
      'config.data.test',
      '1e-09 of 1 rows to test came out empty; wanted: more rows, or another '
      'fraction',
    ),
  ]


def test_moving_leaves_no_leak(config, tokenizer, tmp_path):
  """One that is moved may be near another that was not."""
  words = [f'word{i}' for i in range(60)]

  def text(first, changed):
    return ' '.join([*words[first:], *(f'{changed}{i}' for i in range(first))])

  chain = [text(0, 'a'), text(4, 'a'), text(8, 'a'), text(12, 'a')]
  train = write(tmp_path / 'a.jsonl', [(chain[0], '1'), *pairs('task', 9)])
  test = write(
    tmp_path / 'b.jsonl', [*((t, '1') for t in chain[1:]), ('new', 'x')]
  )
  data = load(
    config(
      path=train, test=test, leaks='move', max_tokens=2000,
      batch={'tokens': 2000},
    ),
    tokenizer,
  )  # fmt: skip
  assert data.moved == 3 and prompts(data.split.test) == ['new']


def test_dev_and_test_are_apart_too(config, tokenizer, tmp_path):
  names = {
    'path': write(tmp_path / 'a.jsonl', pairs('task', 9)),
    'dev': write(tmp_path / 'b.jsonl', [('new', '1'), ('other', '2')]),
    'test': write(tmp_path / 'c.jsonl', [('New', '1')]),
  }
  (fault,) = load(config(**names), tokenizer).faults.found
  assert fault[0] == f'{tmp_path}/b.jsonl:1'
  assert fault[1].startswith(
    f'messages: the prompt of this dev row is that of {tmp_path}/c.jsonl:1, a '
    'test row'
  )
  data = load(config(leaks='move', **names), tokenizer)
  assert prompts(data.split.test) == ['new', 'New']
  assert prompts(data.split.dev) == ['other'] and data.moved == 1


def test_a_system_message_hides_no_leak(config, tokenizer, tmp_path):
  task = write(tmp_path / 'a.jsonl', pairs('task', 9))
  test = tmp_path / 'b.jsonl'
  row = {'system': 'Be', 'input': 'task 3', 'output': '3'}
  test.write_text(json.dumps(row))
  assert len(load(config(path=task, test=str(test)), tokenizer).faults) == 1


def test_all_held_out_rows_moved_is_a_fault(config, tokenizer, tmp_path):
  task = write(tmp_path / 'a.jsonl', pairs('task', 9))
  test = write(tmp_path / 'b.jsonl', pairs('task', 2))
  data = load(config(path=task, test=test, leaks='move'), tokenizer)
  (fault,) = data.faults.found
  assert fault[0] == 'config.data.leaks' and 'left no test row (2' in fault[1]


def test_what_was_read_of_a_broken_file_is_left(config, tokenizer, tmp_path):
  """A file that cannot be read to its end is no data, and is not tokenised."""
  good = write(tmp_path / 'a.jsonl', pairs('task', 9))
  bomb = tmp_path / 'b.jsonl.gz'
  row = json.dumps({'input': 'x' * 2**20, 'output': 'y'}) + '\n'
  bomb.write_bytes(gzip.compress(row.encode() * 300))
  data = load(config(path=(good, str(bomb))), tokenizer)
  ((where, text),) = data.faults.found
  assert where == str(bomb) and 'grows to more than 200 times' in text
  assert len(data.rows) == 9


def test_a_carried_column_that_no_row_has_is_a_fault(
  config, tokenizer, tmp_path
):
  """By name, with the nearest; one that only the test file has is enough."""
  train = write(tmp_path / 'train.jsonl', pairs('train', 9))
  test = tmp_path / 'test.jsonl'
  row = {'input': 'a', 'output': 'b', 'answers': ['b'], 'note': 1}
  test.write_text(json.dumps(row))
  own = config(path=train, test=str(test), carry=('answers',))
  data = load(own, tokenizer)
  assert not data.faults.found
  assert data.split.test[0].carried == {'answers': ['b']}
  own = config(path=train, test=str(test), carry=('answer', 'note'))
  assert load(own, tokenizer).faults.found == [
    (
      'config.data.carry',
      "no row has a column 'answer'; did you mean 'answers'? Columns that are "
      'not trained on: answers, note',
    )
  ]
