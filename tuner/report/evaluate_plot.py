"""The task against forgetting, drawn: one inline SVG that runs nothing."""

import math
from collections.abc import Mapping, Sequence

from tuner.report import escape
from tuner.report import evaluate_parts as parts_lib

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 26, 46
# Classes of what a checkpoint is.
TONES = {'chosen': 'chosen', 'outside the bound': 'out', 'base': '', '': ''}
_TICKS = 6
_LABEL = 34  # columns and rows, in units, that a label keeps to itself
_LINE = 14


def curve(
  checkpoints: Sequence[Mapping],
  alphas: Sequence[Mapping],
  bound: float | None,
  metric: str,
) -> str:
  """Points of (nats_increase, value) with the bars of their intervals.

  What lies outside the bound is grey, what was chosen has a ring. Points
  without a number on both axes cannot be drawn; `undrawn` counts them. No
  points: no text.
  """
  series = [[p for p in side if _is_drawn(p)] for side in (checkpoints, alphas)]
  points = [p for side in series for p in side]
  if not points:
    return ''
  xs = [float(p['nats_increase']) for p in points] + [0.0]
  xs += [] if bound is None else [float(bound)]
  ys = [y for p in points for y in _span(p)]
  across, up = (
    _Axis(xs, _LEFT, _WIDTH - _RIGHT),
    _Axis(ys, _HEIGHT - _BOTTOM, _TOP),
  )
  labels = _Labels()
  drawn = [*_frame(across, up, metric), *_bound(across, bound)]
  drawn.append(_series(series[1], across, up, labels, 'alpha'))
  drawn.append(_series(series[0], across, up, labels, 'step'))
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="'
    f'{escape.html(metric)} against nats_increase">{"".join(drawn)}</svg>'
  )


def undrawn(points: Sequence[Mapping]) -> int:
  """How many points have no place in `curve`."""
  return sum(not _is_drawn(p) for p in points)


def _is_drawn(point):
  return _is_number(point.get('nats_increase')) and _is_number(point['value'])


def _is_number(value):
  return value is not None and math.isfinite(float(value))


def _span(point):
  """The value, and the ends of its interval where it has them."""
  ends = (point['value'], point.get('low'), point.get('high'))
  return [float(value) for value in ends if _is_number(value)]


class _Axis:
  """Numbers to places, with round ticks at and around all of them."""

  def __init__(self, values, start, end):
    low, high = min(values), max(values)
    step = _step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    self.ticks = [i * step for i in range(first, max(last, first + 1) + 1)]
    self.digits = max(0, -math.floor(math.log10(step) + 1e-9))
    self.start, self.end = start, end

  def at(self, value):
    share = (float(value) - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
    return round(self.start + share * (self.end - self.start), 1)


def _step(span):
  """1, 2 or 5 times a power of ten, at least a `_TICKS`th of the span."""
  rough = span / _TICKS
  power = 10.0 ** math.floor(math.log10(rough))
  return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


class _Labels:
  """Places that are taken, so that no label is drawn over another."""

  def __init__(self):
    self.taken = []

  def take(self, x, y, is_needed):
    free = all(abs(x - u) > _LABEL or abs(y - v) > _LINE for u, v in self.taken)
    if free or is_needed:
      self.taken.append((x, y))
    return free or is_needed


def _frame(across, up, metric):
  bottom = _HEIGHT - _BOTTOM
  for tick in up.ticks:
    y = up.at(tick)
    yield _line('grid', _LEFT, y, _WIDTH - _RIGHT, y)
    yield _text(_LEFT - 8, y + 4, f'{tick:.{up.digits}f}', 'end')
  for tick in across.ticks:
    x = across.at(tick)
    yield _line('axis', x, bottom, x, bottom + 4)
    sign = '+' if tick > 0 else ''
    yield _text(x, bottom + 18, f'{tick:{sign}.{across.digits}f}', 'middle')
  yield _line('axis', _LEFT, bottom, _WIDTH - _RIGHT, bottom)
  zero = across.at(0)
  yield _line('axis', zero, _TOP, zero, bottom)
  name = escape.cut(escape.visible(metric), 60)
  yield _text(8, 14, name, 'label')
  x = (_LEFT + _WIDTH - _RIGHT) / 2
  yield _text(x, _HEIGHT - 8, 'nats a token more on general text', 'middle')


def _bound(across, bound):
  if bound is None:
    return
  x, bottom = across.at(bound), _HEIGHT - _BOTTOM
  yield (
    f'<rect class="over" x="{x}" y="{_TOP}" '
    f'width="{round(_WIDTH - _RIGHT - x, 1)}" height="{bottom - _TOP}"/>'
  )
  yield _line('bound', x, _TOP, x, bottom)
  is_right = x > (_LEFT + _WIDTH) / 2
  said = f'bound {parts_lib.number(bound, True)}'
  yield _text(x, _TOP - 6, said, 'said ' + ('end' if is_right else 'start'))


def _series(points, across, up, labels, name):
  at = [(across.at(p['nats_increase']), up.at(p['value'])) for p in points]
  drawn = [f'<g class="{name}">']
  if len(at) > 1:
    path = 'M' + ' L'.join(f'{x} {y}' for x, y in at)
    drawn.append(f'<path class="path" d="{path}"/>')
  for i, (point, (x, y)) in enumerate(zip(points, at, strict=True)):
    drawn.append(_point(point, x, y, up, name))
    is_needed = bool(point.get('chosen')) or i in (0, len(at) - 1)
    # Steps are named above their points, alphas below.
    place = y + (18 if name == 'alpha' else -9)
    said = _named(point, name)
    if labels.take(x + 8, place, is_needed):
      tone = 'named label' if point.get('chosen') else 'named'
      drawn.append(_text(x + 8, place, said, tone))
  return ''.join([*drawn, '</g>'])


def _named(point, name):
  if name == 'alpha':
    return f'α {point["alpha"]:.3g}'
  return f'{point["step"]:,}' if point['step'] else 'base'


def _point(point, x, y, up, name):
  tip = (
    f'{name} {point[name]}: {parts_lib.plain(point)}, general nats '
    f'{parts_lib.number(point["nats_increase"], True)}'
  )
  title = f'<title>{escape.html(tip)}</title>'
  ends = [point.get('low'), point.get('high')]
  bar = ring = ''
  if all(map(_is_number, ends)):
    bar = _line('bar', x, up.at(ends[0]), x, up.at(ends[1]))
  if name == 'alpha':
    corner = f'x="{round(x - 4, 1)}" y="{round(y - 4, 1)}"'
    size = 'width="8" height="8"'
    return f'{bar}<rect class="point" {corner} {size}>{title}</rect>'
  tone = TONES[parts_lib.standing(point)]
  if tone == 'chosen':
    ring = f'<circle class="ring" cx="{x}" cy="{y}" r="8"/>'
  dot = f'<circle class="point" cx="{x}" cy="{y}" r="4">{title}</circle>'
  return f'<g class="at {tone}">{bar}{ring}{dot}</g>'


def _line(name, x1, y1, x2, y2):
  return f'<line class="{name}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x, y, said, name=''):
  given = f' class="{name}"' if name else ''
  return (
    f'<text x="{round(x, 1)}" y="{round(y, 1)}"{given}>'
    f'{escape.html(said)}</text>'
  )
