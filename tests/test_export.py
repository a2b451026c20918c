"""The command `export`: which step, what is refused, and what is kept."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import safetensors.numpy
import support

from tuner import commands, commits, export, rundir
from tuner.artifacts import export as export_lib
from tuner.artifacts import outside
from tuner.models import hub

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def trained(tiny_dir, tiny_rows, tmp_path_factory):
  """(config, workdir) of a run of four steps, saved at 2 and 4."""
  config = support.config(tiny_dir, tiny_rows)
  config.evaluate = dict(metrics=(), test='never', base=False)
  config.export = dict(formats=())
  config.objective = dict(name='support.towards_one')
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert commands.train(config, workdir) == 0
  assert not (workdir / 'export').exists()
  return config, workdir


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
  """run(...) exports the run to tmp_path/out, by our own readers alone."""
  monkeypatch.setattr(outside, '_is_installed', lambda name: False)
  config, workdir = trained

  def call(*formats, change=None, **kwargs):
    own = ml_collections.ConfigDict(config.to_dict())
    if change:
      change(own)
    given = {'workdir': workdir, 'out': tmp_path / 'out', **kwargs}
    return export.run(own, formats=formats, **given)

  return call


def contents(path):
  return {
    file.relative_to(path).as_posix(): file.read_bytes()
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }


def test_the_newest_step_by_default(run, trained, tmp_path, capsys):
  """All that was found is in verify.json; the data is not read again."""
  config, workdir = trained

  def gone(own):
    own.data.path = str(tmp_path / 'gone.jsonl')

  assert run('adapter', 'model', change=gone) == 0
  out, err = capsys.readouterr()
  assert err.startswith(f'exporting step 4 of {workdir}')
  digest = commits.read_record(workdir / 'commits/4.json', 4)['sha256']
  assert f'step 4 (checkpoint {digest[:12]}) exported to {tmp_path}/out' in out
  assert max(len(line) for line in out.splitlines() if '/' not in line) <= 80
  found = json.loads((tmp_path / 'out/verify.json').read_text())
  assert found.keys() == {'adapter', 'model'}
  for one in found.values():
    assert (one['step'], one['checkpoint']) == (4, digest)
    (check,) = one['checks']
    assert check['faults'] == [] and check['weights'] == 0
    assert check['prompts'] == check['agree'] == one['prompts'] == 8
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'adapter', 'model', 'verify.json'}


def test_a_chosen_step(run, tmp_path):
  """Step 2 is not step 4, and its card claims no scores of step 4."""
  run('adapter', is_verified=False)
  newest = contents(tmp_path / 'out/adapter')
  run('adapter', step=2, is_verified=False)
  chosen = contents(tmp_path / 'out/adapter')
  name = 'adapter_model.safetensors'
  assert newest[name] != chosen[name]
  assert newest['tokenizer.json'] == chosen['tokenizer.json']
  assert b'step 2 of 4' in chosen['README.md']
  assert json.loads((tmp_path / 'out/verify.json').read_text()) == {}


def test_weights_between_base_and_tuned(run, tmp_path, capsys):
  """b is scaled, a is not; the card claims no scores of the whole way."""
  run('adapter')
  whole = safetensors.numpy.load_file(
    tmp_path / 'out/adapter/adapter_model.safetensors'
  )
  assert run('adapter', 'model', alpha=0.25) == 0  # and verified
  half = safetensors.numpy.load_file(
    tmp_path / 'out/adapter/adapter_model.safetensors'
  )
  assert whole.keys() == half.keys() and len(whole) > 4
  for name, value in whole.items():
    scale = 0.25 if 'lora_B' in name else 1.0
    np.testing.assert_array_equal(half[name], scale * value)
  text = (tmp_path / 'out/adapter/README.md').read_text()
  moved = 'step 4 of 4, moved back to 0.25 of its way.'
  assert text.count(moved) == 2 and f'Not measured: this is {moved}' in text
  assert '8/8' in capsys.readouterr().out


@pytest.mark.parametrize('alpha', [0.0, -1.0, 1.5, float('nan')])
def test_an_alpha_beyond_the_ends_is_refused(run, alpha):
  with pytest.raises(ValueError) as caught:
    run('adapter', alpha=alpha)
  assert str(caught.value) == (
    f'--alpha: {alpha:g}; wanted above 0, up to 1: 0 is the base, 1 the model '
    'as it was trained.'
  )


def test_what_the_end_of_training_exports_is_what_the_command_does(
  trained, run, tiny_dir, tiny_rows, tmp_path, capsys
):
  config, workdir = trained
  again = tmp_path / 'run'
  shutil.copytree(workdir, again)
  own = ml_collections.ConfigDict(config.to_dict())
  own.export = dict(formats=('adapter', 'model'))
  commands.train(own, again)
  out = capsys.readouterr().out
  assert 'read again and compared' in out and '8/8' in out
  run('adapter', 'model')
  for name in ('adapter', 'model'):
    assert contents(again / 'export' / name) == contents(
      tmp_path / 'out' / name
    )


def test_twice_is_the_same(run, tmp_path):
  run('adapter', 'model')
  first = contents(tmp_path / 'out')
  run('adapter', 'model')
  assert contents(tmp_path / 'out') == first


def test_a_wrong_export_does_not_take_the_place_of_a_right_one(
  run, tmp_path, monkeypatch, capsys
):
  run('adapter')
  right = contents(tmp_path / 'out/adapter')

  def wrong(path, trained, done):
    export_lib.adapter(path, trained, done)
    file = path / 'adapter_model.safetensors'
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)

  monkeypatch.setitem(export_lib.FORMATS, 'adapter', wrong)
  with pytest.raises(RuntimeError) as caught:
    run('adapter', step=2)
  assert str(caught.value) == (
    'what was written is not what was trained; see '
    f'{tmp_path}/out/adapter.rejected'
  )
  assert 'WRONG: adapter, tuner: 1 weights are not' in capsys.readouterr().out
  assert contents(tmp_path / 'out/adapter') == right
  assert (tmp_path / 'out/adapter.rejected/README.md').is_file()
  found = json.loads((tmp_path / 'out/verify.json').read_text())
  assert found['adapter']['checks'][0]['faults']


def test_what_fails_leaves_what_was_and_keeps_the_others(
  run, tmp_path, monkeypatch, capsys
):
  run('adapter', 'model')
  before = contents(tmp_path / 'out')
  whole = export_lib.FORMATS['model']

  def full(path, *_):
    (path / 'half').write_text('?')
    raise OSError('no space left on device')

  monkeypatch.setitem(export_lib.FORMATS, 'model', full)
  with pytest.raises(RuntimeError) as caught:
    run('model', 'adapter', step=2)
  assert str(caught.value) == ('model was not written: no space left on device')
  assert 'model: not written: no space left' in capsys.readouterr().out
  found = contents(tmp_path / 'out')
  steps = {
    name: one['step'] for name, one in json.loads(found['verify.json']).items()
  }
  assert steps == {'adapter': 2, 'model': 4}
  for name, content in found.items():
    if name.startswith('model/'):
      assert content == before[name]
  assert b'step 2 of 4' in found['adapter/README.md']
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'adapter', 'model', 'verify.json'}
  monkeypatch.setitem(export_lib.FORMATS, 'model', whole)
  run('adapter', 'model')
  assert contents(tmp_path / 'out') == before


def test_a_full_disk_is_told_before(run, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(rundir.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(RuntimeError) as caught:
    run('model')
  assert str(caught.value).startswith(
    'model was not written: disk full: needs 1.'
  )
  assert f' 1 kB free at {tmp_path}/out\n' in str(caught.value)
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'verify.json'}


def test_what_a_killed_export_left_is_removed_by_the_next(run, tmp_path):
  """Whichever formats that one writes."""
  (tmp_path / 'out/.model.tmp').mkdir(parents=True)
  (tmp_path / 'out/.gguf.old').mkdir()
  run('adapter', is_verified=False)
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'adapter', 'gguf', 'verify.json'}  # .old was the whole one.


def message(run, *formats, **kwargs):
  with pytest.raises((ValueError, RuntimeError)) as caught:
    run(*formats, **kwargs)
  return str(caught.value)


def test_refused_word_by_word(run, trained, tmp_path):
  _, workdir = trained
  assert message(run, workdir=tmp_path / 'no') == (
    f"--workdir: '{tmp_path}/no' is not there: no 'no' in '{tmp_path}'"
  )
  (tmp_path / 'empty').mkdir()
  assert message(run, workdir=tmp_path / 'empty') == (
    f'--workdir: {tmp_path}/empty holds no run: there is no commits/ in it.'
  )
  (tmp_path / 'new/commits').mkdir(parents=True)
  assert message(run, workdir=tmp_path / 'new') == (
    f'--workdir: {tmp_path}/new has no committed checkpoint yet: train first.'
  )
  assert message(run, step=3) == (
    f'--step: 3 is not committed in {workdir}; there are 2, 4.'
  )
  assert message(run, 'ggfu') == (
    "--formats: 'ggfu' is no format; did you mean 'gguf'? There are adapter, "
    'model, gguf, orbax.'
  )


@pytest.fixture
def base(trained, tmp_path):
  """A copy of the base in tmp_path/out/model, and what is in it."""
  config, _ = trained
  path = tmp_path / 'out/model'
  shutil.copytree(config.model.path, path)
  return path


def on(base):
  def change(own):
    own.model.path = str(base)

  return change


def test_the_base_is_never_replaced(run, base, tmp_path):
  before = contents(tmp_path)
  given = dict(change=on(base), is_verified=False)
  over = f'would be put over the base, {base}; choose another place.'
  assert message(run, 'model', **given) == f'--out: {base} {over}'
  assert message(run, 'adapter', **given, out=base) == (
    f'--out: {base}/adapter {over}'
  )
  (tmp_path / 'link').symlink_to(tmp_path / 'out')
  assert message(run, 'model', **given, out=tmp_path / 'link') == (
    f'--out: {tmp_path}/link/model {over}'
  )
  (tmp_path / 'link').unlink()
  inner = tmp_path / 'a/model/base'
  shutil.copytree(base, inner)
  assert message(run, 'model', out=tmp_path / 'a', change=on(inner)) == (
    f'--out: {tmp_path}/a/model would be put over the base, {inner}; choose '
    'another place.'
  )
  shutil.rmtree(tmp_path / 'a')
  assert contents(tmp_path) == before
  run('adapter', **given)  # Beside it, there is room.
  assert (
    contents(base).items()
    <= {k.removeprefix('out/model/'): v for k, v in before.items()}.items()
  )


def test_a_run_is_never_replaced(trained, run, tmp_path):
  _, workdir = trained
  copy = tmp_path / 'model'
  shutil.copytree(workdir, copy)
  assert message(run, 'model', workdir=copy, out=tmp_path) == (
    f'--out: {copy} would be put over the run in {copy}; choose another place.'
  )


def test_what_is_no_export_is_not_replaced(run, tmp_path):
  """Other directories, files and links; an export, or nothing, is."""
  place = tmp_path / 'out/model'
  place.mkdir(parents=True)
  run('model', is_verified=False)
  run('model', is_verified=False)
  (place / 'README.md').write_text('mine')
  deleted = 'is there, and no export of this program: it would be deleted. '
  end = 'Move it away or choose another place.'
  assert message(run, 'model') == f'--out: {place} {deleted}{end}'
  (place / 'README.md').unlink()
  assert message(run, 'model') == f'--out: {place} {deleted}{end}'
  place.rename(tmp_path / 'out/model.rejected')
  assert message(run, 'model') == f'--out: {place}.rejected {deleted}{end}'
  (tmp_path / 'out/model.rejected').rename(tmp_path / 'elsewhere')
  place.symlink_to(tmp_path / 'elsewhere')
  assert message(run, 'model') == (
    f'--out: {place} is a symbolic link; a directory is to be put there. '
    'Remove it or choose another place.'
  )
  place.unlink()
  place.write_text('')
  assert message(run, 'model') == (
    f'--out: {place} is a file; a directory is to be put there. {end}'
  )
  assert (tmp_path / 'elsewhere/model.safetensors').is_file()
  (tmp_path / 'out/verify.json').write_text('{"mine": 1}')
  assert message(run, 'adapter') == (
    f'--out: {tmp_path}/out/verify.json is no record of exports: it would be '
    f'replaced. {end}'
  )


def test_out_that_is_no_directory_is_named(run, tmp_path):
  (tmp_path / 'file').write_text('')
  for out in (tmp_path / 'file', tmp_path / 'file/in'):
    text = message(run, 'adapter', out=out)
    assert text.startswith(f'cannot write to {out}: ')
    assert text.endswith(
      '\n--out must be a directory on a disk that can be written to'
    )


def test_what_llama_cpp_lacks_is_refused_before_training(
  trained, run, tiny_dir, tmp_path
):
  """The tiny tokenizer's way of splitting a text; by the base's own file."""
  pytest.importorskip('gguf')
  config, _ = trained
  own = ml_collections.ConfigDict(config.to_dict())
  own.export = dict(formats=('adapter', 'gguf'))
  with pytest.raises(ValueError) as caught:
    commands.train(own, tmp_path / 'run')
  start = f"config.export.formats: 'gguf': {tiny_dir}: tokenizer.json"
  assert str(caught.value).startswith(start)
  assert not (tmp_path / 'run/run.json').exists()
  assert message(run, 'gguf', 'adapter').startswith(start)
  assert not (tmp_path / 'out').exists()


def test_training_begins_only_where_its_export_may_lie(
  trained, tmp_path, capsys
):
  config, _ = trained
  own = ml_collections.ConfigDict(config.to_dict())
  own.export = dict(formats=('adapter',))
  place = tmp_path / 'run/export/adapter'
  place.mkdir(parents=True)
  (place / 'mine').write_text('')
  with pytest.raises(ValueError, match='^--workdir: .* no export of this'):
    commands.train(own, tmp_path / 'run')
  assert not (tmp_path / 'run/commits').exists()


def test_gguf_that_is_not_installed(run, monkeypatch):
  from tuner import ranges

  there = ranges.importlib.util.find_spec
  monkeypatch.setattr(
    ranges.importlib.util,
    'find_spec',
    lambda name: None if name == 'gguf' else there(name),
  )
  assert message(run, 'gguf') == (
    "config.export.formats: 'gguf' is not installed: pip install 'tuner[gguf]'"
    ', or leave it out.'
  )


def test_another_base_is_refused_by_name(trained, run, tmp_path):
  base = tmp_path / 'base'
  base.mkdir()
  support.write_model(base, seed=1)

  def change(own):
    own.model.path = str(base)

  config, workdir = trained
  text = message(run, 'model', change=change)
  assert text.startswith(f'{workdir}: another base.\n')
  for path in (config.model.path, base):
    sha256 = hub.weights_hash(pathlib.Path(path))
    assert f'{path} at revision None, weights sha256 {sha256}\n' in text
  assert text.endswith(
    'Set config.model.path and config.model.revision to the former.'
  )
  old = tmp_path / 'old'
  shutil.copytree(workdir, old)
  (old / 'run.json').unlink()  # Its checkpoints know, too.
  text = message(run, 'model', change=change, workdir=old)
  assert 'model.weights' in text and 'checkpoint' in text


def test_another_rank_is_refused_by_name(trained, run):
  def change(own):
    own.adapt.rank = 5

  _, workdir = trained
  text = message(run, 'model', change=change)
  assert 'adapt.rank | 4          | 5' in text
  assert text.endswith(
    f'\ngive the config that the run was trained with: {workdir}/config.json'
  )


def test_a_damaged_step_is_passed_over_or_refused(
  trained, run, tmp_path, capsys
):
  _, workdir = trained
  damaged = tmp_path / 'damaged'
  shutil.copytree(workdir, damaged)
  file = max(
    (p for p in (damaged / 'checkpoints/4').rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )
  file.write_bytes(file.read_bytes()[:-1])
  text = message(run, 'adapter', workdir=damaged, step=4)
  assert text.startswith('step 4 cannot be read: checkpoints/4/')
  run('adapter', workdir=damaged, is_verified=False)
  assert 'step 4 passed over: checkpoints/4/' in capsys.readouterr().err
  assert b'step 2 of 4' in (tmp_path / 'out/adapter/README.md').read_bytes()


def test_full_fine_tuning_has_no_adapter(tiny_config, tmp_path, capsys):
  tiny_config.adapt = dict(name='full')
  tiny_config.evaluate = dict(metrics=(), test='never', base=False)
  tiny_config.train.steps = 1
  tiny_config.checkpoint = {}
  tiny_config.export = dict(formats=())
  tiny_config.objective = dict(name='support.towards_one')
  commands.train(tiny_config, tmp_path / 'run')
  given = dict(workdir=tmp_path / 'run', is_verified=False)
  with pytest.raises(ValueError, match="'full' makes none"):
    export.run(tiny_config, formats=('adapter',), **given)
  export.run(tiny_config, formats=('adapter', 'model'), **given)
  assert 'adapter: not made; full fine-tuning has none' in (
    capsys.readouterr().err
  )
  assert (tmp_path / 'run/export/model/model.safetensors').is_file()


@pytest.mark.parametrize(
  ('dtype', 'mesh'),
  [
    ('bfloat16', dict(devices=1)),
    ('bfloat16', dict(data=8)),
    ('float32', dict(data=1, fsdp=8)),
  ],
)
def test_every_dtype_and_mesh_is_exported(
  tiny_config, tmp_path, monkeypatch, dtype, mesh
):
  """A LoRA of all that attends, from its first step to what is verified."""
  monkeypatch.setattr(outside, '_is_installed', lambda name: False)
  tiny_config.model.update(dtype=dtype, master=dtype)
  tiny_config.adapt.targets = ['q', 'k', 'v', 'o']
  tiny_config.mesh = mesh
  tiny_config.batch.rows = 8
  tiny_config.train.steps = 1
  tiny_config.checkpoint = {}
  tiny_config.evaluate = dict(metrics=(), test='never', base=False)
  tiny_config.objective = dict(name='support.towards_one')
  tiny_config.export = dict(formats=('adapter', 'model', 'orbax'))
  assert commands.train(tiny_config, tmp_path) == 0
  found = json.loads((tmp_path / 'export/verify.json').read_text())
  assert found.keys() == {'adapter', 'model', 'orbax'}
  for one in found.values():
    (check,) = one['checks']
    assert (check['weights'], check['faults'], check['notes']) == (0, [], [])
    assert check['difference'] is not None


def test_prompts_of_a_run_without_them_are_found_again(trained, run, tmp_path):
  _, workdir = trained
  old = tmp_path / 'old'
  shutil.copytree(workdir, old)
  (old / 'prompts.jsonl').unlink()
  run('adapter', is_verified=False)
  expected = (tmp_path / 'out/adapter/prompts.jsonl').read_bytes()
  run('adapter', workdir=old, is_verified=False)
  assert (tmp_path / 'out/adapter/prompts.jsonl').read_bytes() == expected


def test_the_program(trained, tmp_path):
  """Flags as a user writes them, in a process of its own."""
  config, workdir = trained
  file = tmp_path / 'config.py'
  file.write_text(
    'import ml_collections\n\n\ndef get_config():\n'
    f'  return ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  done = subprocess.run(
    [
      sys.executable, '-m', 'tuner.main', 'export', f'--config={file}',
      f'--workdir={workdir}', '--formats=orbax', '--step=2', '--noverify',
      f'--out={tmp_path}/out',
    ],
    capture_output=True, text=True, cwd=ROOT, timeout=300, env=os.environ,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'out/orbax/weights/embed').is_dir()
  assert 'step 2' in done.stdout and 'read again' not in done.stdout
