"""Two systems on the same rows, and scores of whole sets."""

import json

import numpy as np
import pytest
import sacrebleu

from tuner.data import rows as rows_lib
from tuner.evals import compare, corpus, generative, stats

LABELS = ['card', 'cash', 'loan', 'rate']


def score(outputs, references, sections, rows=None):
  rows = rows or [rows_lib.Row(where=f'f:{i}') for i in range(len(outputs))]
  words = [*outputs, '']
  return generative.score(
    rows,
    references,
    [[i, 99] for i in range(len(outputs))],
    lambda ids: words[ids[0]],
    (99,),
    generative.find(sections),
    0,
    [[-0.5, -1.0]] * len(outputs),
  )


def guesses(n, right, seed):
  rng = np.random.default_rng(seed)
  references = rng.choice(LABELS, n).tolist()
  wrong = rng.choice([*LABELS, 'no label'], n).tolist()
  is_right = rng.random(n) < right
  return [r if ok else w for r, w, ok in zip(references, wrong, is_right)], (
    references
  )


def test_what_is_won_and_lost_is_named():
  references = ['a', 'b', 'c', 'd']
  base = score(['a', 'x', 'x', 'd'], references, ['exact']).predictions
  tuned = score(['a', 'b', 'c', 'x'], references, ['exact']).predictions
  found = compare.pair(base, tuned)
  assert found['n'] == 4
  own = found['metrics']['exact']
  wanted = stats.compare([1, 1, 1, 0], [1, 0, 0, 1], stats.SEED)
  assert own == {
    'difference': wanted.difference.mean,
    'low': wanted.difference.low,
    'high': wanted.difference.high,
    'p': 1.0,
    'wins': 2,
    'ties': 1,
    'losses': 1,
  }
  assert found['flips']['exact'] == {'won': ['f:1', 'f:2'], 'lost': ['f:3']}
  assert found['flips']['stopped'] == {'won': [], 'lost': []}


def test_other_rows_or_other_scores_are_refused(tmp_path):
  one = score(['a', 'b'], ['a', 'b'], ['exact']).predictions
  with pytest.raises(ValueError, match='1 rows of the base and 2 of the tuned'):
    compare.pair(one[:1], one)
  other = score(['a', 'b'], ['a', 'b'], ['contains']).predictions
  with pytest.raises(ValueError, match=r"\['exact', 'stopped'\] and the tuned"):
    compare.pair(one, other)
  found = compare.pair(one[:1], one[:1])
  file = compare.write(tmp_path, 'base', 'tuned', found)
  assert file.name == 'base.vs.tuned.json'
  assert json.loads(file.read_text()) == found


def test_macro_f1_is_the_mean_of_each_label():
  """By its definition, label by label; a label nobody has is named."""
  outputs, references = guesses(80, 0.6, 0)
  section = {'name': 'macro_f1', 'labels': (*LABELS, 'never')}
  found = score(outputs, references, [section, 'label'])
  f1 = []
  for name in LABELS:
    right = sum(o == r == name for o, r in zip(outputs, references))
    f1.append(2 * right / (outputs.count(name) + references.count(name)))
  mean, low, high = found.intervals['macro_f1']
  assert mean == pytest.approx(np.mean(f1)) and low < mean < high
  table = found.tables['confusion']
  counts = np.array(table['counts'])
  assert table['absent'] == ['never']
  assert counts.sum() == 80 and counts.shape[1] == counts.shape[0] + 1
  assert counts[:, -1].sum() == outputs.count('no label')
  label = sum(o == r for o, r in zip(outputs, references)) / 80
  assert found.intervals['label'].mean == pytest.approx(label)
  assert found.kinds['macro_f1'] == 'content'


def test_intervals_of_macro_f1_hold_the_truth():
  """Of 300 sets of 100 rows; the truth is that of 100,000."""
  metric = generative.find(['macro_f1'])['macro_f1']
  truth = metric.function(*guesses(100_000, 0.6, 1), [])
  held = 0
  for seed in range(300):
    outputs, references = guesses(100, 0.6, 10 + seed)
    drawn = metric.drawn(outputs, references, [None] * 100)
    found = stats.draws(100, seed, 500)
    values = np.concatenate([drawn.of_counts(c) for c in found])
    own = corpus._corrected(drawn.value(), values, 100, 0.95)
    held += own.low <= truth <= own.high
  assert 0.91 <= held / 300 <= 0.98


WORDS = 'the quick brown fox jumps over a lazy dog and runs'.split()


def sentences(n, seed):
  rng = np.random.default_rng(seed)
  pick = lambda k: ' '.join(rng.choice(WORDS, k))
  references = [pick(rng.integers(4, 12)) for _ in range(n)]
  return [
    ' '.join([*r.split()[:-2], *pick(3).split()]) if rng.random() < 0.8 else ''
    for r in references
  ], references


def test_corpus_bleu_is_that_of_the_library():
  """Made of sums over rows, too, on every draw of rows."""
  outputs, references = sentences(30, 0)
  metric = generative.find(['corpus_bleu'])['corpus_bleu']
  drawn = metric.drawn(outputs, references, [None] * 30)
  bleu = sacrebleu.metrics.BLEU()
  for counts in next(stats.draws(30, 0, 20)):
    rows = np.arange(30).repeat(counts.astype(int))
    wanted = bleu.corpus_score(
      [outputs[i] for i in rows], [[references[i] for i in rows]]
    ).score
    assert drawn.of_counts(counts[None])[0] * 100 == pytest.approx(wanted)
  low = [['a b c d x', 'y'], ['a b e f g', 'y z']]  # no 3-gram is right
  wanted = bleu.corpus_score(low[0], [low[1]]).score / 100
  assert metric.drawn(*low, [None] * 2).value() == pytest.approx(wanted)
  assert metric.function(*low, []) == pytest.approx(wanted)


