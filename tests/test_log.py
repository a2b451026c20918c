"""The log: every step once, whatever was killed, and nothing but plain text."""

import fcntl
import io
import json
import math
import os
import pty
import resource
import struct
import sys
import termios
import threading
import types

import numpy as np
import pytest

from tuner import log, progress

METRICS = {
  'loss': 2.34119,
  'grad_norm': 0.5312,
  'learning_rate': 9.8e-4,
  'tokens': 1024,
  'target_tokens': 512,
  'tokens_per_second': 113.4,
  'target_tokens_per_second': 56.7,
}
JSONL = ('jsonl',)


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def run(workdir, first, last, resumed=None, **kwargs):
  stream = io.StringIO()
  with log.Log(
    workdir, JSONL, resumed=resumed, stream=stream, **kwargs
  ) as writer:
    for step in range(first, last + 1):
      writer.write(step, METRICS | {'loss': 1 / step})
      if step % 2 == 0:
        writer.write_eval(step, 'dev', 'loss', 1 / step, 10, 0.0, 1.0)
  return stream.getvalue()


def test_values(tmp_path):
  """Python, NumPy and 0-d arrays come back equal; NaN and inf as text."""
  values = {
    'a': 1,
    'b': np.float32(0.25),
    'c': np.array(3),
    'd': np.array([2.5]),
    'e': math.nan,
    'f': -math.inf,
    'g': True,
  }
  with log.Log(tmp_path, JSONL, stream=io.StringIO()) as writer:
    writer.write(1, values)
  [line] = lines(tmp_path)
  assert [line[k] for k in 'abcd'] == [1, 0.25, 3, 2.5]
  assert (line['e'], line['f'], line['g']) == ('nan', '-inf', True)
  assert math.isnan(float(line['e'])) and float(line['f']) == -math.inf


@pytest.mark.parametrize('value', [np.ones(3), [1.0], {'a': 1}, b'x'])
def test_what_is_no_number_is_named(tmp_path, value):
  with log.Log(tmp_path, JSONL, stream=io.StringIO()) as writer:
    with pytest.raises(ValueError, match="metric 'odd' is"):
      writer.write(1, {'odd': value})


def test_resumed_equals_uninterrupted(tmp_path):
  """Steps after the checkpoint are cut; every step is there exactly once."""
  run(tmp_path / 'whole', 1, 9)
  run(tmp_path / 'cut', 1, 7)
  assert lines(tmp_path / 'cut')[-1]['step'] == 7  # logged past step 4
  run(tmp_path / 'cut', 5, 9, resumed=4)
  assert lines(tmp_path / 'cut') == lines(tmp_path / 'whole')
  assert {p.name for p in (tmp_path / 'cut').iterdir()} == {'metrics.jsonl'}


def test_evaluating_again_at_the_resumed_step_writes_once(tmp_path):
  run(tmp_path, 1, 4)
  with log.Log(tmp_path, JSONL, resumed=4, stream=io.StringIO()) as writer:
    writer.write_eval(4, 'dev', 'loss', 0.25, 10, 0.0, 1.0)
    writer.write_eval(4, 'dev', 'exact', 0.5, 10, 0.2, 0.8)
  found = [(x['eval'], x['metric']) for x in lines(tmp_path) if 'eval' in x]
  assert found == [('dev', 'loss'), ('dev', 'loss'), ('dev', 'exact')]
  assert lines(tmp_path)[-1] == {
    'step': 4,
    'eval': 'dev',
    'metric': 'exact',
    'value': 0.5,
    'n': 10,
    'low': 0.2,
    'high': 0.8,
  }


def test_a_run_from_its_start_forgets_the_one_before(tmp_path):
  run(tmp_path, 1, 7)
  run(tmp_path, 1, 3)
  assert [x['step'] for x in lines(tmp_path) if 'eval' not in x] == [1, 2, 3]


