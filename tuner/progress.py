"""How far a run is: one redrawn line on a terminal, else a line now and then.

What is shown may come from a model or a data set, so it is stripped of control
characters.
"""

import math
import unicodedata

import tqdm

PLAIN_INTERVAL_S = 5.0


def start(stream, total_steps, now):
  """Terminal or Lines, as the stream is: write(line), say(text), close()."""
  kind = Terminal if stream.isatty() else Lines
  return kind(stream, total_steps, now)


def line_of(line, total_steps=None, eta_s=None):
  """Step, loss, lr, gradient norm, tokens a second (trained) and time left.

  At most 79 columns: it sheds words where numbers are long. Keys that a run
  does not have are left out.
  """
  of = '' if total_steps is None else f'/{total_steps}'
  step = f'{line["step"]}{of}'
  parts = [
    f'{name} {number(line[key], digits)}'
    for name, key, digits in (
      ('loss', 'loss', 4),
      ('lr', 'learning_rate', 2),
      ('grad', 'grad_norm', 3),
    )
    if key in line
  ]
  if 'tokens_per_second' in line:
    parts.append(f'tok/s {_count(line["tokens_per_second"])}')
    trained = line.get('target_tokens_per_second')
    if trained is not None:
      parts.append(f'({_count(trained)} trained)')
  if eta_s is not None:
    parts.append(f'eta {_duration(eta_s)}')
  text = clean(' '.join([f'step {step}', *parts]))
  if len(text) > 79:
    text = clean(' '.join([step, *parts])).replace(' trained)', ')')
  return text[:79]


def clean(text):
  """`text` on one line without control, bidi and other invisible characters."""
  return ''.join(
    ' '
    if c in '\n\t'
    else ''
    if unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Co', 'Zl', 'Zp')
    else c
    for c in str(text)
  )


class Terminal:
  """One line that is redrawn, at most ten times a second."""

  def __init__(self, stream, total_steps, now):
    self._clock = _Clock(total_steps, now)
    self._stream = stream
    self._bar = tqdm.tqdm(
      total=total_steps,
      file=stream,
      bar_format='{desc} {bar}',
      dynamic_ncols=True,
      leave=True,
    )
    self._bar.set_description_str('compiling')

  def write(self, line):
    eta_s = self._clock.eta_s(line['step'])
    text = line_of(line, self._clock.total_steps, eta_s)
    self._bar.set_description_str(text, refresh=False)
    self._bar.update(line['step'] - self._bar.n)

  def say(self, text):
    self._bar.write(text, file=self._stream)

  def close(self):
    self._bar.refresh()
    self._bar.close()


class Lines:
  """Plain lines: the first, one every 5 s, and the last."""

  def __init__(self, stream, total_steps, now):
    self._clock = _Clock(total_steps, now)
    self._now = now
    self._stream = stream
    self._shown = -math.inf
    self._waiting = None

  def write(self, line):
    eta_s = self._clock.eta_s(line['step'])
    self._waiting = line_of(line, self._clock.total_steps, eta_s)
    if self._now() - self._shown >= PLAIN_INTERVAL_S:
      self._show()

  def _show(self):
    self.say(self._waiting)
    self._waiting = None
    self._shown = self._now()

  def say(self, text):
    print(text, file=self._stream, flush=True)

  def close(self):
    if self._waiting is not None:
      self._show()


class _Clock:
  """The time left, judged by the steps after the first, which compiles."""

  def __init__(self, total_steps, now):
    self.total_steps = total_steps
    self._now = now
    self._first = None

  def eta_s(self, step):
    if self._first is None:
      self._first = step, self._now()
    first, start = self._first
    if self.total_steps is None or step <= first:
      return None
    seconds = (self._now() - start) / (step - first)
    return max(0, self.total_steps - step) * seconds


def number(value, digits=4):
  """That many significant digits, or 1.2e-05 where it is shorter."""
  value = float(value)
  if value == 0 or 1e-3 <= abs(value) < 10**digits or not math.isfinite(value):
    return f'{value:.{digits}g}'
  return f'{value:.1e}'


def _count(value):
  """Three digits and a unit: 987, 1.23k, 45.6M."""
  value = float(value)
  for unit in ('', 'k', 'M', 'G'):
    if not abs(value) >= 999.5:
      return f'{value:.3g}{unit}'
    value /= 1000
  return f'{value:.3g}T'


def _duration(seconds):
  """12s, 5m03s, 7h09m, 3d04h."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  days, h = divmod(hours, 24)
  if days:
    return f'{days}d{h:02}h'
  if hours:
    return f'{h}h{m:02}m'
  return f'{m}m{s:02}s' if m else f'{s}s'
