"""Checkpoints under every fault that tuner promises to survive.

Run as a program, this file is the process that faults happen to: it imports
once, then forks a child for each scenario that it reads from stdin, before
any JAX backend exists, so that a kill costs no second import.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from tuner import checkpoint, commits, rundir, stop

FACTS = {'seed': 1, 'data': {'sha256': 'ab' * 32, 'rows': 10}, 'base': 'tiny'}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
  kernel: jax.Array
  bias: jax.Array


def state_of(step):
  """A state whose every bit follows from the step."""
  rng = np.random.default_rng(step)
  params = {
    'block': Block(
      jnp.asarray(rng.standard_normal((17, 32)), jnp.float32),
      jnp.asarray(rng.standard_normal(32), jnp.bfloat16),
    ),
    'list': [jnp.asarray(rng.integers(0, 99, 5), jnp.uint8)],
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1))
  )
  floats = {'block': params['block']}
  grads = jax.tree.map(lambda x: x * x, floats)
  _, moments = optimizer.update(grads, optimizer.init(floats), floats)
  return {
    'params': params,
    'optimizer': moments,
    'key': jax.random.key_data(jax.random.key(step)),
    'step': step,
    'nothing': None,
  }


def small(step):
  """As `state_of`, but with nothing to compile."""
  return {'w': jnp.arange(1000.0) * step, 'b': jnp.full(3, step, jnp.bfloat16)}


def like(state):
  """The tree to restore into: shapes on one device, numbers as they are."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
      if isinstance(x, jax.Array)
      else x
    ),
    state,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  b = commits.leaves(b)
  for path, x in commits.leaves(a).items():
    assert type(x) is type(b[path]), path
    assert commits.describe(x) == commits.describe(b[path]), path
    if jnp.issubdtype(getattr(x, 'dtype', np.int32), jax.dtypes.prng_key):
      x, b[path] = jax.random.key_data(x), jax.random.key_data(b[path])
    assert np.asarray(x).tobytes() == np.asarray(b[path]).tobytes(), path


def opened(workdir, facts=FACTS, **kwargs):
  return checkpoint.Checkpoints(workdir, facts, **kwargs)


def committed(workdir):
  names = (workdir / 'commits').glob('*.json')
  return sorted(int(path.stem) for path in names)