def test_every_torn_end_is_dropped(tmp_path):
  """The file cut at each byte of its last line, as SIGKILL leaves it."""
  run(tmp_path, 1, 3)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  start = whole[:-1].rindex(b'\n') + 1
  for end in range(start + 1, len(whole)):
    path.write_bytes(whole[:end])
    run(tmp_path, 4, 4, resumed=3)
    steps = [x['step'] for x in lines(tmp_path) if 'eval' not in x]
    assert steps == [1, 2, 4], end
  path.write_bytes(whole + b'\x00' * 40)  # zeros: a power cut's torn end
  run(tmp_path, 4, 4, resumed=3)
  assert [x['step'] for x in lines(tmp_path) if 'eval' not in x] == [1, 2, 3, 4]


def test_the_same_step_twice_is_refused(tmp_path):
  with log.Log(tmp_path, JSONL, stream=io.StringIO()) as writer:
    writer.write(1, METRICS)
    with pytest.raises(AssertionError, match='step 1 logged twice'):
      writer.write(1, METRICS)


def test_each_line_is_on_disk_at_once(tmp_path):
  with log.Log(tmp_path, JSONL, stream=io.StringIO()) as writer:
    for step in (1, 2, 3):
      writer.write(step, METRICS)
      assert len(lines(tmp_path)) == step


def test_a_full_disk_is_named(tmp_path):
  """A real failure: the kernel refuses the file beyond 1000 bytes."""
  stream = io.StringIO()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  try:
    with pytest.raises(
      RuntimeError, match='cannot write to .*metrics.jsonl: F'
    ):
      with log.Log(tmp_path, JSONL, stream=stream) as writer:
        for step in range(1, 99):
          writer.write(step, METRICS)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  run(tmp_path, 5, 6, resumed=4)  # what was torn is dropped
  assert [x['step'] for x in lines(tmp_path)][:5] == [1, 2, 3, 4, 5]


def test_plain_lines_every_five_seconds_and_the_last(tmp_path):
  clock = iter(np.arange(0, 1000, 1.0))
  stream = io.StringIO()
  seconds = [0.0]
  with log.Log(
    tmp_path, JSONL, total_steps=20, stream=stream, now=lambda: seconds[0]
  ) as writer:
    for step in range(1, 14):
      seconds[0] = next(clock)
      writer.write(step, METRICS)
  shown = stream.getvalue().splitlines()
  assert [text.split()[1] for text in shown] == [
    '1/20',
    '6/20',
    '11/20',
    '13/20',
  ]
  assert shown[-1] == (
    'step 13/20 loss 2.341 lr 9.8e-04 grad 0.531 tok/s 113 (56.7 trained) '
    'eta 7s'
  )
  assert not any('\r' in text or '\x1b' in text for text in shown)


@pytest.mark.parametrize(
  'metrics, steps, eta_s',
  [
    (METRICS, 1000, 723),
    (METRICS | {'tokens_per_second': 45_678.9}, 100_000, 45_296),
    (
      METRICS
      | {'loss': 12.345678, 'grad_norm': 0.0012345, 'learning_rate': 1.2e-5},
      1_000_000,
      8_000_000,
    ),
  ],
)
def test_a_line_fits_80_columns_with_all_its_parts(metrics, steps, eta_s):
  text = progress.line_of(metrics | {'step': steps - 1}, steps, eta_s)
  assert len(text) < 80
  assert progress._duration(eta_s) in text
  for part in ('loss', 'lr', 'grad', 'tok/s', 'eta'):
    assert part in text


@pytest.mark.parametrize('value', ['nan', '-inf', -1.23456e30])
def test_absurd_numbers_fit_too(value):
  metrics = dict.fromkeys(METRICS, value) | {'tokens': 1, 'target_tokens': 1}
  text = progress.line_of(metrics | {'step': 10**9}, 10**9, 1e9)
  assert len(text) < 80


