"""Bad configs are refused word by word, before anything heavy is loaded."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys

import ml_collections
import pytest

from tuner import commands, sections
from tuner.models import hub

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def refused(tiny_config, tmp_path, monkeypatch):
  """refused(change) -> the message of the config after change(config)."""

  def load(*_, **__):
    raise AssertionError('weights were loaded')

  monkeypatch.setattr(hub, 'load', load)

  def message(change):
    # Places of this test are no part of a message.
    places = {tiny_config.data.path: 'ROWS', tiny_config.model.path: 'MODEL'}
    change(tiny_config)
    with pytest.raises((ValueError, RuntimeError)) as caught:
      commands.train(tiny_config, tmp_path / 'run')
    text = str(caught.value)
    for place, name in places.items():
      text = text.replace(place, name)
    return text.replace(str(tmp_path), 'TMP')

  return message


def put(**changes):
  """A change that sets keys given as section__key, or whole sections."""

  def change(config):
    for name, value in changes.items():
      section, _, key = name.partition('__')
      if not key:
        config[section] = value
      elif section in config:
        config[section][key] = value
      else:
        config[section] = {key: value}

  return change


def drop(section, key=None):
  def change(config):
    if key is None:
      del config[section]
    else:
      del config[section][key]

  return change


GET_CONFIG = (
  'get_config(model, data, batch, train, adapt, optimizer, schedule, '
  'objective, seed, evaluate, retention, select, checkpoint, export, mesh, log)'
)
BATCH = (
  'Batch(rows: int, tokens: int, accumulate: int = 1, '
  "layout: Literal['packed', 'bucketed'] = 'packed')"
)
NAN, INF = float('nan'), float('inf')

REFUSED = {
  'unknown section': (
    put(optimiser={}),
    "config: unknown key 'optimiser'; did you mean 'optimizer'? " + GET_CONFIG,
  ),
  'missing section': (drop('data'), f'config: missing data. {GET_CONFIG}'),
  'section is no dict': (
    lambda c: (drop('batch')(c), put(batch=8)(c)),
    "config.batch: 8, wanted dict(name='...', ...)",
  ),
  'unknown key': (
    put(batch__row=4),
    f"config.batch: unknown key 'row'; did you mean 'rows'? {BATCH}",
  ),
  'missing key': (
    drop('batch', 'tokens'),
    f'config.batch: missing tokens. {BATCH}',
  ),
  'text for a number': (
    put(batch=dict(rows='4', tokens=96)),
    f"config.batch.rows: '4' (str), wanted int. {BATCH}",
  ),
  'fraction for a number': (
    put(batch=dict(rows=4.0, tokens=96)),
    f'config.batch.rows: 4.0 (float), wanted int. {BATCH}',
  ),
  'text for a list': (
    put(export=dict(formats='model')),
    "config.export.formats: 'model' (str), wanted a list of some of adapter, "
    'model, gguf, orbax.',
  ),
  'unknown format': (
    put(export__formats=('model', 'adaptor')),
    "config.export.formats: 'adaptor', wanted one of adapter, model, gguf, "
    "orbax; did you mean 'adapter'?",
  ),
  'unknown gguf_dtype': (
    put(export=dict(gguf_dtype='q4_0')),
    "config.export.gguf_dtype: 'q4_0', wanted one of f32, f16, bf16, q8_0; did "
    "you mean 'q8_0'?",
  ),
  'max_shard_bytes 0': (
    put(export__max_shard_bytes=0),
    'config.export.max_shard_bytes: 0; it must be at least 1.',
  ),
  'rows 0': (
    put(batch__rows=0),
    'config.batch.rows: 0; it must be at least 1.',
  ),
  'tokens 0': (
    put(batch__tokens=0),
    'config.batch.tokens: 0; it must be at least 1.',
  ),
  'keep_last 0': (
    put(checkpoint__keep_last=0),
    'config.checkpoint.keep_last: 0; it must be at least 1.',
  ),
  'every -1': (
    put(evaluate__every=-1),
    'config.evaluate.every: -1; it must be at least 0.',
  ),
  'seed -1': (put(seed=-1), 'config.seed: -1; it must be in [0, 2^32).'),
  'seed too large': (
    put(seed=2**32),
    'config.seed: 4294967296; it must be in [0, 2^32).',
  ),
  'test 1.5': (
    put(data__test=1.5),
    'config.data.test: 1.5; it must be in [0, 1).',
  ),
  'test and dev': (
    put(data__test=0.5, data__dev=0.5),
    'config.data.test: 0.5 and config.data.dev: 0.5 leave nothing to train on.',
  ),
  'ignore': (
    put(data__ignore='['),
    "config.data.ignore: '[' (unterminated character set at position 0); "
    'wanted: a regular expression',
  ),
  'ignore takes all': (
    put(data__ignore='[0-9]'),
    'cannot train on this data: 1 error\nconfig.data.dev: 0.1 of 60 rows to '
    'dev came out empty; wanted: more rows, or another fraction',
  ),
  'dropout 1.5': (
    put(adapt__dropout=1.5),
    'config.adapt.dropout: 1.5; it must be in [0, 1).',
  ),
  'rank 0': (
    put(adapt__rank=0),
    'config.adapt.rank: 0; it must be at least 1.',
  ),
  'alpha nan': (
    put(adapt__alpha=NAN),
    'config.adapt.alpha: nan; it must be a finite number.',
  ),
  'no targets': (
    put(adapt__targets=()),
    'config.adapt.targets: () names no matrix of the blocks. Names are down, '
    'gate, k, o, q, up, v; letters are those of their dims.',
  ),
  'a key of another method': (
    put(adapt=dict(name='full', rank=4)),
    "config.adapt: unknown key 'rank'. full()",
  ),
  'peak -1': (
    put(schedule__peak=-1.0),
    'config.schedule.peak: -1.0, wanted > 0',
  ),
  'peak inf': (
    put(schedule__peak=INF),
    'config.schedule.peak: inf; it must be a finite number.',
  ),
  'no peak': (
    put(schedule=dict(name='linear')),
    'config.schedule: missing peak. linear(peak: float, warmup_steps: int = 0, '
    'end: float = 0.0)',
  ),
  'all warm-up': (
    put(schedule__warmup_steps=4),
    'config.schedule.warmup_steps: 4, wanted 0 <= warmup_steps < 4 steps of '
    'the run',
  ),
  'b2 1.5': (
    put(optimizer__b2=1.5),
    'config.optimizer.b2: 1.5, wanted 0 <= b2 < 1',
  ),
  'weight_decay -1': (
    put(optimizer__weight_decay=-0.1),
    'config.optimizer.weight_decay: -0.1, wanted >= 0',
  ),
  'clip_norm 0': (
    put(train__clip_norm=0.0),
    'config.train.clip_norm: 0.0; it must be above 0, or None.',
  ),
  'unknown optimizer': (
    put(optimizer__name='adam'),
    "config.optimizer.name: unknown function 'adam'; did you mean 'adamw'? "
    'tuner.optim has adafactor, adamw, lion, muon, sgd',
  ),
  'optimizer without a name': (
    put(optimizer=dict(b2=0.9)),
    'config.optimizer.name: None, wanted the name of a function, one of '
    'adafactor, adamw, lion, muon, sgd',
  ),
  'unknown schedule': (
    put(schedule__name='cosin'),
    "config.schedule.name: unknown function 'cosin'; did you mean 'cosine'? "
    'tuner.schedules has constant, cosine, linear, wsd',
  ),
  'unknown objective': (
    put(objective__name='stf'),
    "config.objective.name: unknown function 'stf'; did you mean 'sft'? "
    'tuner.objectives has sft',
  ),
  'dotted objective that is not there': (
    put(objective__name='no_such_package.loss'),
    "config.objective.name: 'no_such_package.loss': cannot import "
    "'no_such_package': No module named 'no_such_package'",
  ),
  'unknown adapt': (
    put(adapt__name='lorra'),
    "config.adapt.name: unknown function 'lorra'; did you mean 'lora'? "
    'tuner.adapt has dora, full, lora, peft',
  ),
  'unknown metric': (
    put(evaluate__metrics=('json_vlid',)),
    "config.evaluate.metrics.name: unknown function 'json_vlid'; did you mean "
    "'json_valid'? tuner.evals.metrics has accepted, bleu, chrf, contains, "
    'exact, exact_normalised, field_f1, function_call, json_equal, '
    'json_schema, json_valid, label, length_ratio, numeric, regex, '
    'regex_found, rouge_1, rouge_2, rouge_l, sql, term_recall, token_f1',
  ),
  'answers beyond the positions': (
    put(evaluate__max_tokens=250),
    'config.evaluate.max_tokens: 250; the longest held-out prompt has 25 '
    'tokens, and the model 256 positions: at most 231.',
  ),
  'no such data': (
    lambda c: put(data__path=c.data.path.replace('rows.', 'rosw.'))(c),
    "config.data.path: 'DIR/rosw.jsonl' is not there: no 'rosw.jsonl' in 'DIR'"
    "; did you mean 'rows.jsonl'?",
  ),
  'no such model': (
    put(model__path='/no/such/model'),
    "config.model.path: '/no/such/model' is not there: no 'no' in '/'",
  ),
  'model is a file': (
    lambda c: put(model__path=c.data.path)(c),
    'config.model.path: ROWS is a file, not a directory.',
  ),
  'no path of a model': (
    put(model__path=''),
    "config.model.path: '', wanted the path of a file",
  ),
  'example longer than a row': (
    lambda c: put(batch__tokens=46)(c),
    'ROWS:1: messages: 47 tokens; wanted: at most 46 (or too_long=drop)',
  ),
  'rows over accumulate': (
    put(batch__accumulate=3),
    'config.batch.rows: 4; it must be a multiple of config.batch.accumulate, '
    'which is 3.',
  ),
  'rows over devices': (
    put(mesh__devices=8),
    'config.batch: 4 rows in 1 micro-batches are 4 rows each, which the 8 '
    'devices along data x fsdp cannot share; make it a multiple.',
  ),
  'steps 0': (put(train__steps=0), 'config.train.steps: 0; at least 1.'),
  'two epochs': (
    put(train=dict(steps='two epochs')),
    "config.train.steps: 'two epochs'; wanted a number of steps or '2 epochs'.",
  ),
  'mesh does not multiply': (
    put(mesh=dict(data=3, devices=8)),
    'config.mesh: data=3, fsdp=1, expert=1, tensor=1 does not multiply to 8 '
    'devices.',
  ),
  'more devices than there are': (
    put(mesh__devices=9),
    'config.mesh.devices: 9; there are 8 here.',
  ),
  'keep_best that no save can rank': (
    put(checkpoint__keep_best=1, checkpoint__every=3, evaluate__every=2),
    'config.checkpoint.keep_best: a save at every 3 steps has no dev loss to '
    'be ranked by, measured every 2; make config.checkpoint.every a multiple '
    'of config.evaluate.every.',
  ),
  'keep_best without dev': (
    put(checkpoint__keep_best=1),
    'config.checkpoint.keep_best: the best is by the loss on the dev split; '
    'set config.evaluate.every and config.data.dev.',
  ),
  'every without dev': (
    put(evaluate__every=2, data__dev=0.0),
    'config.evaluate.every: 2, but config.data.dev is 0: hold out a dev split, '
    'such as 0.05. The test split is for the end.',
  ),
  'adapter of full': (
    put(adapt=dict(name='full'), export__formats=('adapter',)),
    "config.export.formats: 'adapter', but 'full' makes none; use 'model'.",
  ),
  'writer not installed': (
    put(log__writers=('wandb',)),
    "config.log.writers: 'wandb' is not installed: pip install 'tuner[wandb]', "
    'or leave it out.',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_word_by_word(refused, case, tiny_rows, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # as if not installed
  change, wanted = REFUSED[case]
  found = refused(change).replace(str(tiny_rows.parent), 'DIR')
  if case == 'example longer than a row':  # and many more
    assert found.splitlines()[0].startswith('cannot train on this data: ')
    found = found.splitlines()[1]
  assert found == wanted


def test_references_that_a_metric_cannot_score_are_found_first(
  refused, tmp_path
):
  rows = tmp_path / 'plain.jsonl'
  lines = [{'input': f'q{i}', 'output': f'a{i}'} for i in range(60)]
  rows.write_text('\n'.join(map(json.dumps, lines)))
  change = put(data__path=str(rows), evaluate__metrics=('json_equal',))
  assert re.fullmatch(
    r'TMP/plain.jsonl:\d+: config.evaluate.metrics: json_equal: the reference '
    r"is no valid JSON: 'a\d+'",
    refused(change),
  )


def test_held_out_rows_are_read_before_the_model(refused, tmp_path, tiny_rows):
  """One long row in the test split: not found after hours of training."""
  long = {'input': '503 and 606', 'output': 'x' * 300}  # held out as test
  rows = tmp_path / 'long.jsonl'
  rows.write_text(tiny_rows.read_text() + json.dumps(long) + '\n')
  change = put(data__path=str(rows), evaluate__base=False)
  assert refused(change).startswith(
    'cannot train on this data: 1 error\nTMP/long.jsonl:61: messages: '
  )


def test_examples_longer_than_the_positions(refused, tmp_path):
  rows = tmp_path / 'long.jsonl'
  lines = [{'input': f'{i}', 'output': 'x' * 280} for i in range(60)]
  rows.write_text('\n'.join(map(json.dumps, lines)))
  change = put(
    data__path=str(rows), data__max_tokens=400, batch__tokens=400,
  )  # fmt: skip
  assert refused(change) == (
    'TMP/long.jsonl:11 has 298 tokens; the model has 256 positions. Set '
    'config.data.max_tokens.'
  )


def test_workdir_is_a_file(tiny_config, tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(RuntimeError) as caught:
    commands.train(tiny_config, tmp_path / 'run')
  assert str(caught.value) == (
    f'cannot write to {tmp_path}/run: File exists\n'
    'the workdir must be a directory on a disk that can be written to'
  )


def test_every_section_can_be_named_on_the_command_line():
  """Sections that a file leaves out are there, empty, and mean the defaults."""
  c = ml_collections.ConfigDict(dict(batch=dict(rows=1)))
  assert sections.complete(lambda: c)().to_dict() == {
    'batch': {'rows': 1},
    **{
      name: {}
      for name in (
        'objective',
        'evaluate',
        'retention',
        'select',
        'checkpoint',
        'export',
        'mesh',
        'log',
      )  # fmt: skip
    },
  }


def tuner(*arguments, cwd=ROOT):
  """(exit code, stdout, stderr) of the program in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-m', 'tuner.main', *map(str, arguments)],
    capture_output=True, text=True, cwd=cwd, timeout=60, env=os.environ,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def unchanged(folder):
  before = sorted(folder.rglob('*'))
  yield
  assert sorted(folder.rglob('*')) == before


