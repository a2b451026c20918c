"""The checkpoint that is taken: best on dev within the bound, and no memory."""

import json
import os
import signal
import time
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tuner import commands, commits, export, measure, sections, select, suites

pytestmark = pytest.mark.usefixtures('quick_compiles')


def line(step, value, increase=None, metric='exact'):
  """A measurement; increase: of nats a token on general text."""
  low, high = float(value) - 1, float(value) + 1
  score = {'value': value, 'low': low, 'high': high, 'n': 9}
  retention = None
  if increase is not None:
    retention = {'nats_increase': {**score, 'value': increase}}
  return {'step': step, 'metrics': {metric: score}, 'retention': retention}


def own(metric='exact', bound=None, patience=None):
  return sections.Select(metric, bound, patience)


LINES = [
  line(0, 0.9, 0.0),
  line(2, 0.2, 0.01),
  line(4, 0.5, 0.05),
  line(6, 0.5, 0.04),
  line(8, 0.8, 0.06),
]


@pytest.mark.parametrize(
  ('bound', 'wanted'),
  [(None, 8), (0.06, 8), (0.05, 4), (0.04, 6), (0.03, 2), (0.009, None)],
)
def test_the_best_that_is_allowed_the_earlier_of_equal_ones(bound, wanted):
  """The base is better than all of them, and no checkpoint."""
  assert select.chosen(LINES, own(bound=bound)) == wanted


def test_a_smaller_loss_is_better():
  lines = [line(i, value, None, 'nats_per_token') for i, value in
           [(0, 9.0), (2, 3.0), (4, 2.0), (6, 2.0), (8, 4.0)]]  # fmt: skip
  assert select.chosen(lines, own('nats_per_token')) == 4


def test_what_is_no_number_is_never_the_best():
  lines = [line(2, 'nan', 0.0), line(4, 0.1, 0.0), line(6, 0.9, 'nan')]
  assert select.chosen(lines, own(bound=0.1)) == 4


def test_nothing_is_chosen_where_nothing_is_named():
  assert select.chosen(LINES, sections.Select()) is None
  assert select.chosen(LINES[:1], own()) is None


def test_the_running_choice_is_the_choice():
  """What is kept of a prefix is all that the whole can need."""
  for bound in (None, 0.06, 0.05, 0.04, 0.03, 0.009, 0.0):
    kept = None
    for end in range(1, len(LINES) + 1):
      held = [x for x in LINES[: end - 1] if x['step'] in (0, kept)]
      kept = select.nearest([*held, LINES[end - 1]], own(bound=bound))
      assert kept == select.nearest(LINES[:end], own(bound=bound))


@pytest.mark.parametrize(
  ('bound', 'patience', 'over'),
  [
    (None, 1, [6]),
    (None, 2, []),
    (0.05, 1, [6, 8]),
    (0.05, 2, [8]),
    (0.04, 1, [4, 8]),
    (0.009, 2, [6, 8]),
    (None, None, []),
  ],
)
def test_patience_counts_measurements_since_the_best(bound, patience, over):
  """Where none is allowed, one that forgets less is a better one."""
  steps = [x['step'] for x in LINES]
  found = [
    steps[end - 1]
    for end in range(1, len(LINES) + 1)
    if select.is_over(LINES[:end], own('exact', bound, patience))
  ]
  assert found == over


def test_the_curve():
  curve = select.curve(LINES, own(bound=0.05), 'other', 4)
  assert [p['step'] for p in curve] == [0, 2, 4, 6, 8]
  assert [p['chosen'] for p in curve] == [False, False, True, False, False]
  assert [p['allowed'] for p in curve] == [False, True, True, True, False]
  assert curve[2] == {
    'step': 4, 'metric': 'exact', 'value': 0.5, 'low': -0.5, 'high': 1.5,
    'nats_increase': 0.05, 'chosen': True, 'allowed': True,
  }  # fmt: skip
  assert select.curve(LINES, sections.Select(), 'exact', 8)[-1]['chosen']