def terminal(columns):
  """A pseudo terminal and what is written to it, once its end is closed."""
  ours, theirs = pty.openpty()
  size = struct.pack('HHHH', 24, columns, 0, 0)
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
  shown = []

  def read():
    try:
      while data := os.read(ours, 65536):
        shown.append(data)
    except OSError:
      pass

  thread = threading.Thread(target=read)
  thread.start()
  stream = open(theirs, 'w')

  def finish():
    stream.close()
    thread.join()
    os.close(ours)
    return b''.join(shown).decode()

  return stream, finish


@pytest.mark.parametrize('columns, total', [(80, 30), (80, None), (40, 30)])
def test_a_terminal_gets_one_redrawn_line(tmp_path, columns, total):
  stream, finish = terminal(columns)
  with log.Log(tmp_path, JSONL, total_steps=total, stream=stream) as writer:
    for step in range(1, 31):
      writer.write(step, METRICS)
    writer.say('a \x1b[31mmessage')
  shown = finish()
  assert '\x1b[31m' not in shown and 'a [31mmessage' in shown
  redrawn = [text.strip('\n') for text in shown.split('\r')]
  redrawn = [text.replace('\x1b[A', '') for text in redrawn]
  assert max(map(len, redrawn)) <= columns
  assert any(text.startswith('step 30') for text in redrawn)
  assert shown.count('\n') <= 3


def test_shown_text_has_no_control_characters(tmp_path):
  stream = io.StringIO()
  evil = 'x\x1b]0;owned\x07\r\n\u202egnp\u2028\x9b31m\x00é'
  with log.Log(tmp_path, JSONL, stream=stream) as writer:
    writer.write(1, METRICS | {'note': evil})
    writer.write_eval(1, evil, evil, 0.5, 3, 0.1, 0.9)
    writer.say(evil)
  assert '\x1b' not in stream.getvalue() and '\u202e' not in stream.getvalue()
  assert all(c.isprintable() or c == '\n' for c in stream.getvalue())
  assert len(stream.getvalue().splitlines()) == 3
  assert 'xé' in progress.clean('x\x1b\x07é')
  raw = (tmp_path / 'metrics.jsonl').read_bytes()
  assert raw.isascii() and b'\x1b' not in raw and len(raw.splitlines()) == 2
  assert lines(tmp_path)[0]['note'] == evil


SAMPLE = ('q\x1b[31m\nsecond\u202e', '{"a": 1}', '<b>*x*</b>\n# h ' + 'y' * 99)


def test_samples_are_shown_and_are_no_metrics(tmp_path):
  stream = io.StringIO()
  with log.Log(tmp_path, JSONL, stream=stream) as writer:
    writer.write_samples(4, 'dev', [SAMPLE, ('p', 'r', 'o')])
  assert stream.getvalue().splitlines() == [
    'step 4 dev: q[31m second',
    '  wanted: {"a": 1}',
    '  got: <b>*x*</b> # h ' + 'y' * 53 + ' ...',
    'step 4 dev: p',
    '  wanted: r',
    '  got: o',
  ]
  assert max(map(len, stream.getvalue().splitlines())) == 79
  assert lines(tmp_path) == []


