"""The command `evaluate`: what is measured, what is read, what is refused."""

import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import support

from tuner import adapt, commands, evaluate, interpolate, ledger, measure
from tuner.models import weights

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def trained(tiny_dir, tiny_rows, tmp_path_factory):
  """(config, workdir) of a run of two steps, both saved, test not read."""
  config = support.config(tiny_dir, tiny_rows)
  config.train.steps = 2
  config.checkpoint = dict(every=1)
  config.objective = dict(name='support.towards_one')
  config.evaluate = dict(
    metrics=('json_valid',), max_tokens=4, dev_answers=2, test='never'
  )
  config.retention = dict(share=0.0)
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert commands.train(config, workdir) == 0
  return config, workdir


@pytest.fixture
def config(trained):
  return ml_collections.ConfigDict(trained[0].to_dict())


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained[1], tmp_path / 'run')


@pytest.fixture
def counted(monkeypatch):
  """The suites that were really measured."""
  found, sums = [], measure.HeldOut._sums

  def call(held, tuned):
    found.append(len(held.rows))
    return sums(held, tuned)

  monkeypatch.setattr(measure.HeldOut, '_sums', call)
  return found


def run(config, workdir, **flags):
  return evaluate.run(config, workdir, evaluate.asked(**flags))


def read(workdir, name='evaluation'):
  return json.loads((workdir / f'eval/{name}.json').read_text())


def reads(workdir):
  path = workdir / ledger.READS
  text = path.read_text() if path.exists() else ''
  return [json.loads(line) for line in text.splitlines()]


def test_base_and_tuned_of_the_newest_step(config, workdir, counted, capsys):
  assert run(config, workdir) == 0
  names = {path.name for path in (workdir / 'eval').iterdir()}
  assert names == {
    'evaluation.json', 'test.base.json', 'test.base.predictions.jsonl',
    'test.2.json', 'test.2.predictions.jsonl', 'test.base.vs.test.2.json',
    'test_reads.jsonl', 'seconds.jsonl',
    'test.base.losses.jsonl', 'test.2.losses.jsonl',
  }  # fmt: skip
  record = read(workdir)
  n = read(workdir, '../run')['split']['test']['n']
  assert (record['step'], record['split'], record['n']) == (2, 'test', n)
  assert record['reads'] == 1 and record['metric'] == 'json_valid'
  for role, suite in (('base', 'test.base'), ('tuned', 'test.2')):
    assert record['systems'][role] == read(workdir, suite)['metrics']
  assert record['comparison'] == read(workdir, 'test.base.vs.test.2')
  assert record['comparison']['n'] == n and len(record['samples']) == 3
  both = [x['nats_per_token']['value'] for x in record['systems'].values()]
  own = record['comparison']['metrics']['nats_per_token']
  assert own['difference'] == pytest.approx(both[1] - both[0])
  assert own['low'] < own['difference'] < own['high']
  assert record['retention'] is None and record['alphas'] == []
  digest = read(workdir, '../run')['split']['test']['digest']
  assert [
    (x['command'], x['system'], x['step'], x['digest']) for x in reads(workdir)
  ] == [('evaluate', 'base', None, digest), ('evaluate', 'tuned', 2, digest)]
  assert (workdir / 'evaluation.html').read_text().startswith('<!doctype html>')
  out = capsys.readouterr().out
  assert 'json_valid' in out and 'the test split was read once' in out
  assert out.splitlines()[-2:] == [
    f'page:  {workdir}/evaluation.html', f'files: {workdir}/eval'
  ]  # fmt: skip
  # Again: nothing is measured, nothing is read, the same is said.
  assert counted == [n, n]
  assert run(config, workdir) == 0
  assert counted == [n, n] and len(reads(workdir)) == 2
  assert read(workdir) == record and capsys.readouterr().out == out
  # Another step of the same run is another read; its base is there.
  assert run(config, workdir, step=1) == 0
  assert counted == [n, n, n] and read(workdir)['reads'] == 2
  assert read(workdir)['step'] == 1
  # A dev split may be read as often as one likes.
  assert run(config, workdir, split='dev') == 0
  assert read(workdir)['reads'] is None and len(reads(workdir)) == 3
  assert read(workdir, 'dev.2')['metrics']['json_valid']['n'] == 2


