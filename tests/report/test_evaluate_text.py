"""An evaluation on a terminal: every number, within 80 columns, inert."""

import copy
import re
import unicodedata

import pytest

from tests.report import evaluate_records, hostile
from tuner.evals.metrics import labels as labels_lib
from tuner.report import (
  escape,
  evaluate_flips,
  evaluate_labels,
  evaluate_parts,
  evaluate_text,
)

SGR = re.compile(r'\x1b\[[0-9;]*m')
PARTS = ('comparison', 'retention', 'checkpoints', 'alphas', 'samples')


@pytest.fixture(scope='module')
def json_rows():
  return evaluate_records.make_json(40)


@pytest.fixture
def made(json_rows):
  return copy.deepcopy(json_rows)


@pytest.fixture(scope='module')
def labels():
  return evaluate_records.make_labels()


def plain(made, columns=80):
  return evaluate_text.lines(*made, colour=False, columns=columns)


def test_golden(made):
  evaluate_records.check_golden('evaluate.txt', plain(made))


def test_the_verdict_comes_first_and_in_numbers(made):
  own = made[0]['comparison']['metrics']['json_equal']
  own |= {
    'difference': 0.457, 'low': 0.379, 'high': 0.534, 'p': 1e-9,
    'wins': 75, 'losses': 0, 'ties': 89,
  }  # fmt: skip
  made[0]['systems']['tuned']['json_equal']['n'] = 164
  assert plain(made, columns=200).splitlines()[0] == (
    'json_equal +0.457 [+0.379, +0.534] on 164 rows (p < 0.0001; 75 won, 0 '
    'lost); general text +0.021 [+0.017, +0.025] nats a token'
  )


@pytest.mark.parametrize(
  ('name', 'low', 'high', 'state'),
  [
    ('exact', 0.1, 0.2, 'good'),
    ('exact', -0.2, -0.1, 'bad'),
    ('exact', -0.1, 0.1, 'look'),
    ('exact', 0.0, 0.1, 'look'),
    ('nats_per_token', 0.1, 0.2, 'bad'),
    ('tuner.evals.nats_per_token', -0.2, -0.1, 'good'),
    ('exact', 'nan', 'nan', 'look'),
  ],
)
def test_a_difference_is_good_where_its_interval_is(name, low, high, state):
  assert evaluate_parts.side(name, {'low': low, 'high': high}) == state


@pytest.mark.parametrize(
  ('value', 'shown'),
  [
    (0, '0.000'),
    (0.4571, '0.457'),
    (9.9994, '9.999'),
    (9.9996, '10.00'),
    (-12.34, '-12.34'),
    (99.996, '100.0'),
    (1234.56, '1,234.6'),
    (5e6, '5e+06'),
    (0.00042, '4e-04'),
    (None, '–'),
    ('nan', '–'),
    (float('inf'), '–'),
  ],
)
def test_a_number_is_short_and_never_rounded_to_nothing(value, shown):
  assert evaluate_parts.number(value) == shown


@pytest.mark.parametrize(
  ('p', 'shown'),
  [
    (0, 'p < 0.0001'),
    (9.9e-5, 'p < 0.0001'),
    (1e-4, 'p = 0.0001'),
    (0.0321, 'p = 0.032'),
    (1, 'p = 1'),
    ('nan', 'p –'),
  ],
)
def test_a_p_is_said_with_its_sign(p, shown):
  assert evaluate_parts.chance(p) == shown


def test_every_number_of_the_record_is_there(made):
  check_numbers(made[0], plain(made))