def events_of(workdir):
  """The events of all TensorBoard files below."""
  from tensorboardX.proto import event_pb2

  events = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:  # length, crc, event, crc
      (size,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return events


def test_tensorboard_shows_samples_as_they_are(tmp_path):
  """A block of code: every line of it is indented, so that none is Markdown."""
  pytest.importorskip('tensorboardX')
  with log.Log(tmp_path, ('tensorboard',), stream=io.StringIO()) as writer:
    writer.write_samples(4, 'dev', [SAMPLE])
  (value,) = [
    value
    for event in events_of(tmp_path)
    for value in event.summary.value
    if value.tag.startswith('dev/sample_0')
  ]
  text = value.tensor.string_val[0].decode()
  assert text.splitlines() == [
    '    prompt:', '    q[31m', '    second', '    ',
    '    wanted:', '    {"a": 1}', '    ',
    '    got:', '    <b>*x*</b>', '    # h ' + 'y' * 99, '    ',
  ]  # fmt: skip


def test_tensorboard_holds_the_scalars_and_hides_the_cut(tmp_path):
  pytest.importorskip('tensorboardX')
  writers = ('tensorboard',)
  with log.Log(tmp_path, writers, stream=io.StringIO()) as writer:
    for step in (1, 2, 3):
      writer.write(step, METRICS | {'text': 'no number', 'bad': math.nan})
    writer.write_eval(3, 'dev', 'exact', 0.5, 10, 0.2, 0.8)
  with log.Log(tmp_path, writers, resumed=2, stream=io.StringIO()) as writer:
    writer.write(3, METRICS)
  events = events_of(tmp_path)
  tags = {value.tag for event in events for value in event.summary.value}
  assert {'train/loss', 'train/bad', 'dev/exact'} <= tags
  assert not any('text' in tag or 'step' in tag for tag in tags)
  starts = [e.step for e in events if e.HasField('session_log')]
  assert 3 in starts  # TensorBoard drops what came before from step 3 on


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_optional_writers(tmp_path, monkeypatch, name):
  """The calls that both services document, on a stand-in for the module."""
  calls = []
  record = lambda method: lambda *a, **k: calls.append((method, a, k))
  fake = types.SimpleNamespace(
    init=record('init'), log=record('log'), finish=record('finish')
  )
  monkeypatch.setitem(sys.modules, name, fake)
  workdir = tmp_path / 'myrun'
  with log.Log(workdir, (name,), resumed=4, stream=io.StringIO()) as writer:
    writer.write(5, {'loss': 1.5, 'bad': math.inf, 'note': 'text'})
    writer.write_eval(5, 'dev', 'exact', 0.5, 10, 0.2, 0.8)
  assert [call[0] for call in calls] == ['init', 'log', 'log', 'finish']
  assert calls[0][2]['name'] == 'myrun' and calls[0][2]['resume'] == 'allow'
  assert calls[1][1:] == (({'loss': 1.5, 'bad': math.inf},), {'step': 5})
  assert calls[2][1][0]['dev/exact/value'] == 0.5


@pytest.mark.parametrize(
  'name, package',
  [
    ('wandb', 'tuner[wandb]'),
    ('trackio', 'tuner[trackio]'),
    ('tensorboard', 'tensorboardX'),
  ],
)
def test_a_missing_writer_says_what_to_install(
  tmp_path, monkeypatch, name, package
):
  module = 'tensorboardX' if name == 'tensorboard' else name
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError) as caught:
    log.Log(tmp_path, (name,), stream=io.StringIO())
  assert str(caught.value) == (
    f"log writer '{module}' is not installed: pip install '{package}', or "
    'leave it out of the config'
  )


def test_an_unknown_writer_is_refused(tmp_path):
  with pytest.raises(ValueError, match="log writer 'tb': there are jsonl, "):
    log.Log(tmp_path, ('tb',))


def test_other_processes_write_nothing(tmp_path):
  stream = io.StringIO()
  with log.Log(tmp_path, JSONL, process=1, stream=stream) as writer:
    writer.write(1, METRICS)
    writer.write_eval(1, 'dev', 'loss', 1.0, 1, 1.0, 1.0)
    writer.say('hello')
  assert stream.getvalue() == '' and not list(tmp_path.iterdir())


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
  canary = 'canary-7f3a9c'
  for name in ('HF_TOKEN', 'WANDB_API_KEY', 'OPENAI_API_KEY'):
    monkeypatch.setenv(name, canary)
  with log.Log(tmp_path, stream=io.StringIO()) as writer:
    writer.write(1, METRICS)
    writer.write_eval(1, 'dev', 'loss', 1.0, 1, 1.0, 1.0)
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert len(files) == 2
  assert not any(canary.encode() in path.read_bytes() for path in files)