def test_why_a_step_is_taken_and_why_none_is():
  assert select.reason(LINES, own(bound=0.05)) == (
    'step 4 is chosen: exact 0.5 on the dev split, nats on general text +0.05. '
    'The base is no worse: 0.9; training has won nothing'
  )
  assert select.reason(LINES[1:], own()) == (
    'step 8 is chosen: exact 0.8 on the dev split, nats on general text +0.06'
  )
  assert select.refusal(LINES, own(bound=0.005)) == (
    'config.select.max_nats_increase: 0.005; no checkpoint keeps within it. '
    'The nearest is step 2, whose nats a token on general text rose by 0.01 '
    '(exact 0.2). Nothing is exported; the checkpoint is kept. Train with a '
    'lower config.schedule.peak or with replay, raise the bound, or take it as '
    'it is: export --step=2.'
  )


def test_lines_are_read_as_they_were_written(tmp_path):
  select.write(tmp_path, LINES)
  assert select.read(tmp_path) == LINES
  assert select.until(select.read(tmp_path), 4) == LINES[:3]
  assert select.read(tmp_path / 'none') == []


def test_a_metric_that_was_not_measured_is_told(tmp_path):
  select.write(tmp_path, LINES)
  with pytest.raises(ValueError) as caught:
    select.choice(tmp_path, own('exat'))
  assert str(caught.value) == (
    "config.select.metric: 'exat' was not measured at step 2; "
    'eval/checkpoints.jsonl has exact.'
  )
  with pytest.raises(ValueError) as caught:
    select.choice(tmp_path / 'none', own())
  assert str(caught.value) == (
    f"config.select.metric: 'exact', but {tmp_path}/none/eval/checkpoints.jsonl"
    ' has no measurement to choose by; name a step: --step=N.'
  )


# Refused before anything is read.