def written(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def save_steps(workdir, *steps, make=small, **kwargs):
  with opened(workdir, **kwargs) as checkpoints:
    if checkpoints.newest():
      checkpoints.restore(checkpoints.newest(), like(small(1)))
    for step in steps:
      checkpoints.save(step, make(step))


# Laws


def test_restored_equals_saved_bit_for_bit(tmp_path):
  """bf16, uint8, optax NamedTuples, a dataclass, an int, empty nodes."""
  with opened(tmp_path) as checkpoints:
    checkpoints.save(7, state_of(7))
  with opened(tmp_path) as checkpoints:
    assert checkpoints.newest() == 7
    restored = checkpoints.restore(7, like(state_of(1)))
  assert_same(restored, state_of(7))
  assert type(restored['step']) is int
  assert restored['params']['block'].bias.dtype == jnp.bfloat16


def test_odd_leaves(tmp_path):
  """Typed keys, NumPy arrays, booleans, names with dots and slashes."""
  state = {
    'typed': jax.random.key(3),
    'numpy': np.arange(6, dtype=np.int64).reshape(2, 3),
    'flag': True,
    'a.b/c': {'d': jnp.float32(1.5)},
    'nan': jnp.array([np.nan, -0.0, np.inf]),
  }
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    state['numpy'] += 0  # the save holds a copy of its own
    checkpoints.wait()
    assert_same(checkpoints.restore(1, like(state)), state)


def test_numpy_may_change_while_it_is_saved(tmp_path):
  state = {'x': np.zeros(100_000)}
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    state['x'] += 1
    checkpoints.wait()
    assert not checkpoints.restore(1, state)['x'].any()


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
  """The loop goes on with donated buffers as soon as `save` returns."""
  step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
  x = step(jnp.arange(3_000_000.0))
  expected = np.array(x)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': x})
    for _ in range(5):
      x = step(x)
    checkpoints.wait()
    restored = checkpoints.restore(1, like({'x': x}))['x']
  np.testing.assert_array_equal(restored, expected)
  assert not np.array_equal(x, expected)


@pytest.mark.parametrize('devices, spec', [(8, 'ab'), (4, 'ba'), (2, 'a')])
def test_restored_onto_other_meshes(tmp_path, devices, spec):
  """Saved on 8 devices, restored onto 8, 4, 2 and 1: the bits are equal."""
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices')
  make = lambda n: jax.make_mesh((n // 2, 2), ('a', 'b'))
  place = lambda n, s: jax.sharding.NamedSharding(make(n), P(*s))
  whole = np.random.default_rng(0).standard_normal((16, 24), np.float32)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': jax.device_put(whole, place(8, 'ab'))})
    checkpoints.wait()
    assert checkpoints.record(1)['devices']['mesh'] == {'a': 4, 'b': 2}
    target = jax.ShapeDtypeStruct(
      (16, 24), jnp.float32, sharding=place(devices, spec)
    )
    x = checkpoints.restore(1, {'x': target})['x']
    assert x.sharding == target.sharding
    np.testing.assert_array_equal(x, whole)
    one = checkpoints.restore(1, like({'x': jnp.zeros((16, 24))}))['x']
    np.testing.assert_array_equal(one, whole)


def test_the_record_is_complete(tmp_path):
  with opened(tmp_path) as checkpoints:
    checkpoints.save(3, small(3), score=0.5)
  record = json.loads((tmp_path / 'commits/3.json').read_text())
  assert record['step'] == 3 and record['score'] == 0.5
  assert record['facts'] == FACTS
  assert record['leaves'] == {'w': ['float32', [1000]], 'b': ['bfloat16', [3]]}
  assert {'jax', 'flax', 'optax', 'orbax-checkpoint', 'tuner'} <= {
    *record['versions']
  }
  assert record['devices']['count'] == jax.device_count()
  folder = tmp_path / 'checkpoints/3'
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert {f.relative_to(folder).as_posix() for f in files} == {*record['files']}
  assert sum(f.stat().st_size for f in files) == sum(
    file['bytes'] for file in record['files'].values()
  )


# Saving goes on beside training, and nothing of it is lost.


def test_hashing_does_not_block_and_the_next_save_waits(tmp_path, monkeypatch):
  go = threading.Event()
  hash_file = commits._hash_file

  def slow(path):
    assert go.wait(20)
    return hash_file(path)

  monkeypatch.setattr(commits, '_hash_file', slow)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, small(1))  # returns, though no file can be hashed
    assert committed(tmp_path) == []
    threading.Timer(0.2, go.set).start()
    checkpoints.save(2, small(2))
    assert go.is_set() and committed(tmp_path) == [1]
  assert committed(tmp_path) == [1, 2]


@pytest.mark.parametrize('then', ['save', 'wait', 'exit'])
def test_an_error_of_the_thread_surfaces_once(tmp_path, monkeypatch, then):
  def fail(*_):
    raise OSError(errno.EIO, 'Input/output error')

  with pytest.raises(RuntimeError, match='committing step 1 failed: OSError'):
    with opened(tmp_path) as checkpoints:
      with monkeypatch.context() as patch:
        patch.setattr(commits, 'write_record', fail)
        checkpoints.save(1, small(1))
        checkpoints._thread.join()
      if then != 'exit':
        arguments = (2, small(2)) if then == 'save' else ()
        with pytest.raises(RuntimeError, match='step 1 failed') as caught:
          getattr(checkpoints, then)(*arguments)
        checkpoints.save(2, small(2))  # raised once; this one works
        checkpoints.wait()
        raise caught.value
  assert committed(tmp_path) == ([] if then == 'exit' else [2])
  if then != 'exit':
    assert written(tmp_path) == [2]


def test_the_same_state_is_not_written_twice(tmp_path):
  save_steps(tmp_path, 1, 2)
  before = (tmp_path / 'commits/2.json').stat().st_mtime_ns
  with opened(tmp_path) as checkpoints:
    checkpoints.restore(checkpoints.newest(), like(small(1)))
    checkpoints.save(2, small(2))
    checkpoints.save(2, small(2))
  assert (tmp_path / 'commits/2.json').stat().st_mtime_ns == before


def test_going_back_replaces_the_steps_after(tmp_path):
  """Restored by hand from step 1, the old future of step 1 goes."""
  save_steps(tmp_path, 1, 2, 3, keep_last=3)
  with opened(tmp_path, keep_last=3) as checkpoints:
    checkpoints.restore(1, like(small(1)))
    checkpoints.save(2, small(20))
    checkpoints.wait()
    assert committed(tmp_path) == written(tmp_path) == [1, 2]
    assert_same(checkpoints.restore(2, like(small(1))), small(20))


def test_steps_that_nobody_looked_at_are_not_overwritten(tmp_path):
  save_steps(tmp_path, 1, 2)
  with opened(tmp_path) as checkpoints:
    with pytest.raises(RuntimeError, match=r'holds steps \[1, 2\]'):
      checkpoints.save(3, small(3))
    checkpoints.restore(checkpoints.newest(), like(small(1)))
    with pytest.raises(ValueError, match='step 1 comes after step 2'):
      checkpoints.save(1, small(1))
  assert committed(tmp_path) == [1, 2]


def test_pruning_keeps_the_last_and_the_best(tmp_path):
  scores = [0.1, 0.9, 0.2, float('nan'), 0.8, None, 0.7]
  with opened(tmp_path, keep_last=2, keep_best=2) as checkpoints:
    for step, score in enumerate(scores, 1):
      checkpoints.save(step, small(step), score=score)
  assert committed(tmp_path) == written(tmp_path) == [1, 3, 6, 7]
  with pytest.raises(ValueError, match='keep_last=0'):
    opened(tmp_path, keep_last=0)


def test_what_is_chosen_stays_until_another_is(tmp_path):
  """However old; also where it is among the best or the last."""
  chosen = [None, 2, 2, 2, 5, 5, 7]
  kept = [[1], [2], [2, 3], [2, 4], [5], [5, 6], [7]]
  with opened(tmp_path, keep_last=1) as checkpoints:
    for step, (own, wanted) in enumerate(zip(chosen, kept), 1):
      checkpoints.save(step, small(step), chosen=own)
      checkpoints.wait()
      assert committed(tmp_path) == written(tmp_path) == wanted


def test_leftovers_are_ignored_then_cleaned(tmp_path, capsys):
  save_steps(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '2', folder / '9')  # whole, but never committed
  shutil.copytree(folder / '1', folder / '5.orbax-checkpoint-tmp')
  (folder / 'notes.txt').write_text('of the user')
  (tmp_path / 'commits/.9.json.tmp').write_text('{')
  with opened(tmp_path) as checkpoints:
    assert checkpoints.newest() == 2
    assert capsys.readouterr().err == (
      'step 9 passed over: commits/9.json: missing, the save was not finished\n'
    )
    checkpoints.restore(2, like(small(1)))
    checkpoints.save(3, small(3))
  assert {p.name for p in folder.iterdir()} == {'2', '3', 'notes.txt'}
  assert {p.name for p in (tmp_path / 'commits').iterdir()} == {
    '2.json',
    '3.json',
  }


# Refusals


@pytest.mark.parametrize(
  'change, message',
  [
    (
      {'b': np.zeros(3, np.float32)},
      'b: checkpoint bfloat16[3], now float32[3]',
    ),
    (
      {'w': np.zeros((10, 100), np.float32)},
      'w: checkpoint float32[1000], now float32[10, 100]',
    ),
    (
      {'new': {'x': np.zeros(2, np.float32)}},
      'new.x: checkpoint absent, now float32[2]',
    ),
    ({'w': {}}, 'w: checkpoint float32[1000], now absent'),
  ],
)
def test_another_shape_or_dtype_is_refused_by_name(tmp_path, change, message):
  save_steps(tmp_path, 1)
  with opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError) as caught:
      checkpoints.restore(1, like(small(1) | change))
    assert message in str(caught.value)
    with pytest.raises(ValueError, match='b: .* lacks a sharding'):
      checkpoints.restore(1, jax.eval_shape(lambda: small(1)))


@pytest.mark.parametrize(
  'path', ['seed', 'data.sha256', 'data.rows', 'base', 'data', 'new', 'x.y']
)
def test_each_changed_fact_is_refused_by_name(tmp_path, path):
  save_steps(tmp_path, 1)
  facts = json.loads(json.dumps(FACTS))
  section = facts
  *parents, last = path.split('.')
  for key in parents:
    section = section.setdefault(key, {})
  section[last] = 'changed'
  with opened(tmp_path, facts) as checkpoints:
    with pytest.raises(ValueError) as caught:
      checkpoints.restore(1, like(small(1)))
  rows = str(caught.value).splitlines()
  assert [cell.strip() for cell in rows[1].split('|')] == [
    'key',
    'checkpoint',
    'now',
  ]
  assert any(
    row.split()[0] == path and row.endswith('| "changed"') for row in rows
  )
  assert '--allow_change=key lets one through' in rows[-1]
  with opened(tmp_path, facts, allow_change=[path]) as checkpoints:
    restored = checkpoints.restore(1, like(small(1)))
    assert_same(restored, small(1))
    checkpoints.save(2, small(2))
  assert json.loads((tmp_path / 'commits/2.json').read_text())['facts'] == facts


def test_the_table_of_facts():
  old, new = FACTS, FACTS | {'seed': 2, 'long': 'x' * 200}
  with pytest.raises(ValueError) as caught:
    commits.compare_facts(old | {'long': 'x' * 199 + 'y'}, new)
  assert str(caught.value).splitlines() == [
    'this run is not the one that the checkpoint is of:',
    '  key  | checkpoint                             | now',
    '  long | …' + 'x' * 35 + 'y" | …' + 'x' * 36 + '"',
    '  seed | 1                                      | 2',
    '--allow_change=key lets one through; or choose another workdir',
  ]
  commits.compare_facts(old, new, ['seed', 'long'])
  with pytest.raises(ValueError, match='allow_change=sede: no such fact'):
    commits.compare_facts(old, new, ['sede'])


# Disks


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  state = {'x': jax.ShapeDtypeStruct((), jnp.float32)}
  save_steps(tmp_path, 1)
  with opened(tmp_path) as checkpoints:
    checkpoints.restore(checkpoints.newest(), like(small(1)))
    state = small(2)
    with monkeypatch.context() as patch:
      patch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=3000))
      with pytest.raises(RuntimeError) as caught:
        checkpoints.save(2, state)
    assert str(caught.value) == (
      f'disk full: needs 4.01 kB, 3 kB free at {tmp_path}/checkpoints\n'
      'earlier checkpoints are untouched: make room and run the same command'
    )
    assert committed(tmp_path) == written(tmp_path) == [1]
    checkpoints.save(2, state)  # space has come back
  assert committed(tmp_path) == [1, 2]