def test_what_training_has_measured_is_read(config, workdir, counted):
  """Its end is a read, too; and its card says what was scored."""
  config.evaluate.test = 'end'
  assert commands.train(config, workdir) == 0
  assert [x['command'] for x in reads(workdir)] == ['train', 'train']
  record, measured = read(workdir), len(counted)
  assert measured == 2
  assert run(config, workdir) == 0
  assert len(counted) == measured and read(workdir) == record


def test_the_base_alone_needs_no_run(config, tmp_path, counted):
  assert run(config, tmp_path / 'new', step=0) == 0
  record = read(tmp_path / 'new')
  assert record['systems']['tuned'] is None and record['comparison'] is None
  assert record['systems']['base']['json_valid']['n'] == record['n']
  assert record['step'] == 0 and len(counted) == 1
  assert [x['system'] for x in reads(tmp_path / 'new')] == ['base']


def test_alphas_are_compared_on_dev(config, workdir, counted):
  """1 is the step itself, and not measured twice."""
  assert run(config, workdir, alphas='1,0.5') == 0
  record = read(workdir)
  assert record['split'] == 'dev' and reads(workdir) == []
  assert len(counted) == 3  # base, 1, 0.5
  own = [
    read(workdir, f'dev.{name}')['metrics']['json_valid']
    for name in ('2.alpha0.5', '2')
  ]
  assert record['alphas'] == [
    {'alpha': alpha, **{k: score[k] for k in ('value', 'low', 'high')},
     'nats_increase': None}
    for alpha, score in zip((0.5, 1.0), own, strict=True)
  ]  # fmt: skip
  nats = [
    read(workdir, f'dev.{name}')['metrics']['nats_per_token']['value']
    for name in ('base', '2.alpha0.5', '2')
  ]
  assert len(set(nats)) == 3


def test_another_test_split_is_refused_and_not_read(config, workdir, tmp_path):
  text = pathlib.Path(config.data.path).read_text()
  rows = tmp_path / 'rows.jsonl'
  lines = text.splitlines()
  rows.write_text('\n'.join(x.replace('\\"b\\"', '\\"c\\"') for x in lines))
  config.data.path = str(rows)
  with pytest.raises(ValueError) as caught:
    run(config, workdir)
  found = str(caught.value)
  assert found.startswith(
    f'the test split is not the one that {workdir}/run.json froze: 12 rows of '
    'digest '
  )
  assert found.endswith(
    'Scores on other rows do not compare; give the config and the data that '
    f'the run was trained with: {workdir}/config.json.'
  )
  assert reads(workdir) == []


REFUSED = {
  'an unknown split': (
    dict(split='tset'),
    "--split: 'tset' is no split to measure on; did you mean 'test'? There are "
    'test, dev.',
  ),
  'no split': (
    dict(split=''),
    "--split: '' is no split to measure on. There are test, dev.",
  ),
  'several alphas on test': (
    dict(split='test', alphas='0.5,1'),
    '--alphas: 0.5,1 on the test split would choose by it, and what is chosen '
    'by is no longer held out. Compare them with --split=dev, then measure the '
    'one you take on test.',
  ),
  'alphas of the base': (
    dict(step=0, alphas='0.5'),
    '--alphas: --step=0 is the base alone, which has nothing to scale; name a '
    'committed step.',
  ),
  'no name of a task': (
    dict(tasks='a,,b'),
    "--harness: 'a,,b'; wanted names of tasks, as hellaswag,arc_easy.",
  ),
  'a limit of no task': (
    dict(limit=3),
    '--harness_limit: 3 is for --harness=TASKS.',
  ),
  'a limit of 0': (
    dict(tasks='a', limit=0),
    '--harness_limit: 0; it must be at least 1.',
  ),
}
ALPHAS = {'2': '2', 'x': 'x', '': '', '0.5, ': '', '0': '0', 'nan': 'nan',
          '0.5,-1': '-1'}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_flags_are_refused_word_by_word(case):
  flags, wanted = REFUSED[case]
  with pytest.raises(ValueError) as caught:
    evaluate.asked(**flags)
  assert str(caught.value) == wanted


