"""Learning-rate schedules: `(total_steps, peak, **own)` -> the rate of a step.

Step 0 is the first, and its rate is peak / warmup_steps, not 0: no step is
spent on nothing. `peak` is reached at step warmup_steps - 1 and held at step
warmup_steps, where the rest of the schedule begins; `end` * peak would be the
rate of step total_steps, the first that is not run. A schedule depends on the
configured steps only, never on where a run was resumed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[Any], jax.Array]


def constant(total_steps: int, peak: float, warmup_steps: int = 0) -> Schedule:
  """`peak` after a linear warm-up."""
  return _schedule(total_steps, peak, warmup_steps, 1.0, lambda p: p * 0)


def linear(
  total_steps: int, peak: float, warmup_steps: int = 0, end: float = 0.0
) -> Schedule:
  """A straight line from `peak` to `end` * peak at `total_steps`."""
  return _schedule(total_steps, peak, warmup_steps, end, lambda p: p)


def cosine(
  total_steps: int, peak: float, warmup_steps: int = 0, end: float = 0.0
) -> Schedule:
  """Half a cosine from `peak` to `end` * peak at `total_steps`.

  Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
  """
  down = lambda p: (1 - jnp.cos(jnp.pi * p)) / 2
  return _schedule(total_steps, peak, warmup_steps, end, down)


def wsd(
  total_steps: int,
  peak: float,
  warmup_steps: int = 0,
  end: float = 0.0,
  decay: float = 0.2,
) -> Schedule:
  """Warm-up, stable, decay: `peak`, then a fall in the last `decay` of steps.

  The fall is 1 - sqrt(p), p the part of it that is done. Hägele et al. 2024,
  arXiv:2405.18392.
  """
  if not 0 < decay <= 1:
    raise ValueError(f'config.schedule.decay: {decay}, wanted 0 < decay <= 1')
  start = min(total_steps - 1, round((1 - decay) * total_steps))
  return _schedule(total_steps, peak, warmup_steps, end, jnp.sqrt, start)


def _schedule(total_steps, peak, warmup_steps, end, down, start=0) -> Schedule:
  """peak * (1 - (1 - end) * down(p)) after the warm-up.

  p goes from 0 at step `start`, or the end of the warm-up if that is later, to
  1 at step `total_steps`.
  """
  for key, value, wanted, is_right in [
    ('peak', peak, '> 0', peak > 0),
    ('end', end, '0 <= end <= 1, a part of peak', 0 <= end <= 1),
    (
      'warmup_steps',
      warmup_steps,
      f'0 <= warmup_steps < {total_steps} steps of the run',
      0 <= warmup_steps < total_steps,
    ),
  ]:
    if not is_right:
      raise ValueError(f'config.schedule.{key}: {value}, wanted {wanted}')

  start = max(start, warmup_steps)

  def learning_rate(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(1, (step + 1) / max(1, warmup_steps))
    after = (step - start) / (total_steps - start)
    fall = down(jnp.clip(after, 0, 1))
    return peak * warm * (1 - (1 - end) * fall)

  return learning_rate