def test_a_write_that_fails_half_way(tmp_path, caplog):
  """A real one: the kernel refuses files over 100 kB, as a quota would."""
  noise = lambda step: {
    'x': jnp.asarray(np.random.default_rng(step).random(100_000, np.float32))
  }
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, noise(1))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
      with pytest.raises(RuntimeError, match='step 2 failed') as caught:
        caplog.clear()
        checkpoints.save(2, noise(2))
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'File too large' in str(caught.value)  # it fired
    assert len(str(caught.value).splitlines()) == 2 and not caplog.records
    assert committed(tmp_path) == [1] and checkpoints.newest() == 1
    checkpoints.save(2, noise(2))
    checkpoints.save(3, noise(3))
  assert committed(tmp_path) == written(tmp_path) == [2, 3]


@pytest.mark.parametrize('kind', ['file', 'read-only'])
def test_a_workdir_that_cannot_be_written_to(tmp_path, kind):
  workdir = tmp_path / 'run'
  if kind == 'file':
    workdir.write_text('')
  else:
    workdir = pathlib.Path('/proc/self/run')
  with pytest.raises(RuntimeError) as caught:
    opened(workdir)
  assert f'cannot write to {workdir}/checkpoints: ' in str(caught.value)
  assert len(str(caught.value).splitlines()) == 2


