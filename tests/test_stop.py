"""Signals: the first is a request, the second is the end, at any moment."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tuner import stop

POLITE = """
import sys, time
from tuner import stop
with stop.Stop() as s:
  print('ready', flush=True)
  while not s.requested: time.sleep(.01)
  print('saved', flush=True)
sys.exit(stop.EXIT_CODE)
"""
# pbkdf2 is one call into C of over a minute that no signal interrupts.
DEAF = """
import hashlib
from tuner import stop
with stop.Stop():
  print('ready', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


def start(script):
  child = subprocess.Popen(
    [sys.executable, '-c', script],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert child.stdout.readline() == 'ready\n'
  return child


@pytest.mark.parametrize('number', stop.SIGNALS)
def test_first_signal_is_a_request(number):
  child = start(POLITE)
  child.send_signal(number)
  out, err = child.communicate(timeout=20)
  assert (child.returncode, out) == (75, 'saved\n')
  name = signal.Signals(number).name
  assert err == f'{name}: saving after this step; once more leaves at once\n'


@pytest.mark.parametrize(
  'number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_second_signal_leaves_while_the_main_thread_is_deaf(number, code):
  child = start(DEAF)
  child.send_signal(signal.SIGTERM)
  assert 'saving after this step' in child.stderr.readline()  # it fired
  sent = time.monotonic()
  child.send_signal(number)
  _, err = child.communicate(timeout=20)
  assert child.returncode == code
  assert time.monotonic() - sent < 5
  assert 'without saving' in err


def test_old_handlers_come_back():
  before = [signal.getsignal(number) for number in stop.SIGNALS]
  with stop.Stop() as s:
    assert [signal.getsignal(n) for n in stop.SIGNALS] != before
    assert not s.requested
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(500):
      if s.requested:
        break
      time.sleep(0.01)
    assert s.requested
  assert [signal.getsignal(number) for number in stop.SIGNALS] == before
  assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_no_request():
  seen = []
  old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
  try:
    with stop.Stop() as s:
      os.kill(os.getpid(), signal.SIGUSR1)
      time.sleep(0.2)
      assert seen and not s.requested
  finally:
    signal.signal(signal.SIGUSR1, old)


def test_only_in_the_main_thread():
  errors = []

  def enter():
    try:
      with stop.Stop():
        pass
    except RuntimeError as error:
      errors.append(str(error))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert errors == ['Stop must be entered in the main thread']
