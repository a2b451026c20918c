"""Training: the state, the jitted step, the loop.

The step adds loss_sum, weight and gradients over micro-batches in float32 and
divides once, so that 1 x 32 equals 32 x 1 (dropout aside: each micro-batch has
its own), packed equals unpacked, and one device equals eight.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tuner import optim

Tree = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that changes: steps done, the trainable tree, the optimizer's state."""

  step: jax.Array
  trainable: Tree
  optimizer: Any


def initial_state(trainable: Tree, transform) -> State:
  """The state before step 0. A pure function, to be jitted with shardings."""
  step = jnp.zeros((), jnp.int32)
  return State(step, trainable, transform.init(trainable))


def make_step(
  policies: Callable,
  objective: Callable,
  optimizer: optim.Optimizer,
  seed: int,
) -> Callable:
  """(state, frozen, batch [A, B, ...]) -> (state, metrics), to be jitted.

  policies(frozen, trainable, key) gives (policy, reference); the key is a
  function of seed, step and micro-batch. objective(policy, reference, batch)
  gives (loss_sum, weight, metrics), all sums. Metrics come back divided by the
  weight; `tokens` and `target_tokens` are counts.
  """

  def loss(trainable, frozen, batch, key):
    policy, reference = policies(frozen, trainable, key)
    loss_sum, weight, metrics = objective(policy, reference, batch)
    counts = {
      'tokens': (batch['segments'] > 0).sum(),
      'target_tokens': (batch['mask'] > 0).sum(),
    }
    return loss_sum, (jnp.asarray(weight), metrics, counts)

  def step(state, frozen, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def one(i, rows):
      value_and_grad = jax.value_and_grad(loss, has_aux=True)
      micro_key = jax.random.fold_in(key, i)
      return value_and_grad(state.trainable, frozen, rows, micro_key)

    (loss_sum, (weight, sums, counts)), grads = sum_over(one, batch)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, inner = optimizer.transform.update(
      grads, state.optimizer, state.trainable
    )
    # Gradients are float32 whatever the weights are; moments keep their dtype.
    inner = jax.tree.map(
      lambda new, old: new.astype(old.dtype), inner, state.optimizer
    )
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {
      'loss': loss_sum / weight,
      'grad_norm': optim.global_norm(grads),
      'learning_rate': optimizer.learning_rate(state.step),
      'weight': weight,
      **{name: value / weight for name, value in sums.items()},
      **counts,
    }
    return State(state.step + 1, trainable, inner), metrics

  return step


def sum_over(one: Callable, batch: Mapping[str, jax.Array]) -> Any:
  """The sum over i of one(i, micro-batch i); floats added in float32."""
  indexed = (jnp.arange(len(batch['tokens'])), batch)

  def wide(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if is_float else x

  def add(total, micro):
    return jax.tree.map(lambda t, x: t + wide(x), total, one(*micro)), None

  first = jax.tree.map(lambda x: x[0], indexed)
  if len(batch['tokens']) == 1:
    return jax.tree.map(wide, one(*first))
  shapes = jax.eval_shape(lambda: jax.tree.map(wide, one(*first)))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(add, zeros, indexed)[0]


def loop(
  state: State,
  step_once: Callable[[State, int], tuple[State, dict]],
  total_steps: int,
  report: Callable[[int, dict], None],
  due: Callable[[int], bool],
  pause: Callable[[int, State], None],
  is_stopping: Callable[[], bool],
) -> State:
  """Steps until total_steps or a stop; each step's metrics come one step late.

  Fetching them late keeps the device busy while the host logs. Before a pause
  (evaluate, save), and at the end, they are waited for: what is saved has been
  looked at.
  """
  late = None
  for step in range(int(state.step), total_steps):
    if is_stopping():
      break
    state, metrics = step_once(state, step)
    if late:
      report(*late)
    late = step + 1, metrics
    if due(step + 1):
      report(*late)
      late = None
      pause(step + 1, state)
  if late:
    report(*late)
  return state


class Meter:
  """Turns a step's device metrics into what is logged, and stops bad runs."""

  def __init__(self, ids_of: Callable[[int], list[int]]):
    self._ids_of = ids_of
    self._last_s = time.perf_counter()

  def restart(self) -> None:
    """Leaves what was done since the last step out of the next one's time."""
    self._last_s = time.perf_counter()

  def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> dict:
    """Numbers for the log. Raises RuntimeError for no target or no number."""
    values = {name: value.item() for name, value in metrics.items()}
    now_s = time.perf_counter()
    seconds, self._last_s = now_s - self._last_s, now_s
    if values.pop('weight') == 0:
      raise RuntimeError(
        f'step {step}: no trained token in the batch; examples '
        f'{self._ids_of(step - 1)[:20]}.'
      )
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(values[name]):
        cure = (
          'The last good checkpoint is kept; lower config.schedule.peak or look'
          if step > 1
          else 'Nothing has been trained yet; look at the base or'
        )
        raise RuntimeError(
          f'step {step}: {name} is {values[name]}; examples '
          f'{self._ids_of(step - 1)[:20]}. {cure} at these rows.'
        )
    values['seconds'] = seconds
    values['tokens_per_second'] = values['tokens'] / seconds
    values['target_tokens_per_second'] = values['target_tokens'] / seconds
    return values
