"""Schedules: their values where it matters, and their shape between."""

import jax
import numpy as np
import pytest

from tuner import schedules

NAMES = ('constant', 'cosine', 'linear', 'wsd')


def make(name, total_steps=100, **kwargs):
  kwargs = {'peak': 0.5, 'warmup_steps': 10, **kwargs}
  return getattr(schedules, name)(total_steps, **kwargs)


def values(schedule, steps=120):
  return np.asarray(schedule(np.arange(steps)))


@pytest.mark.parametrize('name', NAMES)
def test_warm_up_is_a_line_that_starts_above_zero(name):
  warm = values(make(name), 11)
  np.testing.assert_allclose(
    warm, 0.5 * np.minimum(1, np.arange(1, 12) / 10), rtol=1e-6
  )


@pytest.mark.parametrize('name', NAMES)
def test_without_warm_up_the_first_step_has_the_peak(name):
  assert float(make(name, warmup_steps=0)(0)) == 0.5


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd'])
@pytest.mark.parametrize('end', [0.0, 0.1, 1.0])
def test_ends_where_told_and_stays(name, end):
  rates = values(make(name, end=end))
  np.testing.assert_allclose(rates[100:], 0.5 * end, atol=1e-7)
  assert (np.diff(rates[10:]) <= 1e-7).all()
  assert (rates[:100] > 0).all()


def test_cosine_and_linear_are_half_way_down_in_the_middle():
  for name in ('cosine', 'linear'):
    rate = float(make(name, total_steps=110, end=0.2)(60))
    assert rate == pytest.approx(0.5 * 0.6, rel=1e-5)
  assert float(make('cosine', total_steps=110)(35)) == pytest.approx(
    0.5 * (1 + np.cos(np.pi / 4)) / 2, rel=1e-5
  )


def test_wsd_is_stable_then_falls():
  rates = values(make('wsd', decay=0.2))
  np.testing.assert_allclose(rates[10:81], 0.5, rtol=1e-6)
  np.testing.assert_allclose(
    rates[80:100], 0.5 * (1 - np.sqrt(np.arange(20) / 20)), atol=2e-4
  )
  assert rates[81] < 0.5


def test_constant_is_constant():
  assert (values(make('constant'))[10:] == 0.5).all()


@pytest.mark.parametrize('name', NAMES)
def test_traced_steps_give_the_same(name):
  schedule = make(name)
  traced = jax.jit(jax.vmap(schedule))(np.arange(120))
  np.testing.assert_allclose(traced, values(schedule), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(peak=0.0), r'config.schedule.peak: 0.0, wanted > 0'),
    (dict(peak=float('nan')), 'peak: nan'),
    (dict(end=1.5), 'end: 1.5'),
    (dict(warmup_steps=100), 'warmup_steps: 100, wanted .* < 100 steps'),
    (dict(warmup_steps=-1), 'warmup_steps: -1'),
    (dict(decay=0.0), 'decay: 0.0'),
  ],
)
def test_out_of_range_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make('wsd', **kwargs)