@pytest.mark.parametrize('given', ALPHAS)
def test_alphas_that_are_none_are_refused(given):
  with pytest.raises(ValueError) as caught:
    evaluate.asked(alphas=given)
  assert str(caught.value) == (
    f'--alphas: {ALPHAS[given]!r}; wanted numbers above 0, up to 1, as '
    '0.25,0.5,1: 0 is the base, 1 the model as it was trained.'
  )


def test_which_split_is_meant():
  assert evaluate.asked().side == 'test'
  assert evaluate.asked(alphas='0.5').side == 'dev'
  assert evaluate.asked(alphas='0.5', split='test').alphas == (0.5,)
  assert evaluate.asked(alphas='1,0.25,1').alphas == (0.25, 1.0)


def test_what_cannot_be_read_is_named(config, workdir, counted):
  def message():
    with pytest.raises(ValueError) as caught:
      run(config, workdir)
    return str(caught.value)

  folder = workdir / 'eval'
  folder.mkdir(exist_ok=True)
  (folder / 'test.2.json').write_text('{"suite"')
  assert message() == (
    f"{folder}/test.2.json cannot be read: Expecting ':' delimiter: line 1 "
    f'column 9 (char 8). Delete {folder}/test.2.json, and what it holds is '
    'measured anew.'
  )
  (folder / 'test.2.json').write_text('[]')
  assert message() == (
    f'{folder}/test.2.json cannot be read: list, not an object. Delete '
    f'{folder}/test.2.json, and what it holds is measured anew.'
  )
  (folder / 'test.2.json').unlink()
  run(config, workdir)
  (folder / 'test.2.predictions.jsonl').unlink()
  assert message().endswith(
    f'Delete {folder}/test.2.json, and what it holds is measured anew.'
  )
  (workdir / 'eval/checkpoints.jsonl').write_text('{"step": 2}\n{"st\n')
  (folder / 'test.2.json').unlink()
  assert message().startswith(
    f'{folder}/checkpoints.jsonl cannot be read: JSONDecodeError'
  )
  (workdir / 'run.json').unlink()
  assert message() == (
    f'{workdir}/run.json is not there: nothing says which rows this run held '
    'out. Run the training once more, which writes it.'
  )


def test_a_workdir_that_lacks_what_is_asked(config, workdir, tmp_path):
  def message(*args, **flags):
    with pytest.raises(ValueError) as caught:
      run(*args, **flags)
    return str(caught.value)

  (tmp_path / 'empty').mkdir()
  assert message(config, tmp_path / 'empty') == (
    f'--workdir: {tmp_path}/empty holds no run: there is no commits/ in it. '
    'Train first, or measure the base alone: --step=0.'
  )
  assert message(config, tmp_path / 'gone') == (
    f"--workdir: '{tmp_path}/gone' is not there: no 'gone' in '{tmp_path}'. "
    'Train first, or measure the base alone: --step=0.'
  )
  assert message(config, workdir, step=7) == (
    f'--step: 7 is not committed in {workdir}; there are 1, 2.'
  )
  config.data.dev = 0.0
  assert message(config, workdir, split='dev') == (
    '--split=dev: no dev rows are held out: config.data.dev is 0.0.'
  )
  assert message(config, workdir, alphas='0.5') == (
    '--split=dev: no dev rows are held out: config.data.dev is 0.0. A single '
    'alpha may be measured on test: --split=test.'
  )
  config.data.dev, config.adapt.rank = 0.1, 2
  assert 'adapt.rank' in message(config, workdir)
  assert reads(workdir) == []


