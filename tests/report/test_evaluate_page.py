"""The page of an evaluation: whole, self-contained, inert, every number."""

import copy
import re

import pytest

from tests.report import evaluate_records, hostile, test_check_page
from tuner.report import (
  escape,
  evaluate_flips,
  evaluate_heat,
  evaluate_labels,
  evaluate_page,
  evaluate_parts,
  evaluate_plot,
  evaluate_rows,
)

VOID = ('meta', 'input', 'wbr')
# Everything that a page of ours is made of.
TAGS = {
  'html', 'head', 'meta', 'title', 'style', 'body', 'main', 'header', 'h1',
  'h2', 'p', 'div', 'dl', 'dt', 'dd', 'small', 'span', 'b', 'wbr', 'code',
  'details', 'summary', 'ol', 'li', 'pre', 'mark', 'table', 'thead', 'tbody',
  'tr', 'th', 'td', 'input', 'label',
  'svg', 'g', 'path', 'rect', 'line', 'circle', 'text',
}  # fmt: skip
ATTRIBUTES = {
  'class', 'title', 'lang', 'charset', 'http-equiv', 'content', 'name', 'open',
  'type', 'id', 'for', 'checked', 'colspan',
  'viewbox', 'role', 'aria-label', 'd', 'x', 'y', 'width', 'height', 'x1', 'x2',
  'y1', 'y2', 'cx', 'cy', 'r',
}  # fmt: skip


class Reader(test_check_page.Reader):
  """As of the check's page, with the tags that have no end."""

  def handle_starttag(self, tag, attributes):
    super().handle_starttag(tag, attributes)
    if tag in VOID and tag not in test_check_page.VOID:
      assert self.open.pop() == tag


@pytest.fixture(scope='module')
def json_rows():
  return evaluate_records.make_json(40)


@pytest.fixture
def made(json_rows):
  return copy.deepcopy(json_rows)


@pytest.fixture(scope='module')
def labels():
  return evaluate_records.make_labels()


def page_of(made, title='an evaluation'):
  return evaluate_page.html(*made, title)


def check_inert(page):
  reader = Reader(page)
  for tag, attributes in reader.tags:
    assert tag in TAGS
    assert attributes.keys() <= ATTRIBUTES, (tag, attributes)
    assert attributes.get('type', 'radio') == 'radio'
    for key in ('id', 'for', 'class'):
      assert re.fullmatch(r'[a-z0-9 ]*', attributes.get(key) or '')
  for style in re.findall('<style>(.*?)</style>', page, re.S):
    assert not re.search(r'url\(|@import|[<\\]|//', style)
  return reader


def test_a_page_is_whole_and_loads_nothing(made, labels):
  for each in (made, labels):
    page = page_of(each)
    reader = check_inert(page)
    policies = [
      attributes['content']
      for _, attributes in reader.tags
      if attributes.get('http-equiv') == 'Content-Security-Policy'
    ]
    assert policies[0].startswith("default-src 'none'")
    assert not re.search('https?:|<script|javascript', page)
    assert page.encode().decode() == page


def test_every_number_of_the_record_is_there(made):
  record = made[0]
  text = Reader(page_of(made)).text
  assert evaluate_parts.verdict(record)[1] in text
  retention = record['retention']
  for name in ('nats_increase', 'quiz_increase'):
    del retention['base'][name]
    gain = retention['tuned'].pop(name)
    assert evaluate_parts.signed(gain).replace(' ', '', 1) in text
  for system in (*record['systems'].values(), *retention.values()):
    for metric in system.values():
      assert evaluate_parts.plain(metric).replace(' ', '', 1) in text
      assert f'{metric["n"]:,}' in text
  for own in record['comparison']['metrics'].values():
    gain = evaluate_parts.signed(own).replace(' ', '', 1)
    p = re.sub('^p (= )?', '', evaluate_parts.chance(own['p']))
    counts = ''.join(f'{own[key]:,}' for key in ('wins', 'ties', 'losses'))
    assert f'{gain}{p}{counts}' in text
  for point in (*record['checkpoints'], *record['alphas']):
    nats = evaluate_parts.number(point['nats_increase'], True)
    score = evaluate_parts.plain(point)
    assert score.replace(' ', '', 1) + nats in text
    assert f'{score}, general nats {nats}' in text
  for name, value in evaluate_parts.facts(record):
    assert name + value in text


