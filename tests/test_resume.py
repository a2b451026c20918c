"""5 + 5 steps equal 10, bit for bit; another run is refused by name.

The runs cross an epoch's end (21 rows of packed examples, 4 a step), several
examples a row, in two micro-batches.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import support

from tuner import checkpoint, commands, commits
from tuner import experiment as experiment_lib
from tuner import train as train_lib
from tuner.data import sources
from tuner.models import hub

pytestmark = pytest.mark.usefixtures('quick_compiles')
ROOT = pathlib.Path(__file__).parent.parent
STEPS = 10


@pytest.fixture
def config(tiny_config):
  tiny_config.train.steps = STEPS
  tiny_config.batch = dict(rows=4, tokens=96, accumulate=2)
  # An eps this large keeps Adam from turning rounding into whole steps.
  tiny_config.optimizer = dict(name='adamw', eps=1e-3)
  tiny_config.schedule = dict(name='cosine', peak=1e-2, warmup_steps=2)
  tiny_config.evaluate = dict(test='never')
  tiny_config.export = dict(formats=())
  tiny_config.checkpoint = dict(every=5)
  return tiny_config


def arrays(workdir, step):
  """{path: array} of a committed step, read without the program."""
  assert commits.fault(workdir, step) == ''
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
    tree = reader.restore(workdir / 'checkpoints' / str(step))
  return {path: np.asarray(x) for path, x in tree.items()}


def assert_same_arrays(one, other):
  assert one.keys() == other.keys() and len(one) > 3
  for path in one:
    np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def logged(workdir):
  """The training lines of metrics.jsonl, without what a clock has measured."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if 'second' not in k}
    for line in lines
  ]