def flip_bit(rng, path, _):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def truncate(rng, path, _):
  os.truncate(path, rng.randrange(path.stat().st_size))


def zero(rng, path, _):
  data = bytearray(path.read_bytes())
  start = rng.randrange(len(data))
  while not any(data[start:]):
    start = rng.randrange(len(data))
  data[start:] = bytes(len(data) - start)
  path.write_bytes(data)


def delete(_, path, __):
  path.unlink()


def swap(rng, path, others):
  other = rng.choice([o for o in others if o.read_bytes() != path.read_bytes()])
  mine, its = path.read_bytes(), other.read_bytes()
  path.write_bytes(its)
  other.write_bytes(mine)


def replace_by_directory(_, path, __):
  path.unlink()
  path.mkdir()


DAMAGES = (flip_bit, truncate, zero, delete, swap, replace_by_directory)


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('two')
  save_steps(workdir, 1, 2)
  return workdir


@pytest.mark.parametrize('damage', DAMAGES)
def test_every_damage_is_found(two_steps, tmp_path, capsys, damage):
  """34 files a damage: 204 in all, the commit record among the files."""
  rng = random.Random(damage.__name__)
  for round_ in range(34):
    workdir = tmp_path / str(round_)
    shutil.copytree(two_steps, workdir)
    folder = workdir / 'checkpoints/2'
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    files.append(workdir / 'commits/2.json')
    path = files[round_ % len(files)]
    damage(rng, path, files)
    with opened(workdir) as checkpoints:
      assert checkpoints.newest() == 1, path
      said = capsys.readouterr().err
      name = path.relative_to(workdir).as_posix()
      assert said.startswith('step 2 passed over: '), path
      assert damage is swap or name in said, (path, said)
      with pytest.raises(RuntimeError, match='step 2 cannot be restored'):
        checkpoints.restore(2, like(small(1)))
      assert_same(checkpoints.restore(1, like(small(1))), small(1))
    shutil.rmtree(workdir)