@pytest.fixture
def file(tiny_config, tmp_path):
  """A config file without an evaluate section."""
  del tiny_config.evaluate
  path = tmp_path / 'config.py'
  path.write_text(
    'import ml_collections\n\n\ndef get_config():\n'
    f'  return ml_collections.ConfigDict({tiny_config.to_dict()!r})\n'
  )
  return path


HINT = '(--verbosity=1 shows the traceback)\n'


@pytest.mark.parametrize(
  ('arguments', 'code', 'wanted'),
  [
    (
      ['--config.evaluate.every=2', '--config.data.dev=0'],
      1,
      'tuner: config.evaluate.every: 2, but config.data.dev is 0: hold out a '
      f'dev split, such as 0.05. The test split is for the end.\n{HINT}',
    ),
    (
      ['--config.schedul.peak=1'],
      1,
      """tuner: --config: no section 'schedul'
Did you mean "schedule" instead of "schedul"?
""",
    ),
    (
      ['--config.batch.rows=x'],
      1,
      'FATAL Flags parsing error: flag --config.batch.rows=x: invalid literal '
      "for int() with base 10: 'x'\nPass --helpshort or --helpfull to see help "
      'on flags.\n',
    ),
    (
      ['trian'],
      1,
      "\nunknown command 'trian'; there is train, evaluate, check, convert, "
      'export\n',
    ),
  ],
)
def test_the_program_says_one_thing_and_leaves(
  file, tmp_path, arguments, code, wanted
):
  found, out, err = tuner(
    f'--config={file}', f'--workdir={tmp_path / "run"}', *arguments
  )
  assert found == code and 'Traceback' not in out + err
  assert err.endswith(wanted) and (err == wanted or wanted[0] == '\n')


@pytest.mark.parametrize('given', ['config', 'workdir'])
def test_both_flags_are_needed(file, tmp_path, given):
  value = {'config': file, 'workdir': tmp_path / 'run'}[given]
  missing = {'config': 'workdir', 'workdir': 'config'}[given]
  with unchanged(tmp_path):
    code, out, err = tuner(f'--{given}={value}')
  assert code == 1 and 'Traceback' not in out + err
  assert f'train needs --{missing}' in err


def test_a_config_file_that_is_not_there(file, tmp_path):
  with unchanged(tmp_path):
    code, _, err = tuner(
      f'--config={tmp_path}/conifg.py', f'--workdir={tmp_path}/run'
    )
  assert code == 1
  assert err == (
    f"tuner: --config: '{tmp_path}/conifg.py' is not there: no 'conifg.py' in "
    f"'{tmp_path}'; did you mean 'config.py'?\n{HINT}"
  )