@pytest.mark.parametrize('text', hostile.TEXTS)
def test_what_models_say_is_text_and_nothing_else(made, text):
  plain = check_inert(page_of(evaluate_records.spread(made, 'x'), 'x'))
  reader = check_inert(page_of(evaluate_records.spread(made, text), text))
  # How an answer differs from the wanted one, and where a name may be broken,
  # is the text's own.
  names, wanted = (
    [tag for tag, _ in each.tags if tag not in ('mark', 'wbr')]
    for each in (reader, plain)
  )
  assert names == wanted
  assert escape.visible(text) in reader.text
  assert set(c for c in reader.text if not c.isprintable()) <= {'\n'}


@pytest.mark.parametrize('text', hostile.TEXTS[:3])
def test_labels_are_text_and_nothing_else(labels, text):
  reader = check_inert(page_of(evaluate_records.spread(labels, text), text))
  assert escape.visible(text) in reader.text


def test_what_was_not_measured_is_said_with_how_to_get_it(made):
  record, base, tuned = made
  for name in ('comparison', 'retention', 'checkpoints', 'alphas', 'samples'):
    record[name] = None
  record['systems']['base'] = None
  reader = check_inert(page_of((record, None, tuned)))
  for name in ('base', 'retention', 'checkpoints', 'samples', 'flips'):
    assert f'– {evaluate_parts.MISSING[name]}' in reader.text
  assert 'svg' not in [tag for tag, _ in reader.tags]
  text = check_inert(page_of(({}, [], []))).text
  assert 'nothing was measured' in text


def test_each_row_that_flipped_is_there_with_its_texts(made):
  record, base, tuned = made
  text = Reader(page_of(made)).text
  rows, _ = evaluate_flips.flips(*made, most=evaluate_rows.MOST)
  assert {row.where for row in rows} == {
    key
    for flips in record['comparison']['flips'].values()
    for side in flips.values()
    for key in side
  }
  for row in rows:
    assert row.where in text
    for said in (row.tuned['reference'], row.tuned['prompt'][-1]['content']):
      assert said in text
    for side in (row.base, row.tuned):
      output = side['output'][: evaluate_rows.CHARACTERS]
      assert output.replace('\n', '↵\n') in text


def rows_of(page):
  return [
    set(attributes['class'].split())
    for tag, attributes in Reader(page).tags
    if tag == 'details' and attributes.get('class', '').startswith('row ')
  ]


def test_a_button_shows_its_own_rows_and_no_others(labels):
  page = page_of(labels)
  rows, groups = evaluate_flips.flips(*labels, most=evaluate_rows.MOST)
  picks = [group for group in groups if group.total]
  for i, group in enumerate(picks, 1):
    assert sum(f'f{i}' in classes for classes in rows_of(page)) == group.shown
    assert f'#f{i}:checked ~ .row:not(.f{i}) {{ display: none; }}' in page
    assert f'id="f{i}"' in page and f'<label for="f{i}">' in page
    said = f'{group.shown:,} of {group.total:,} rows are shown;'
    assert (said in page) is (group.shown < group.total)
  assert len(rows_of(page)) == len(rows)


def test_sides_without_rows_are_said(made):
  flips = made[0]['comparison']['flips']
  assert flips['json_valid']['lost'] == []
  text = Reader(page_of(made)).text
  assert 'No row was lost by json_valid, lost by stopped.' in text


def test_where_no_row_flipped_there_are_no_buttons(made):
  for flips in made[0]['comparison']['flips'].values():
    flips |= {'won': [], 'lost': []}
  reader = check_inert(page_of(made))
  assert 'No row was lost by json_equal, won by json_equal' in reader.text
  assert not {'input', 'label'} & {tag for tag, _ in reader.tags}