def check_numbers(record, text):
  """Every metric, difference, p, count and point stands in the text."""
  number = evaluate_parts.number
  text = ' '.join(text.split())
  for system in record['systems'].values():
    for metric in system.values():
      assert evaluate_parts.plain(metric) in text
      assert f'{metric["n"]:,}' in text
  for side, system in record['retention'].items():
    for name, metric in system.items():
      if '.' in name:  # Of a kind of text: on the page.
        assert f'{name} ' not in text
      elif not name.endswith('_increase'):
        assert f'{evaluate_parts.plain(metric)}' in text
      elif side == 'tuned':
        assert evaluate_parts.signed(metric) in text
  for own in record['comparison']['metrics'].values():
    assert evaluate_parts.signed(own) in text
    assert evaluate_parts.chance(own['p']).split(' ', 1)[1].lstrip('= ') in text
    for key in ('wins', 'ties', 'losses'):
      assert f'{own[key]:,}' in text
  for point in (*record['checkpoints'], *record['alphas']):
    nats = number(point['nats_increase'], True)
    assert f'{evaluate_parts.plain(point)} {nats}' in text


def test_content_comes_before_format(made):
  text = plain(made)
  assert text.index('content') < text.index('json_equal', 80)
  assert (
    text.index('\ncontent')
    < text.index('\nformat')
    < (text.index('\nlikelihood'))
  )


