"""A first SIGTERM or SIGINT asks the loop to stop; a second one leaves at once.

Python runs its signal handlers between two bytecodes of the main thread, which
may sit inside a compilation for minutes. So the handlers do nothing: the
interpreter's C handler writes each signal's number into a pipe, and a thread
that reads the pipe acts on it, whatever the main thread is doing.
"""

import os
import signal
import sys
import threading

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again.
SIGNALS = signal.SIGTERM, signal.SIGINT


class Stop:
  """Turns SIGTERM and SIGINT into `requested`; a context manager.

  The loop looks at `requested` once a step, saves, and the program exits with
  `EXIT_CODE`. The second signal ends the process with 130 (SIGINT) or 143
  (SIGTERM) without saving. Leaving the block restores the old handlers.
  Raises RuntimeError outside the main thread, where there are no handlers.
  """

  def __init__(self):
    self._requested = threading.Event()

  @property
  def requested(self):
    """Whether a signal has come; never False again after True."""
    return self._requested.is_set()

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      raise RuntimeError('Stop must be entered in the main thread')
    read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._old = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
    self._thread = threading.Thread(
      name='signals', target=self._watch, args=(read,), daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      # None: set by C code, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._old_fd)
    os.close(self._write)  # ends the thread
    self._thread.join()

  def _watch(self, read):
    with open(read, 'rb', buffering=0) as pipe:
      while number := pipe.read(1):
        if number[0] in SIGNALS:
          self._act(number[0])

  def _act(self, number):
    name = signal.Signals(number).name
    if self.requested:
      _say(f'{name} again: leaving at once, without saving')
      os._exit(128 + number)
    self._requested.set()
    _say(f'{name}: saving after this step; once more leaves at once')


def _say(text):
  """Below a progress line; survives a stderr that is gone."""
  start = '\n' if sys.stderr is not None and sys.stderr.isatty() else ''
  try:
    os.write(2, f'{start}{text}\n'.encode())
  except OSError:
    pass