def test_what_is_cut_is_counted():
  text = Reader(evaluate_rows.text('x' * 5000)).text
  assert text == 'x' * evaluate_rows.CHARACTERS + ' … 4,200 characters more'
  assert Reader(evaluate_rows.text('')).text == '∅ nothing'


def test_what_differs_is_marked():
  html = evaluate_rows.text('{"a": 2}\n', '{"a": 1}\n')
  assert html == '{&quot;a&quot;: <mark>2</mark>}↵\n'


# The curve.


def points(page, kind):
  return [a for tag, a in Reader(page).tags if tag == kind]


def test_each_checkpoint_has_its_place(made):
  record = made[0]
  svg = evaluate_plot.curve(record['checkpoints'], [], 0.05, 'json_equal')
  dots = [a for a in points(svg, 'circle') if a['class'] == 'point']
  assert len(dots) == len(record['checkpoints'])
  for a, b in zip(record['checkpoints'], dots, strict=True):
    for c, d in zip(record['checkpoints'], dots, strict=True):
      if a['nats_increase'] < c['nats_increase']:
        assert float(b['cx']) < float(d['cx'])
      if a['value'] < c['value']:
        assert float(b['cy']) >= float(d['cy'])
  (bound,) = [a for a in points(svg, 'line') if a['class'] == 'bound']
  for point, dot in zip(record['checkpoints'], dots, strict=True):
    is_left = float(dot['cx']) <= float(bound['x1'])
    assert is_left is point['allowed']


def test_intervals_are_bars_from_low_to_high(made):
  record = made[0]
  svg = evaluate_plot.curve(record['checkpoints'][:2], [], None, 'exact')
  dots = [a for a in points(svg, 'circle') if a['class'] == 'point']
  bars = [a for a in points(svg, 'line') if a['class'] == 'bar']
  scale = (float(dots[0]['cy']) - float(dots[1]['cy'])) / (
    record['checkpoints'][1]['value'] - record['checkpoints'][0]['value']
  )
  for point, dot, bar in zip(record['checkpoints'], dots, bars, strict=False):
    for key, end in (('low', 'y1'), ('high', 'y2')):
      wanted = float(dot['cy']) - scale * (point[key] - point['value'])
      assert float(bar[end]) == pytest.approx(wanted, abs=0.5)


def test_one_is_ringed_and_those_outside_are_grey(made):
  record = made[0]
  svg = evaluate_plot.curve(record['checkpoints'], [], 0.05, 'json_equal')
  classes = [a.get('class', '').split() for a in points(svg, 'g')]
  assert classes.count(['at', 'chosen']) == 1
  out = sum(not point['allowed'] for point in record['checkpoints'])
  assert classes.count(['at', 'out']) == out > 0
  assert len([a for a in points(svg, 'circle') if a['class'] == 'ring']) == 1


def test_the_base_is_step_0_and_not_outside(made):
  record = made[0]
  base = {'step': 0, 'metric': 'json_equal', 'value': 0.4, 'low': 0.3,
          'high': 0.5, 'nats_increase': 0.0, 'chosen': False,
          'allowed': False}  # fmt: skip
  assert evaluate_parts.standing(base) == 'base'
  svg = evaluate_plot.curve([base, *record['checkpoints']], [], 0.05, 'x')
  assert '>base</text>' in svg


def test_alphas_are_a_series_of_their_own(made):
  record = made[0]
  svg = evaluate_plot.curve(
    record['checkpoints'], record['alphas'], None, 'json_equal'
  )
  squares = [a for a in points(svg, 'rect') if a['class'] == 'point']
  assert len(squares) == len(record['alphas'])
  only = evaluate_plot.curve([], record['alphas'], None, 'json_equal')
  assert len(points(only, 'rect')) == len(record['alphas'])


def test_points_without_a_place_are_counted(made):
  record = made[0]
  for point in record['checkpoints'][:3]:
    point['nats_increase'] = None
  text = Reader(page_of(made)).text
  assert '– 3 points not drawn' in text
  for point in (*record['checkpoints'], *record['alphas']):
    point['nats_increase'] = None
  page = page_of(made)
  assert '<svg' not in page
  assert '– 16 points not drawn' in Reader(page).text
  assert 'step 242' in Reader(page).text