def snapshot(folder):
  """{name: bytes} of all files below."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


class Watch:
  """Which steps were trained, on what; can send a signal at one of them."""

  def __init__(self, monkeypatch):
    self.steps, self.rows, self.ids = [], collections.Counter(), []
    self.signal_at = None, None
    loop, made = train_lib.loop, sources.Packed.__call__

    def watched(state, step_once, *rest):
      def once(state, step):
        self.steps.append(step)
        return step_once(state, step)

      return loop(state, once, *rest)

    def source(packed, step, params=None):
      batch = made(packed, step, params)
      if step in self.steps[-1:]:  # not while compiling
        rows = batch['tokens'].reshape(4, -1)
        self.rows.update(row.tobytes() for row in rows)
        self.ids += packed.ids(step)
        if step == self.signal_at[0]:
          os.kill(os.getpid(), self.signal_at[1])
          time.sleep(0.3)  # a thread takes note of it
      return batch

    monkeypatch.setattr(train_lib, 'loop', watched)
    monkeypatch.setattr(sources.Packed, '__call__', source)


@pytest.mark.parametrize(
  ('adapt', 'number'), [('lora', signal.SIGTERM), ('full', signal.SIGINT)]
)
def test_five_and_five_steps_equal_ten(
  config, tmp_path, monkeypatch, adapt, number
):
  config.adapt = dict(name='full')
  if adapt == 'lora':
    config.adapt = dict(name='lora', rank=4, dropout=0.1)
  straight, cut = tmp_path / 'straight', tmp_path / 'cut'
  with monkeypatch.context() as patch:
    wanted = Watch(patch)
    assert commands.train(config, straight) == 0
  assert wanted.steps == list(range(STEPS))

  seen = Watch(monkeypatch)
  seen.signal_at = 4, number
  assert commands.train(config, cut) == 75
  assert seen.steps == [0, 1, 2, 3, 4]
  assert [p.name for p in (cut / 'commits').glob('*.json')] == ['5.json']
  assert commands.train(config, cut) == 0
  assert seen.steps == list(range(STEPS))

  assert seen.rows == wanted.rows and seen.ids == wanted.ids
  assert max(seen.rows.values()) == 2  # rows came again in the next epoch
  assert_same_arrays(arrays(cut, STEPS), arrays(straight, STEPS))
  assert logged(cut) == logged(straight)
  assert [line['step'] for line in logged(cut)] == list(range(1, STEPS + 1))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture
def half(config, runs, monkeypatch):
  """The directory of a run that was stopped after five steps; only read."""
  workdir = runs / 'half'
  if not workdir.exists():
    with monkeypatch.context() as patch:
      Watch(patch).signal_at = 4, signal.SIGTERM
      assert commands.train(config, workdir) == 75
  return workdir


@pytest.fixture
def straight(config, runs):
  """The directory of the same run, not stopped; only read."""
  workdir = runs / 'straight'
  if not workdir.exists():
    assert commands.train(config, workdir) == 0
  return workdir


def timeless(printed):
  """Without the seconds that writing and verifying took."""
  return re.sub(r' *\d+\.\d s', '', printed)


def test_a_finished_run_run_again_changes_nothing(config, tmp_path, capsys):
  config.train.steps = 3
  config.evaluate = dict(
    metrics=('json_valid',), max_tokens=4, every=2, dev_answers=2
  )
  config.export = dict(formats=('adapter', 'model'))
  assert commands.train(config, tmp_path) == 0
  printed, before = capsys.readouterr().out, snapshot(tmp_path)
  assert {'config.json', 'run.json', 'metrics.jsonl'} <= before.keys()
  assert commands.train(config, tmp_path) == 0
  after = snapshot(tmp_path)
  assert after.keys() == before.keys()
  assert [k for k in after if after[k] != before[k]] == []
  assert timeless(capsys.readouterr().out) == timeless(printed)


def test_run_json_and_config_json(config, half):
  resolved = json.loads((half / 'config.json').read_text())
  assert resolved['adapt'] == {
    'name': 'lora', 'rank': 4, 'alpha': 8.0, 'targets': 'all-linear',
    'dropout': 0.0, 'scaling': 'lora', 'lr_ratio': 1.0, 'modules_to_save': [],
  }  # fmt: skip
  assert resolved['schedule'] == {
    'name': 'cosine', 'peak': 0.01, 'warmup_steps': 2, 'end': 0.0,
  }  # fmt: skip
  assert resolved['optimizer']['b2'] == 0.999
  assert resolved['checkpoint'] == {'every': 5, 'keep_last': 2, 'keep_best': 0}
  run = json.loads((half / 'run.json').read_text())
  experiment = experiment_lib.prepare(config)
  assert run['facts'] == json.loads(json.dumps(experiment.facts))
  for name in ('dev', 'test'):
    rows = getattr(experiment.split, name)
    assert run['split'][name]['n'] == len(rows) > 0
    assert run['split'][name]['rows'] == [row.where for row in rows]
  # What is resolved is a config that means the same.
  again = experiment_lib.prepare(resolved)
  assert again.facts == experiment.facts
  assert again.resolved == experiment.resolved


def other_rows(config, tmp_path):
  """The same rows but for one answer."""
  text = pathlib.Path(config.data.path).read_text()
  other = text.replace(r'\"b\": ', r'\"c\": ', 1)
  assert other != text
  path = tmp_path / 'other.jsonl'
  path.write_text(other)
  config.data.path = str(path)


CHANGES = {
  'seed': ('seed', 1, 'seed'),
  'rows': ('batch.rows', 8, 'batch.rows'),
  'tokens': ('batch.tokens', 128, 'batch.tokens'),
  'system': ('data.system', 'hi', 'data'),
  'test': ('data.test', 0.3, 'test'),
  'rank': ('adapt.rank', 8, 'adapt.rank'),
  'alpha': ('adapt.alpha', 16.0, 'adapt.alpha'),
  'dropout': ('adapt.dropout', 0.1, 'adapt.dropout'),
  'targets': ('adapt.targets', 'q', 'adapt.targets'),
  'b2': ('optimizer.b2', 0.99, 'optimizer.b2'),
  'peak': ('schedule.peak', 2e-2, 'schedule.peak'),
  'steps': ('train.steps', 20, 'steps'),
  'dtype': ('model.dtype', 'bfloat16', 'model.dtype'),
  'clip_norm': ('train.clip_norm', 0.5, 'clip_norm'),
  'content': (other_rows, None, 'data'),
}


def change_one(config, tmp_path, name):
  where, value, fact = CHANGES[name]
  if callable(where):
    where(config, tmp_path)
  else:
    section, _, key = where.rpartition('.')
    (config[section] if section else config)[key] = value
  return fact


@pytest.mark.parametrize('name', CHANGES)
def test_a_changed_config_is_refused_by_name(config, half, tmp_path, name):
  before = snapshot(half)
  fact = change_one(config, tmp_path, name)
  with pytest.raises(ValueError) as caught:
    commands.train(config, half)
  first, *table, last = str(caught.value).splitlines()
  assert first == 'this run is not the one that the checkpoint is of:'
  assert last == (
    '--allow_change=key lets one through; or choose another workdir'
  )
  named = {line.split('|')[0].strip() for line in table}
  # Packed data, and the split, are others where what they are made of is; with
  # dropout the micro-batches matter.
  also = {'batch.accumulate'} if name == 'dropout' else {'data', 'test'}
  assert {'key', fact} <= named <= {'key', fact} | also
  assert snapshot(half) == before


def test_another_base_is_refused_by_both_names(
  config, half, tiny_dir, tmp_path
):
  """Path, revision and hash of each; the same bytes elsewhere are the same."""
  other, again = tmp_path / 'other', tmp_path / 'again'
  shutil.copytree(tiny_dir, again)
  other.mkdir()
  support.write_model(other, seed=1)
  workdir = shutil.copytree(half, tmp_path / 'run')
  config.model.path = str(other)
  with pytest.raises(ValueError) as caught:
    commands.train(config, workdir)
  first, then, now, last = str(caught.value).splitlines()
  assert first == f'{workdir}: another base.'
  assert then.endswith(
    f'{tiny_dir} at revision None, weights sha256 {hub.weights_hash(tiny_dir)}'
  )
  assert now.endswith(
    f'{other} at revision None, weights sha256 {hub.weights_hash(other)}'
  )
  config.model.path = str(again)
  assert commands.train(config, workdir) == 0


def test_allow_change_lets_one_through(config, half, tmp_path):
  workdir = shutil.copytree(half, tmp_path / 'run')
  config.schedule.peak = 2e-2
  with pytest.raises(ValueError, match='schedule.peak'):
    commands.train(config, workdir, ['optimizer'])
  assert commands.train(config, workdir, ['schedule.peak']) == 0
  rates = [line['learning_rate'] for line in logged(workdir)]
  rate = experiment_lib.prepare(config).optimizer.learning_rate
  wanted = [float(rate(i)) for i in range(STEPS)]
  assert rates == pytest.approx([x / 2 for x in wanted[:5]] + wanted[5:])


@pytest.mark.parametrize(
  ('section', 'values'),
  [
    ('batch', dict(rows=4, tokens=96, accumulate=4)),
    ('mesh', dict(data=1, fsdp=2, devices=2)),
  ],
)
def test_accumulation_and_mesh_may_change(
  config, half, straight, tmp_path, section, values
):
  workdir = shutil.copytree(half, tmp_path / 'run')
  config[section] = values
  assert commands.train(config, workdir) == 0
  for a, b in zip(logged(workdir), logged(straight), strict=True):
    assert a['step'] == b['step'] and a['tokens'] == b['tokens']
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)


# A real process, a real signal.


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(config, tmp_path):
  """SIGTERM at a step that nobody chose: exit 75, run again, every bit."""
  config.train.steps = 120
  config.checkpoint = dict(every=50)
  file, workdir = tmp_path / 'config.py', tmp_path / 'cut'
  file.write_text(
    'import ml_collections\n\n\ndef get_config():\n'
    f'  return ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  command = [
    sys.executable, '-m', 'tuner.main', f'--config={file}',
    f'--workdir={workdir}',
  ]  # fmt: skip
  environment = {**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  child = subprocess.Popen(
    command, cwd=ROOT, env=environment, text=True,
    stderr=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  metrics = workdir / 'metrics.jsonl'
  for _ in range(60_000):
    if child.poll() is not None:
      break
    if metrics.exists() and metrics.read_bytes().count(b'\n') >= 5:
      child.send_signal(signal.SIGTERM)
      break
    time.sleep(0.002)
  _, err = child.communicate(timeout=60)
  assert child.returncode == 75, err
  at = max(int(p.stem) for p in (workdir / 'commits').glob('*.json'))
  assert 5 <= at < 120 and f'stopped at step {at}, saved' in err
  subprocess.run(
    command, cwd=ROOT, env=environment, check=True, capture_output=True
  )

  straight = tmp_path / 'straight'
  assert commands.train(config, straight) == 0
  assert_same_arrays(arrays(workdir, 120), arrays(straight, 120))
  assert logged(workdir) == logged(straight)
  record = checkpoint.Checkpoints(workdir, {}).record(120)
  facts = experiment_lib.prepare(config).facts
  assert record['facts'] == json.loads(json.dumps(facts))