def test_swapped_steps_are_found(two_steps, tmp_path, capsys):
  """Directories exchanged; records exchanged; both exchanged."""
  for names in (['checkpoints/{}'], ['commits/{}.json'], None):
    workdir = tmp_path / str(names)
    shutil.copytree(two_steps, workdir)
    for name in names or ['checkpoints/{}', 'commits/{}.json']:
      one, two = (workdir / name.format(i) for i in (1, 2))
      one.rename(workdir / 'x')
      two.rename(one)
      (workdir / 'x').rename(two)
    with opened(workdir) as checkpoints:
      assert checkpoints.newest() is None
    said = capsys.readouterr().err
    assert 'step 2 passed over' in said and 'step 1 passed over' in said


def test_a_damaged_step_is_saved_anew(two_steps, tmp_path, capsys):
  """Fallen back to step 1, step 2 is computed and committed again."""
  workdir = tmp_path / 'run'
  shutil.copytree(two_steps, workdir)
  delete(None, workdir / 'checkpoints/2/_METADATA', None)
  with opened(workdir, keep_last=1) as checkpoints:
    assert checkpoints.newest() == 1
    assert 'checkpoints/2/_METADATA: missing' in capsys.readouterr().err
    checkpoints.restore(1, like(small(1)))
    checkpoints.save(2, small(2))
    checkpoints.wait()
    assert checkpoints.newest() == 2 and committed(workdir) == [2]


# Kills and ends, in forked children of one process


class Zygote:
  """The process that forks a child for each scenario."""

  def __init__(self):
    root = pathlib.Path(__file__).parents[1]
    self._process = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={
        **os.environ,
        'PYTHONPATH': str(root),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '',
      },
    )

  def start(self, scenario, workdir, **arguments):
    """Returns the pid of a child that runs the scenario."""
    request = dict(scenario=scenario, workdir=str(workdir), **arguments)
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return int(self._process.stdout.readline())

  def end(self):
    """The child's exit code, negative for a signal, once it has ended."""
    return int(self._process.stdout.readline())

  def close(self):
    self._process.stdin.close()
    assert self._process.wait(20) == 0


@pytest.fixture(scope='module')
def zygote():
  with contextlib.closing(Zygote()) as process:
    yield process


def wait_for(path, text, timeout_s=30):
  start = time.monotonic()
  while not path.exists() or text not in path.read_text():
    assert time.monotonic() - start < timeout_s, f'{text!r} not in {path}'
    time.sleep(0.002)