class Suite:
  """Stands for lm-eval: what was run, and numbers."""

  def __init__(self, monkeypatch):
    self.ran = []
    monkeypatch.setattr(evaluate.harness, 'check', self.check)
    monkeypatch.setattr(evaluate.harness, 'run', self.run)

  def check(self, names, path=None):
    if 'helaswag' in names:
      raise ValueError("lm-eval has no task 'helaswag'")

  def run(self, runner, tokenizer, stop_ids, tasks, path, limit, folder, suite):
    self.ran.append((suite, tasks, limit))
    results = {'t': {'acc': {'value': 0.5, 'stderr': 0.1, 'n': limit or 9}}}
    written = {'suite': suite, 'tasks': results}
    (folder / f'{suite}.json').write_text(json.dumps(written))
    return results


def test_tasks_of_lm_eval_beside_the_rest(config, workdir, monkeypatch):
  suite = Suite(monkeypatch)
  flags = dict(split='dev', tasks='t, u')
  assert run(config, workdir, **flags) == 0
  wanted = [('harness.base', ('t', 'u'), None), ('harness.2', ('t', 'u'), None)]
  assert suite.ran == wanted
  found = read(workdir)['harness']
  assert found.keys() == {'base', 'tuned'}
  assert found['tuned']['t']['acc'] == {'value': 0.5, 'stderr': 0.1, 'n': 9}
  assert run(config, workdir, **flags) == 0  # they are there
  assert suite.ran == wanted and read(workdir)['harness'] == found
  run(config, workdir, **flags, limit=3)  # fewer examples are others
  assert len(suite.ran) == 4
  run(config, workdir, **flags, limit=3, path=str(workdir))  # may change
  run(config, workdir, **flags, limit=3, path=str(workdir))
  assert len(suite.ran) == 8
  with pytest.raises(ValueError, match='--harness: lm-eval has no task'):
    evaluate.asked(tasks='helaswag')


# Weights between base and tuned.


@pytest.mark.parametrize('name', ['full', 'lora', 'dora'])
def test_alpha_goes_from_the_base_to_the_tuned_model(name, tiny_dir):
  """At 0 and 1 they are these; of full and LoRA it is a straight line."""
  model, base = support.load_model(tiny_dir)
  rows, sizes = weights.rows(model), model.config.sizes
  saved = {} if name == 'full' else {'modules_to_save': ('norm',)}
  adaptation = getattr(adapt, name)(rows, **saved)
  rng = np.random.default_rng(0)
  trainable = {
    path: rng.standard_normal(shape, np.float32)
    for path, shape in adaptation.shapes(sizes).items()
  }
  frozen = base if adaptation.is_adapter else {}

  def merged(tree):
    attached = adaptation.attach(frozen, tree)
    return {p: np.asarray(adapt.merge(rows, attached, p)) for p in rows}

  made = {
    alpha: merged(
      interpolate.between(adaptation, base, jax.tree.map(np.asarray, trainable),
                          alpha)
    )
    for alpha in (0.0, 0.25, 1.0)
  }  # fmt: skip
  tuned = merged(trainable)
  for path, wanted in base.items():
    wanted = np.asarray(wanted)
    np.testing.assert_array_equal(made[1.0][path], tuned[path])
    np.testing.assert_allclose(made[0.0][path], wanted, rtol=1e-5, atol=1e-6)
    if name != 'dora':
      line = wanted + 0.25 * (tuned[path] - wanted)
      np.testing.assert_allclose(made[0.25][path], line, rtol=1e-4, atol=1e-4)
  assert any((tuned[p] != np.asarray(base[p])).any() for p in rows)