def test_scores_of_sets_are_compared_by_changing_systems():
  base, references = guesses(100, 0.3, 3)
  tuned = [r if i % 3 else b for i, (r, b) in enumerate(zip(references, base))]
  metrics = generative.find(['macro_f1', 'label'])
  both = [
    score(outputs, references, ['macro_f1', 'label']).predictions
    for outputs in (base, tuned)
  ]
  rows = [rows_lib.Row()] * 100
  own = compare.pair(*both, metrics, rows)['metrics']['macro_f1']
  assert 0 < own['low'] < own['difference'] < own['high']
  assert own['p'] == pytest.approx(1 / 2001)
  assert not {'wins', 'ties', 'losses'} & own.keys()
  same = compare.pair(both[0], both[0], metrics, rows)['metrics']['macro_f1']
  assert (same['difference'], same['p']) == (0, 1)


def test_of_equal_systems_few_sets_are_called_different():
  metric = generative.find(['macro_f1'])['macro_f1']
  called, corpus_samples = 0, corpus.SAMPLES
  try:
    corpus.SAMPLES = 200
    for seed in range(100):
      base, references = guesses(60, 0.6, seed)
      tuned = guesses(60, 0.6, 1000 + seed)[0]
      rng = np.random.default_rng(seed)
      tuned = [
        r if rng.random() < 0.6 else t for r, t in zip(references, tuned)
      ]
      base = [r if rng.random() < 0.6 else t for r, t in zip(references, base)]
      tuned = [a if rng.random() < 0.5 else b for a, b in zip(tuned, base)]
      sides = [
        [{'reference': r, 'output': o} for r, o in zip(references, outputs)]
        for outputs in (base, tuned)
      ]
      if seed % 2:
        sides.reverse()
      found = compare._of_sets(metric, *sides, [None] * 60)
      called += found.p <= 0.05
  finally:
    corpus.SAMPLES = corpus_samples
  assert called <= 12


def of_all(predictions, references, rows):
  """A user's own metric of sets: the share of different predictions."""
  return len(set(predictions)) / len(references)


def of_one(text, wanted, row):
  """A user's own metric, of any range, its parameters named otherwise."""
  return 3.0 * len(text) + len(row.where)


def test_metrics_of_the_users_own(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'own_metrics', _Own)
  found = score(
    ['a', 'b', 'b', 'c'],
    ['a'] * 4,
    ['own_metrics.of_all', 'own_metrics.of_one'],
  )
  mean, low, high = found.intervals['own_metrics.of_all']
  assert mean == 0.75 and low <= mean <= high
  assert found.scores['own_metrics.of_one'] == [6.0] * 4
  assert 'own_metrics.of_all' not in found.scores
  metrics = generative.find(['own_metrics.of_one'])
  metrics['own_metrics.of_one'].check('abc', rows_lib.Row())
  both = [
    score(outputs, ['a'] * 4, ['own_metrics.of_all']).predictions
    for outputs in (['a', 'a', 'b', 'c'], ['a', 'b', 'c', 'd'])
  ]
  own = compare.pair(
    *both, generative.find(['own_metrics.of_all']), [rows_lib.Row()] * 4
  )['metrics']['own_metrics.of_all']
  assert own['difference'] == 0.25 and 0 < own['p'] <= 1


class _Own:
  of_all = staticmethod(of_all)
  of_one = staticmethod(of_one)


def test_what_is_written(tmp_path):
  """Kinds, tables and the likelihood of each answer."""
  found = score(['card', 'x'], ['card', 'cash'], ['label', 'json_valid'])
  others = {'nats_per_token': (stats.Interval(1.0, 0.5, 1.5), 2)}
  generative.write(tmp_path, 'test.base', found, others, 'key')
  written = json.loads((tmp_path / 'test.base.json').read_text())
  kinds = {name: m['kind'] for name, m in written['metrics'].items()}
  assert kinds == {
    'label': 'content',
    'json_valid': 'format',
    'stopped': 'format',
    'nats_per_token': 'likelihood',
  }
  assert written['tables']['confusion'] == {
    'labels': ['card', 'cash'],
    'counts': [[1, 0, 0], [0, 0, 1]],
    'absent': [],
  }
  lines = (tmp_path / 'test.base.predictions.jsonl').read_text().splitlines()
  assert json.loads(lines[0])['logprob'] == -1.5


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    (['exact', 'exact'], "two are called 'exact'; add called='another name'"),
    ([{'name': 'macro_f1', 'label': 1}], 'did you mean .labels.'),
    ([{'name': 'regex'}], 'config.evaluate.metrics: missing pattern'),
    (['macro_f2'], "unknown function 'macro_f2'"),
  ],
)
def test_sections_that_are_refused(sections, message):
  with pytest.raises(ValueError, match=message):
    generative.find(sections)


def test_two_of_one_function_have_names():
  sections = [
    {'name': 'regex', 'pattern': 'a', 'called': 'a'},
    {'name': 'regex', 'pattern': 'b', 'called': 'b'},
  ]
  found = generative.find(sections)
  assert list(found) == ['a', 'b']
  assert found['b'].resolved == {
    'name': 'regex',
    'pattern': 'b',
    'match': 'first',
  }


def test_a_missing_library_is_found_at_once(monkeypatch):
  find_spec = generative.declare.importlib.util.find_spec
  monkeypatch.setattr(
    generative.declare.importlib.util,
    'find_spec',
    lambda name: None if name == 'sacrebleu' else find_spec(name),
  )
  with pytest.raises(
    ValueError, match=r"'chrf' needs 'sacrebleu'.*pip install"
  ):
    generative.find(['exact', 'chrf'])