def kill_and_check(zygote, workdir, kills):
  """Each child goes on where the killed one stopped; see `loop`."""
  rng = random.Random(kills)
  last = 0
  for kill in range(kills):
    pid = zygote.start('loop', workdir, name=f'{kill}.log')
    log = workdir / f'{kill}.log'
    wait_for(log, f'committed {last + rng.randint(1, 3)}\n')
    time.sleep(rng.random() * 0.1)
    os.kill(pid, signal.SIGKILL)
    assert zygote.end() == -signal.SIGKILL  # it fired
    logged = [line.split() for line in log.read_text().splitlines()]
    assert logged[0] == (['resumed', str(last)] if last else ['fresh', '0'])
    with opened(workdir) as checkpoints:
      newest = checkpoints.newest()
      assert newest - int(logged[-1][1]) in (0, 1)  # none lost
      assert_same(checkpoints.restore(newest, like(small(1))), small(newest))
    last = newest


@pytest.mark.parametrize('kills', [6, pytest.param(19, marks=pytest.mark.slow)])
def test_kills_at_random_moments(zygote, tmp_path, kills):
  """25 in all: nothing broken, no committed step lost."""
  kill_and_check(zygote, tmp_path, kills)


POINTS = {
  'write begins': 3,
  'before record': 3,
  'record half written': 3,
  'after record': 4,
  'prune begins': 4,
  'prune half done': 4,
}


@pytest.mark.parametrize('point', POINTS)
def test_killed_at_a_named_point(zygote, tmp_path, point):
  zygote.start('die', tmp_path, point=point)
  assert zygote.end() == -signal.SIGKILL
  if point == 'record half written':
    assert (tmp_path / 'commits/.4.json.tmp').exists()
  with opened(tmp_path) as checkpoints:
    newest = checkpoints.newest()
    assert newest == POINTS[point]
    assert_same(checkpoints.restore(newest, like(small(1))), small(newest))
    checkpoints.save(newest + 1, small(newest + 1))
  assert committed(tmp_path) == written(tmp_path) == [newest, newest + 1]


ENDS = {
  'return': 0,
  'sys.exit(0)': 0,
  'sys.exit(3)': 3,
  'exception': 1,
  'KeyboardInterrupt': 130,
  'SIGTERM': 75,
  'SIGINT': 75,
}


@pytest.mark.parametrize('how', ENDS)
def test_every_way_to_end_commits_the_last_save(zygote, tmp_path, how):
  zygote.start('end', tmp_path, how=how, fails=False)
  code = zygote.end()
  said = (tmp_path / 'said').read_text()
  assert 'in flight' in said, said  # it ended without waiting
  assert code in (ENDS[how], -signal.SIGINT), said
  with opened(tmp_path) as checkpoints:
    assert checkpoints.newest() == 1
    assert_same(checkpoints.restore(1, like(small(1))), small(1))


@pytest.mark.parametrize('how', ['return', 'sys.exit(0)', 'SIGTERM'])
def test_no_end_hides_that_the_last_save_failed(zygote, tmp_path, how):
  zygote.start('end', tmp_path, how=how, fails=True)
  code = zygote.end()
  said = (tmp_path / 'said').read_text()
  assert 'in flight' in said and code not in (0, 75), said
  assert 'committing step 1 failed: OSError' in said
  assert committed(tmp_path) == []


# The lock


def test_a_second_trainer_is_refused_by_name(zygote, tmp_path):
  pid = zygote.start('hold', tmp_path)
  wait_for(tmp_path / 'said', 'held')
  with pytest.raises(RuntimeError) as caught:
    with rundir.lock(tmp_path):
      pass
  assert str(caught.value).startswith(f'{tmp_path} is in use by pid {pid} on ')
  os.kill(pid, signal.SIGKILL)
  assert zygote.end() == -signal.SIGKILL
  for _ in range(2):  # the kernel released it, and so does leaving the block
    with rundir.lock(tmp_path):
      with pytest.raises(RuntimeError, match=f'pid {os.getpid()} on '):
        with rundir.lock(tmp_path):
          pass