GOOD = dict(evaluate=dict(every=2, metrics=('exact', 'json_equal')))
REFUSED = {
  'a metric that is not there': (
    dict(metric='json_eqal'),
    {},
    "config.select.metric: 'json_eqal' is not measured; did you mean "
    "'json_equal'? There are exact, json_equal, stopped, nats_per_token "
    '(config.evaluate.metrics).',
  ),
  'nothing is generated': (
    dict(metric='exact'),
    dict(evaluate=dict(every=2, metrics=())),
    "config.select.metric: 'exact' is not measured. There are nats_per_token "
    '(config.evaluate.metrics).',
  ),
  'nothing is measured': (
    dict(metric='exact'),
    dict(evaluate=dict(metrics=('exact',))),
    "config.select.metric: 'exact' is compared over the steps on the dev "
    'split; set config.evaluate.every and config.data.dev.',
  ),
  'no dev': (
    dict(metric='exact'),
    dict(data=dict(dev=0.0)),
    'config.evaluate.every: 2, but config.data.dev is 0: hold out a dev split, '
    'such as 0.05. The test split is for the end.',
  ),
  'no answers': (
    dict(metric='exact'),
    dict(evaluate=dict(every=2, metrics=('exact',), dev_answers=0)),
    "config.select.metric: 'exact' is of answers, and "
    'config.evaluate.dev_answers is 0; make it 32 or more.',
  ),
  'patience 0': (
    dict(metric='exact', patience=0),
    {},
    'config.select.patience: 0; it must be at least 1, or None.',
  ),
  'patience for nothing': (
    dict(patience=3),
    {},
    'config.select.patience: 3, but config.select.metric names nothing to '
    "choose by, such as 'exact'.",
  ),
  'a bound of nothing': (
    dict(max_nats_increase=0.05),
    {},
    'config.select.max_nats_increase: 0.05, but config.select.metric names '
    "nothing to choose by, such as 'exact'.",
  ),
  'a bound below 0': (
    dict(metric='exact', max_nats_increase=-0.1),
    {},
    'config.select.max_nats_increase: -0.1; it must be at least 0, or None.',
  ),
  'a bound of what is not measured': (
    dict(metric='exact', max_nats_increase=0.05),
    dict(retention=dict(share=0.0)),
    'config.select.max_nats_increase: 0.05, but config.retention.share is 0, '
    'so that no general text is measured; make it 0.1, or leave the bound out.',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_word_by_word(case, tiny_config):
  chosen, changes, wanted = REFUSED[case]
  for section, values in {**GOOD, **changes, 'select': chosen}.items():
    before = tiny_config.to_dict().get(section, {})
    tiny_config[section] = {**before, **values}
  with pytest.raises(ValueError) as caught:
    sections.read(tiny_config)
  assert str(caught.value) == wanted


# Whole runs; what is measured is written down here, by step.


LOSSES = {0: 9.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2, 9: 2.0}


@pytest.fixture
def config(tiny_config):
  """A run of 9 steps, measured at 2, 4, 6, 8 and the last; 4 is best of 8."""
  tiny_config.train.steps = 9
  tiny_config.objective = dict(name='support.towards_one')
  tiny_config.evaluate = dict(
    metrics=('json_valid',), max_tokens=4, every=2, test='never'
  )
  tiny_config.retention = dict(share=0.0)
  tiny_config.select = dict(metric='nats_per_token', patience=2)
  tiny_config.checkpoint = dict(keep_last=1)
  return tiny_config


class Measured:
  """Stands for measuring: numbers by step, and what was asked for."""

  def __init__(self, monkeypatch, losses=None):
    self.losses, self.asked = losses or LOSSES, []
    self.signal_at = None
    monkeypatch.setattr(measure.HeldOut, 'measure', self._measure())

  def _measure(self):
    def call(held, folder, suite, tuned, system, around):
      del tuned
      name = suite.partition('.')[2]
      step = 0 if name == 'base' else int(name)
      with around():
        self.asked.append(suite)
        value = self.losses[step]
        score = {'value': value, 'low': value - 1, 'high': value + 1, 'n': 6}
        found = {'suite': suite, 'key': held.key(system)}
        found['metrics'] = {'nats_per_token': score}
        folder.mkdir(exist_ok=True)
        (folder / f'{suite}.json').write_text(json.dumps(found))
        (folder / f'{suite}.predictions.jsonl').write_text('')
        if step and step == self.signal_at:
          interrupt()
      return found

    return call


def interrupt():
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(0.3)  # a thread takes note of it


def committed(workdir):
  return sorted(int(p.stem) for p in (workdir / 'commits').glob('*.json'))


def arrays(workdir, step):
  assert commits.fault(workdir, step) == ''
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
    tree = reader.restore(workdir / 'checkpoints' / str(step))
  return {path: np.asarray(x) for path, x in tree.items()}


def logged(workdir):
  """metrics.jsonl without what a clock has measured."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if 'second' not in k}
    for line in lines
  ]


@pytest.fixture
def handed_over(monkeypatch):
  """What commands.train gives to be exported."""
  found = []
  monkeypatch.setattr(
    commands.deliver, 'write', lambda trained, *_, **__: found.append(trained)
  )
  return found


def test_the_best_is_kept_restored_and_handed_over(
  config, tmp_path, monkeypatch, handed_over, capsys
):
  """Training ends at 8: two measurements no better than at 4."""
  Measured(monkeypatch)
  assert commands.train(config, tmp_path) == 0
  assert committed(tmp_path) == [4, 8]
  assert [x['step'] for x in select.read(tmp_path)] == [0, 2, 4, 6, 8]
  (trained,) = handed_over
  assert trained.record['step'] == 4
  for path, array in trained.trainable.items():
    wanted = arrays(tmp_path, 4)[f'trainable.{path}']
    np.testing.assert_array_equal(np.asarray(array), wanted, err_msg=path)
  err = capsys.readouterr().err
  assert (
    'step 8: 2 measurements without a better nats_per_token than at step 4; '
    'training ends\n'
  ) in err
  assert 'step 4 is chosen: nats_per_token 3 on the dev split\n' in err
  assert 'evaluation took ' in err and ' % of training\n' in err
  choice = sections.read(config).select
  assert export.choose_step(tmp_path, None, choice) == 4
  assert export.choose_step(tmp_path, 8, choice) == 8
  assert export.choose_step(tmp_path, None, sections.Select()) == 8


@pytest.mark.parametrize('at', ['before 4', 'at 4', 'before 8'])
def test_a_run_that_was_stopped_chooses_as_one_that_was_not(
  config, tmp_path, monkeypatch, handed_over, at
):
  """Stopped before its step is measured, or while: the same lines and choice.

  The resumed run takes no measurement again that it has.
  """
  when, step = at.split()
  straight, cut = tmp_path / 'straight', tmp_path / 'cut'
  with monkeypatch.context() as patch:
    whole = Measured(patch)
    assert commands.train(config, straight) == 0
  measured = Measured(monkeypatch)
  if when == 'at':
    measured.signal_at = int(step)
  else:
    put = commands.experiment_lib.Experiment.put
    seen = []

    def put_once(experiment, batch):
      seen.append(batch)
      # Once more for the compiled shape: batches come from step 0 on.
      if len(seen) == int(step):
        interrupt()
      return put(experiment, batch)

    monkeypatch.setattr(commands.experiment_lib.Experiment, 'put', put_once)
  assert commands.train(config, cut) == 75
  assert max(committed(cut)) == int(step)
  measured.signal_at = None
  assert commands.train(config, cut) == 0
  assert measured.asked == whole.asked
  for name in ('eval/checkpoints.jsonl', 'eval/dev.4.json'):
    assert (cut / name).read_text() == (straight / name).read_text()
  assert logged(cut) == logged(straight)
  assert committed(cut) == committed(straight) == [4, 8]
  one, other = handed_over
  assert one.record['step'] == other.record['step'] == 4
  for path, array in one.trainable.items():
    np.testing.assert_array_equal(np.asarray(array), other.trainable[path])


def test_without_patience_the_last_step_is_measured_too(
  config, tmp_path, monkeypatch, handed_over
):
  config.select.patience = None
  measured = Measured(monkeypatch)
  assert commands.train(config, tmp_path) == 0
  assert measured.asked == [f'dev.{s}' for s in ('base', 2, 4, 6, 8, 9)]
  assert committed(tmp_path) == [9]
  assert handed_over[0].record['step'] == 9
  before = sorted(tmp_path.rglob('*'))
  assert commands.train(config, tmp_path) == 0  # finished: chosen once more
  assert handed_over[1].record['step'] == 9
  assert sorted(tmp_path.rglob('*')) == before


class Forgetting:
  """Stands for tuner.evals.retention: forgets more with each measurement."""

  def __init__(self, *_):
    self.plan = types.SimpleNamespace(texts=['x'], quiz=[], prompts=[])
    self.key, self.lines, self.times = 'k', [], 0

  def measure(self, tuned, base):
    value = 0.0 if tuned is base else 0.125 * self.times
    self.times += 1
    score = {'value': value, 'low': 0.0, 'high': float('nan'), 'n': 1}
    return {'nats_increase': score}


@pytest.fixture
def forgetting(config, monkeypatch):
  monkeypatch.setattr(suites.retention_lib, 'Retention', Forgetting)
  config.retention = dict(share=0.1)
  config.select.patience = None
  return config


def test_a_bound_is_kept_to(forgetting, tmp_path, monkeypatch, handed_over):
  """0.125 at step 2, 0.25 at step 4, ..."""
  Measured(monkeypatch)
  forgetting.select.max_nats_increase = 0.125
  assert commands.train(forgetting, tmp_path) == 0
  assert handed_over[0].record['step'] == 2
  assert committed(tmp_path) == [2, 9]
  forgetting.select.max_nats_increase = 0.3  # another bound, afterwards
  choice = sections.read(forgetting).select
  with pytest.raises(ValueError) as caught:
    export.choose_step(tmp_path, None, choice)
  assert str(caught.value) == (
    f'config.select chooses step 4, which was not kept in {tmp_path}; there '
    'are 2, 9: name one, as --step=9.'
  )


def test_a_bound_that_none_keeps_to_ships_nothing(
  forgetting, tmp_path, monkeypatch, handed_over
):
  measured = Measured(monkeypatch)
  forgetting.select.max_nats_increase = 0.1
  forgetting.evaluate.test = 'end'
  with pytest.raises(RuntimeError) as caught:
    commands.train(forgetting, tmp_path)
  assert str(caught.value).startswith(
    'config.select.max_nats_increase: 0.1; no checkpoint keeps within it. The '
    'nearest is step 2, whose nats a token on general text rose by 0.125 '
    '(nats_per_token 4).'
  )
  assert handed_over == [] and committed(tmp_path) == [2, 9]
  assert not any(suite == 'test.2' for suite in measured.asked)