@pytest.mark.parametrize('value', [0.0, 0.5, 1.0, 1e-9, -3.0, 40_000.0])
@pytest.mark.parametrize('ends', [None, 'nan', 0.0])
def test_a_single_point_is_drawn_inside(value, ends):
  point = {'step': 1, 'metric': 'x', 'value': value, 'low': ends,
           'high': ends and value, 'nats_increase': value}  # fmt: skip
  svg = evaluate_plot.curve([point], [], None, 'x')
  (dot,) = points(svg, 'circle')
  assert 0 < float(dot['cx']) < 640 and 0 < float(dot['cy']) < 380


@pytest.mark.parametrize(
  ('values', 'ticks'),
  [
    ([0.0, 1.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ([0.43, 0.94], [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    ([-0.001, 0.107], [-0.02, 0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12]),
    ([3, 3], [3, 4]),
  ],
)
def test_ticks_are_round_and_hold_all_values(values, ticks):
  axis = evaluate_plot._Axis(values, 0, 100)
  assert axis.ticks[0] <= min(values) and max(values) <= axis.ticks[-1]
  if len(set(values)) > 1:
    assert axis.ticks == pytest.approx(ticks)
  assert axis.at(axis.ticks[0]) == 0 and axis.at(axis.ticks[-1]) == 100


# Labels.


def cells(html):
  reader = Reader(html)
  return [a for tag, a in reader.tags if tag == 'td']


def test_a_matrix_has_a_cell_for_each_pair_and_shades_its_counts(labels):
  table = evaluate_labels.tables(labels[0])
  html = evaluate_heat.matrices(table._replace(base=None))
  shown = cells(html)
  assert len(shown) == 77 * 78
  for i in range(77):
    for j in range(78):
      cell, n = shown[78 * i + j], table.tuned[i][j]
      assert bool(cell) is (n > 0)
      if n:
        assert cell['class'][0] == ('r' if i == j else 'w')
        assert f'said {table.columns[j]}: {n:,}' in cell['title']


def test_shades_grow_with_counts():
  counts = [[100, 1, 4, 30], [0] * 4, [0, 50, 0, 0]]
  html = evaluate_heat.matrices(tables_of(list('abc'), counts))
  first = [cell.get('class') for cell in cells(html)[:4]]
  assert first == ['r4', 'w1', 'w1', 'w2']


def test_of_very_many_labels_those_with_mistakes_are_shown():
  n = evaluate_heat.MOST + 30
  counts = [[3 * (i == j) for j in range(n + 1)] for i in range(n)]
  counts[n - 2][n] = 1
  counts[n - 1][n - 3] = 2
  html = evaluate_heat.matrices(tables_of(list(range(n)), counts))
  assert f'the {evaluate_heat.MOST} with most mistakes of {n} labels' in html
  assert f'wanted {n - 1}, said {n - 3}: 2' in html
  assert f'wanted {n - 2}, said (no label): 1' in html
  assert len(cells(html)) == evaluate_heat.MOST * (evaluate_heat.MOST + 1)


def tables_of(labels, counts):
  return evaluate_labels.Tables(labels, None, counts, [])


def test_labels_that_no_row_wants_are_named():
  tables = evaluate_labels.Tables(
    ['a', '<b>'], None, [[1, 0, 0], [0] * 3], ['<b>']
  )
  text = Reader(evaluate_heat.matrices(tables)).text
  assert 'Labels that no row wants: <b>.' in text


def test_pairs_say_how_many_more_there_are(labels):
  tables = evaluate_labels.tables(labels[0])
  text = Reader(evaluate_heat.pairs(tables)).text
  more = len(evaluate_labels.confused(tables)) - 20
  assert f'{more:,} more pairs in the tables' in text
  right = tables_of(['a', 'b'], [[2, 0, 0], [0, 2, 0]])
  assert 'No label was taken' in Reader(evaluate_heat.pairs(right)).text


def test_a_record_is_left_as_it_is(made):
  before = copy.deepcopy(made)
  page_of(made)
  assert made == before