def test_a_forked_child_does_not_keep_the_lock(zygote, tmp_path):
  """The trainer is killed; the worker that it forked lives on."""
  pid = zygote.start('hold', tmp_path, forks=True)
  wait_for(tmp_path / 'forked', '\n')
  orphan = int((tmp_path / 'forked').read_text())
  os.kill(pid, signal.SIGKILL)
  assert zygote.end() == -signal.SIGKILL
  os.kill(orphan, 0)  # alive
  try:
    with rundir.lock(tmp_path):
      pass
  finally:
    os.kill(orphan, signal.SIGKILL)


# What the children do


def loop(workdir, name):
  """Saves step after step as fast as it can, and logs what is committed."""
  with opened(workdir) as checkpoints, open(workdir / name, 'w', 1) as log:
    step = checkpoints.newest() or 0
    if step:
      assert_same(checkpoints.restore(step, like(small(1))), small(step))
    print('resumed' if step else 'fresh', step, file=log)
    while True:
      step += 1
      checkpoints.save(step, small(step))
      if step > 1:  # `save` has waited for the one before
        print('committed', step - 1, file=log)


def die(workdir, point):
  """Commits steps 1 to 3, then is killed at that point of saving step 4."""
  kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
  write_record = commits.write_record
  rmtree = shutil.rmtree

  def write_then_kill(*arguments):
    write_record(*arguments)
    kill()

  def remove_half_then_kill(path, **_):
    rmtree(path / 'ocdbt.process_0')
    kill()

  with opened(workdir) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, small(step))
    checkpoints.wait()
    patches = {
      'write begins': (ocp.AsyncCheckpointer, 'wait_until_finished', kill),
      'before record': (commits, 'write_record', kill),
      'record half written': (os, 'replace', kill),
      'after record': (commits, 'write_record', write_then_kill),
      'prune begins': (checkpoint.Checkpoints, '_remove', kill),
      'prune half done': (shutil, 'rmtree', remove_half_then_kill),
    }
    if point == 'write begins':
      start = checkpoints._orbax.save
      checkpoints._orbax.save = lambda *a, **k: (start(*a, **k), kill())
    else:
      # Cleaning before the save removes nothing; it must not be what dies.
      checkpoints._clean = lambda step: None
      setattr(*patches[point])
    checkpoints.save(4, small(4))
    checkpoints.wait()


def end(workdir, how, fails):
  """Leaves in that way while a save, which takes a while, is in flight."""
  commit = commits.write_record

  def slow(*arguments):
    time.sleep(0.2)
    if fails:
      raise OSError(errno.ENOSPC, 'No space left on device')
    commit(*arguments)

  commits.write_record = slow
  with stop.Stop() as stopper, opened(workdir) as checkpoints:
    if how in ('SIGTERM', 'SIGINT'):
      os.kill(os.getpid(), getattr(signal, how))
      while not stopper.requested:
        time.sleep(0.001)
    checkpoints.save(1, small(1))
    if not committed(workdir):
      print('in flight', file=sys.stderr)
    if stopper.requested:
      sys.exit(stop.EXIT_CODE)
    if how.startswith('sys.exit'):
      sys.exit(int(how[-2]))
    if how == 'exception':
      raise ValueError('of the loop')
    if how == 'KeyboardInterrupt':
      raise KeyboardInterrupt


def hold(workdir, forks=False):
  with rundir.lock(workdir):
    if forks and os.fork() == 0:
      (workdir / 'forked').write_text(f'{os.getpid()}\n')
    print('held', file=sys.stderr, flush=True)
    time.sleep(60)


def serve():
  """Forks a child for each request; returns in the child, with its request."""
  for text in sys.stdin:
    request = json.loads(text)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
      signal.alarm(120)  # a test that waits for us ends
      return request
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
  return None


def main():
  request = serve()
  if request is None:
    return
  workdir = pathlib.Path(request.pop('workdir'))
  with open(workdir / 'said', 'w') as said:
    os.dup2(said.fileno(), 2)
    os.dup2(said.fileno(), 1)
  os.close(0)
  scenarios = {f.__name__: f for f in (loop, die, end, hold)}
  scenarios[request.pop('scenario')](workdir, **request)


if __name__ == '__main__':
  main()