def widest(made, length=90, n=1_000_000):
  """The record with long names, and counts of a million."""
  record, base, tuned = made
  name = '.'.join(['my_package', 'metrics', 'of_addresses'])
  name += '_' + 'x' * (length - len(name))
  rename = {'json_equal': name}
  systems = {
    side: {
      rename.get(key, key): metric | {'n': n} for key, metric in own.items()
    }
    for side, own in record['systems'].items()
  }
  counts = {'wins': n // 3, 'ties': n // 3, 'losses': n // 3 + 1}
  own = record['comparison']
  comparison = {
    'metrics': {
      rename.get(key, key): each | counts
      for key, each in own['metrics'].items()
    },
    'flips': {rename.get(key, key): each for key, each in own['flips'].items()},
  }
  checkpoints = [c | {'metric': name} for c in record['checkpoints']]
  record |= {
    'n': n, 'systems': systems, 'comparison': comparison,
    'checkpoints': checkpoints, 'metric': name,
  }  # fmt: skip
  return record, base, tuned


@pytest.mark.parametrize('columns', [60, 80, 132])
@pytest.mark.parametrize('colour', [False, True])
def test_lines_fit_whatever_the_names_and_counts(made, columns, colour):
  record, base, tuned = widest(made)
  text = evaluate_text.lines(record, base, tuned, colour, columns)
  lines = SGR.sub('', text).split('\n')
  assert max(map(escape.columns, lines)) <= columns
  name = record['metric']
  assert name in ''.join(line.strip() for line in lines), 'a name was cut'
  assert '1,000,000' in text
  assert '333,333 / 333,333 / 333,334' in text


def test_numbers_too_wide_for_a_line_stand_below_one_another(made):
  text = plain(widest(made), 60)
  assert '\n    p < 0.0001\n    won / tied / lost 333,333 /' in text


def test_wide_letters_take_two_columns(made):
  record = hostile.spread(made[0] | {'metric': 'x'}, '日本語の長い名前' * 9)
  assert max(map(escape.columns, plain((record, [], [])).split('\n'))) <= 80


def test_colour_adds_colour_and_nothing_else(made, labels):
  for each in (made, labels):
    assert SGR.sub('', evaluate_text.lines(*each, colour=True)) == plain(each)
    assert '\x1b' not in plain(each)


def test_what_was_not_measured_is_said_with_how_to_get_it(made):
  record, base, tuned = made
  record |= dict.fromkeys(PARTS) | {'confusion': None}
  record['systems']['base'] = None
  text = ' '.join(plain((record, None, tuned)).split())
  for name in ('base', 'retention'):
    assert f'- {evaluate_parts.MISSING[name]}' in text
  # What nobody asked for is not said to be missing.
  for name in ('checkpoints', 'alphas', 'samples', 'flips'):
    assert evaluate_parts.MISSING[name] not in text
  off = ' '.join(
    plain((record | {'retention_share': 0.0}, None, tuned)).split()
  )
  assert evaluate_parts.MISSING['retention'] not in off
  assert 'not compared with a base' in text
  assert 'general text not measured' in text
  assert 'won' not in text
  for name in (*PARTS, 'confusion', 'reads', 'max_nats_increase'):
    del record[name]
  assert ' '.join(plain((record, None, tuned)).split()) == text.replace(
    ' the test split was read once', ''
  )


def test_the_base_alone(made):
  record, base, _ = made
  record |= dict.fromkeys(PARTS) | {'step': 0}
  record['systems']['tuned'] = None
  text = ' '.join(plain((record, base, None)).split())
  assert 'on 40 rows, the base alone scores' in text
  assert evaluate_parts.MISSING['tuned'] in text
  assert 'row by row' not in text


def test_scores_without_answers_stand_side_by_side(made):
  record = made[0] | {'comparison': None, 'metric': 'nats_per_token'}
  assert evaluate_parts.verdict(record) == (
    'look',
    'nats_per_token 0.214 [0.193, 0.236] on 40 rows, the base 1.913 [1.722, '
    '2.105]; general text +0.021 [+0.017, +0.025] nats a token',
  )
  assert 'were not compared row by row' in plain((record, [], []))


def test_an_increase_is_the_difference_of_its_metric(made):
  rows = {row.name: row for row in evaluate_parts.retention(made[0])}
  tuned = made[0]['retention']['tuned']
  assert not {'nats_increase', 'quiz_increase'} & rows.keys()
  for name, increase in (
    ('general_nats', 'nats_increase'),
    ('quiz', 'quiz_increase'),
  ):
    assert rows[name].difference['difference'] == tuned[increase]['value']
  assert rows['kl_nats'].difference is None
  del tuned['general_nats']
  rows = {row.name: row for row in evaluate_parts.retention(made[0])}
  assert rows['nats_increase'].tuned == tuned['nats_increase']


def test_tasks_of_the_harness_have_intervals(made):
  record = made[0]
  task = {'value': 0.31, 'stderr': 0.01, 'n': 500}
  record['harness'] = {
    'base': {'arc': {'acc': task, 'f1': task | {'stderr': None}}},
    'tuned': {'arc': {'acc': task | {'value': 'nan'}}},
  }
  lines = plain(made).split('\n')
  shown = lines[lines.index('lm-eval ' + '─' * 72) :][2:4]
  assert [re.split(' {2,}', line.strip()) for line in shown] == [
    ['arc acc', '0.310 [0.290, 0.330]', '– [–, –]', '500'],
    ['arc f1', '0.310', '–', '500'],
  ]


@pytest.mark.parametrize(
  ('given', 'titles'),
  [
    (['content', 'content', 'format', ''], ['content', 'format', 'other']),
    (['format', 'content'], ['content', 'format']),
    (['', ''], []),
  ],
)
def test_kinds_are_titles_where_there_are_any(given, titles):
  metric = {'value': 1.0, 'low': 0.9, 'high': 1.0, 'n': 9}
  own = {f'm{i}': metric | {'kind': kind} for i, kind in enumerate(given)}
  rows = evaluate_parts.metrics({'systems': {'tuned': own}})
  found = list(evaluate_parts.kinds(rows))
  assert [title for title, _ in found if title] == titles
  assert [row for _, row in found] == rows
  text = plain(({'systems': {'tuned': own}}, [], []))
  assert re.findall('^(content|format|other)$', text, re.MULTILINE) == titles


def test_an_empty_record_says_so():
  assert plain(({}, [], [])).startswith('nothing was measured')


def test_a_split_read_twice_is_no_longer_quite_held_out(made):
  assert 'the test split was read once' in plain(made)
  made[0]['reads'] = 3
  assert 'read 3 times: what was chosen' in plain(made)


def test_lost_rows_come_before_won_ones_and_all_are_counted(made):
  record, base, tuned = made
  text = plain(made)
  first = record['comparison']['flips']['json_equal']
  assert text.count('✗') == text.count('✓') == evaluate_text.ROWS == 2
  places = [
    text.index(f' {key}: ')
    for side in ('lost', 'won')
    for key in first[side][: evaluate_text.ROWS]
  ]
  assert places == sorted(places)
  lost, won = (len(first[side]) - 2 for side in ('lost', 'won'))
  assert f'{lost} more lost, {won} more won: on the page' in text


def test_flips_of_a_row_say_every_metric(made):
  rows, groups = evaluate_flips.flips(*made, most=5)
  flips = made[0]['comparison']['flips']
  for row in rows:
    for side in ('won', 'lost'):
      assert set(getattr(row, side)) == {
        name for name in flips if row.where in flips[name][side]
      }
    assert row.base['id'] == row.tuned['id'] == row.where
  for group in groups:
    ids = flips[group.metric][group.side]
    assert group.total == len(ids)
    assert group.shown == sum(row.where in ids for row in rows)
    assert group.shown >= min(5, group.total)


def test_a_flip_without_its_prediction_is_still_there(made):
  text = plain((made[0], [], []))
  key = made[0]['comparison']['flips']['json_equal']['lost'][0]
  assert f'{key}: lost' in text
  assert 'its prediction is not among those given' in text


def test_most_confused_labels_come_first(labels):
  tables = evaluate_labels.tables(labels[0])
  found = evaluate_labels.confused(tables)
  counts = tables.tuned
  place = {name: i for i, name in enumerate(tables.labels)}
  assert [pair.tuned for pair in found] == sorted(
    (pair.tuned for pair in found), reverse=True
  )
  for pair in found[:50]:
    assert pair.tuned == counts[place[pair.wanted]][place[pair.said]]
    assert pair.wanted != pair.said
  off = sum(map(sum, counts)) - sum(counts[i][i] for i in range(77))
  assert sum(pair.tuned for pair in found) == off
  wanted, said, base, tuned = found[0]
  assert f'\n{tuned} (base {base}): {wanted} taken for' in plain(labels)


def test_tables_of_two_systems_are_laid_over_one_another():
  base = {'labels': ['b', 'a'], 'counts': [[1, 2, 3], [4, 5, 6]]}
  tuned = {'labels': ['a', 'c'], 'counts': [[7, 0, 0], [0, 0, 0]]}
  tuned['absent'] = ['c']
  found = evaluate_labels.tables({'confusion': {'base': base, 'tuned': tuned}})
  assert found.columns == ['a', 'c', 'b', evaluate_labels.NONE]
  assert found.base == [[5, 0, 4, 6], [0] * 4, [2, 0, 1, 3]]
  assert found.tuned == [[7, 0, 0, 0], [0] * 4, [0] * 4]
  assert found.absent == ['c']
  assert evaluate_labels.confused(found) == [
    ('a', evaluate_labels.NONE, 6, 0),
    ('a', 'b', 4, 0),
    ('b', evaluate_labels.NONE, 3, 0),
    ('b', 'a', 2, 0),
  ]
  for nothing in (None, {}, {'base': None, 'tuned': None}):
    assert evaluate_labels.tables({'confusion': nothing}) is None


def test_one_system_alone_has_its_table():
  tuned = {'labels': ['a', 'b'], 'counts': [[2, 0, 0], [1, 0, 0]]}
  alone = evaluate_labels.tables({'confusion': {'base': None, 'tuned': tuned}})
  assert alone == (['a', 'b'], None, tuned['counts'], [])
  assert evaluate_labels.confused(alone) == [('b', 'a', None, 1)]


def test_tables_are_as_the_metric_makes_them():
  table = labels_lib.confusion(
    ['A', 'who knows?', 'b'], ['a', 'b', 'b'], [], ('a', 'b', 'c')
  )
  found = evaluate_labels.tables({'confusion': {'base': None, 'tuned': table}})
  assert found.columns == ['a', 'b', 'c', evaluate_labels.NONE]
  assert found.tuned == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
  assert found.absent == ['c']


@pytest.mark.parametrize('text', hostile.TEXTS)
@pytest.mark.parametrize('colour', [False, True])
def test_what_models_say_does_not_act_on_a_terminal(made, text, colour):
  shown = evaluate_text.lines(*evaluate_records.spread(made, text), colour)
  left = SGR.sub('', shown) if colour else shown
  for c in left.replace('\n', ''):
    category = unicodedata.category(c)
    assert category not in ('Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp'), ascii(c)
  # No line of the data can pass for one of ours.
  assert not re.search('^forged', left, re.MULTILINE)


def test_what_is_cut_is_counted(made):
  record, base, tuned = made
  output = 'word ' * 1000
  record['samples'] = [
    {'prompt': 'p', 'reference': 'r', 'base': None, 'tuned': output}
  ]
  record['comparison'] = None
  text = re.sub('[│ \n]', '', plain(made))
  assert f'tuned⟦{"word" * 26}⟧…4,870charactersmore' in text


def test_marks_in_a_text_are_no_marks_of_ours(made):
  made[0]['samples'] = [
    {'prompt': 'p', 'reference': 'r', 'base': None, 'tuned': '⟦r⟧'}
  ]
  made[0]['comparison'] = None
  assert 'tuned   ⟦<U+27E6>r<U+27E7>⟧\n' in plain(made)


@pytest.mark.parametrize('left', [0, 1, 24, 25, 999])
def test_shortened_and_its_count_are_the_text(left):
  text = 'x' * (50 + left)
  kept, note = evaluate_flips.shorten(text, 50)
  more = int(re.sub(r'\D', '', note) or 0)
  assert len(kept) + more == len(text)
  assert len(kept) + len(note) <= 50 + 26


@pytest.mark.parametrize('n', [0, 1, 3, 4, 100])
def test_evenly_takes_so_many_in_order(n):
  kept = evaluate_flips.evenly(range(n), 3)
  assert len(kept) == min(3, n)
  assert kept == sorted(set(kept))


@pytest.mark.parametrize(
  ('prompt', 'last', 'before'),
  [
    ('hello', 'hello', ''),
    ([{'role': 'user', 'content': 'hi'}], 'hi', ''),
    (
      [{'role': 'system', 'content': 'abc'}, {'role': 'user', 'content': 'hi'}],
      'hi',
      'after 1 message of 3 characters',
    ),
    ([{'role': 'user', 'content': [{'text': 'ß'}]}], '[{"text": "ß"}]', ''),
    ([{'role': 'tool', 'content': 'x', 'name': 'f'}], 'x\n{"name": "f"}', ''),
    ([], '', ''),
  ],
)
def test_a_prompt_is_its_last_message(prompt, last, before):
  assert evaluate_flips.asked(prompt) == (last, before)


def test_a_record_is_left_as_it_is(made):
  before = copy.deepcopy(made)
  plain(made)
  assert made == before


def test_it_is_seen_at_once(made, labels):
  """With the curve of many checkpoints, and without."""
  made[0].update(evaluate_records.make_curve(steps=500))
  for each in (made, labels):
    text = plain(each)
    assert len(text.splitlines()) <= 88
  curve = plain(made)
  assert 'json_equal' in curve and '488 more checkpoints on the page' in curve
  assert re.search('step 154 .* chosen\n', curve)
  assert 'step 11,000' in curve
  made[0].update(checkpoints=[], alphas=[], max_nats_increase=None)
  made[0]['comparison']['flips']['json_equal']['lost'] = []
  assert len(plain(made).splitlines()) <= 60


def test_an_answer_as_wanted_is_not_said_twice(made):
  lines = plain(made).splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith('✓'))
  own = lines[start:]
  assert sum(line == '│ tuned: as wanted' for line in own) == 2
  assert not any(line.startswith('│ tuned   ') for line in own)


def test_samples_are_shown_where_no_row_can_flip(made):
  assert 'samples ──' not in plain(made)
  made[0]['comparison'] = None
  assert 'samples ──' in plain(made)


def test_metrics_of_sets_have_no_counts(made):
  own = made[0]['comparison']['metrics']
  own['macro_f1'] = {
    k: x for k, x in own['json_equal'].items()
    if k not in ('wins', 'ties', 'losses')
  }  # fmt: skip
  assert re.search(r'\n  macro_f1 .* < 0.0001 +–\n', plain(made))
