"""Optimizers by name, and the chain around them.

An optimizer is a function `(learning_rate, dims, **own)` that returns an optax
transformation; `learning_rate` is a schedule (tuner/schedules.py). The
trainable tree is flat: `{path: array}`; `dims` says each path's letters, such
as `{'blocks.attention.q': 'LDNH'}`. Layers stacked along L are treated one by
one: a stack of them is updated exactly as each of them alone would be. Weight
decay is decoupled and scaled by the learning rate in every optimizer here, and
moves matrices only.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tuner import named, schedules

Schedule = schedules.Schedule
Dtype = Literal['float32', 'bfloat16']


class Optimizer(NamedTuple):
  """The whole chain, the learning rate of a step, the resolved sections."""

  transform: optax.GradientTransformation
  learning_rate: Schedule
  resolved: dict[str, dict]


def make(
  optimizer: Mapping,
  schedule: Mapping,
  total_steps: int,
  dims: Mapping[str, str],
  matrix: Mapping[str, tuple[str, str]] | None = None,
  clip_norm: float | None = None,
  lr_ratio: float = 1.0,
) -> Optimizer:
  """Clip, then the optimizer that a section names, at its schedule's rate.

  Args:
    optimizer: section, `dict(name='adamw', ...)`.
    schedule: section, `dict(name='cosine', peak=1e-3, ...)`.
    total_steps: steps of the whole run, as configured: a schedule never
      depends on where a run was resumed.
    dims: letters of every path of the trainable tree.
    matrix: path -> (input letters, output letters), for Muon.
    clip_norm: largest global norm of the gradient, all of it in float32.
    lr_ratio: the learning rate of the paths that end in '.b' (an adapter's
      second matrix) is this many times the others'. LoRA+ (Hayou et al. 2024,
      arXiv:2402.12354) finds about 16 good where b starts at zero.
  """
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(f'clip_norm: {clip_norm}, wanted > 0, or None for no clip')
  if not lr_ratio > 0:
    raise ValueError(f'lr_ratio: {lr_ratio}, wanted > 0')
  rate = named.bind(
    schedule,
    schedules,
    where='config.schedule',
    takes=('total_steps',),
  )
  learning_rate = rate(total_steps)
  method = named.bind(
    optimizer,
    sys.modules[__name__],
    where='config.optimizer',
    takes=('learning_rate', 'dims'),
    matrix=matrix or {},
  )
  _check_ranges(method.resolved)
  chain = [method(learning_rate, dims)]
  if clip_norm is not None:
    chain.insert(0, clip(clip_norm))
  if lr_ratio != 1:
    chain.append(scale_by_path(lambda p: lr_ratio if p.endswith('.b') else 1))
  resolved = {'optimizer': method.resolved, 'schedule': rate.resolved}
  return Optimizer(optax.chain(*chain), learning_rate, resolved)


def _check_ranges(section: Mapping) -> None:
  """Raises ValueError for what no optimizer here can mean."""
  for key in ('b1', 'b2', 'momentum'):
    value = section.get(key)
    if value is not None and not 0 <= value < 1:
      raise ValueError(
        f'config.optimizer.{key}: {value}, wanted 0 <= {key} < 1'
      )
  for key in ('eps', 'weight_decay'):
    if section.get(key, 0) < 0:
      raise ValueError(f'config.optimizer.{key}: {section[key]}, wanted >= 0')


def global_norm(tree) -> jax.Array:
  """sqrt of the sum of all squares, in float32 whatever the tree's dtypes."""
  squares = [
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def clip(norm: float) -> optax.GradientTransformation:
  """g * min(1, norm / |g|), |g| the global norm in float32."""

  def update(updates, params):
    del params
    tiny = jnp.finfo(jnp.float32).tiny
    factor = jnp.minimum(1, norm / jnp.maximum(global_norm(updates), tiny))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

  return optax.stateless(update)


def scale_by_path(
  factor: Callable[[str], float],
) -> optax.GradientTransformation:
  """The updates of a flat tree, each times `factor(path)`."""

  def update(updates, params):
    del params
    return {path: u * factor(path) for path, u in updates.items()}

  return optax.stateless(update)


def decays(dims: str) -> bool:
  """Whether weight decay moves a parameter of these letters: matrices only.

  A matrix has an input and an output beside the axes along which it is stacked
  (L, and E where it leads). N, K, G and H together are one such side, so that
  a bias 'LNH' is a vector as a bias 'LF' is, and a scale 'D' is one. Adapter
  matrices ('LRD', 'LRNH') and embeddings ('VD') are matrices.
  """
  sides = re.sub('[NKGH]+', 'N', re.sub('^L?E?', '', dims))
  return len(sides) >= 2


# Optimizers.


def adamw(
  learning_rate: Schedule,
  dims: Mapping[str, str],
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mu_dtype: Dtype | None = None,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay.

  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;
  x -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay x).
  Loshchilov and Hutter 2019, arXiv:1711.05101. `mu_dtype` is the dtype of m.
  """
  direction = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
  return _descend(direction, learning_rate, dims, weight_decay)


def lion(
  learning_rate: Schedule,
  dims: Mapping[str, str],
  b1: float = 0.9,
  b2: float = 0.99,
  weight_decay: float = 0.0,
  mu_dtype: Dtype | None = None,
) -> optax.GradientTransformation:
  """Sign of an interpolated momentum; one moment.

  x -= lr (sign(b1 m + (1 - b1) g) + weight_decay x);  m = b2 m + (1 - b2) g.
  Chen et al. 2023, arXiv:2302.06675: a learning rate 3 to 10 times smaller
  than AdamW's, a weight decay as many times larger.
  """
  direction = optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype)
  return _descend(direction, learning_rate, dims, weight_decay)


def sgd(
  learning_rate: Schedule,
  dims: Mapping[str, str],
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 0.0,
  mu_dtype: Dtype | None = None,
) -> optax.GradientTransformation:
  """Stochastic gradient descent with momentum.

  m = momentum m + g;  x -= lr (m + weight_decay x). With Nesterov's look-ahead
  the step is momentum m + g instead of m (Sutskever et al. 2013). No state
  with momentum = 0.
  """
  direction = optax.identity()
  if momentum:
    direction = optax.trace(momentum, nesterov, accumulator_dtype=mu_dtype)
  return _descend(direction, learning_rate, dims, weight_decay)


def adafactor(
  learning_rate: Schedule,
  dims: Mapping[str, str],
  decay_rate: float = 0.8,
  clip_rms: float = 1.0,
  scale_by_rms: bool = True,
  min_factored: int = 128,
  weight_decay: float = 0.0,
  momentum: float | None = None,
  mu_dtype: Dtype = 'float32',
) -> optax.GradientTransformation:
  """Adam with a factored second moment: rows + columns numbers, not rows x.

  b = 1 - t^-decay_rate;  R, C = b (R, C) + (1 - b) (row, column means of g²);
  u = g / sqrt(R C / mean(R));  u /= max(1, rms(u) / clip_rms);
  x -= lr (max(1e-3, rms(x)) u + weight_decay x), without the rms(x) where
  `scale_by_rms` is False. Shazeer and Stern 2018, arXiv:1804.04235, algorithm
  4, where every rms is one layer's. The two largest dimensions of a parameter
  are factored, where both reach `min_factored`; others keep a full moment.
  """
  chain = [
    optax.scale_by_factored_rms(
      decay_rate=decay_rate, min_dim_size_to_factor=min_factored
    ),
    optax.clip_by_block_rms(clip_rms),
  ]
  if scale_by_rms:
    chain.append(optax.scale_by_param_block_rms())
  direction = _each_layer(optax.chain(*chain), dims)
  if momentum is not None:
    ema = optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype)
    direction = optax.chain(direction, ema)
  return _descend(direction, learning_rate, dims, weight_decay)


def muon(
  learning_rate: Schedule,
  dims: Mapping[str, str],
  matrix: Mapping[str, tuple[str, str]],
  momentum: float = 0.95,
  nesterov: bool = True,
  steps: int = 5,
  rms: float | None = 0.2,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mu_dtype: Dtype | None = None,
) -> optax.GradientTransformation:
  """Orthogonalised momentum for matrices, AdamW for everything else.

  M = momentum M + (1 - momentum) G;  O = U V' of M = U S V', by `steps`
  Newton-Schulz iterations;  W -= lr (s O + weight_decay W). Jordan et al. 2024.
  s = rms sqrt(max(inputs, outputs)) gives O the root mean square `rms`; 0.2
  is AdamW's, so that AdamW's learning rate serves (Liu et al. 2025,
  arXiv:2502.16982). rms = None: s = sqrt(max(1, outputs / inputs)), Jordan's.

  A path in `matrix` is one matrix a layer, its input letters against its
  output letters; letters in neither (L, E) are a stack of matrices. Paths that
  are not in it, and those with a V (embeddings and the head, as Jordan found
  better), take Adam with b1, b2, eps.

  Raises:
    ValueError: no path is left for Muon, or `matrix` names letters that `dims`
      has not.
  """
  axes = {
    path: _axes(path, letters, *matrix[path])
    for path, letters in dims.items()
    if path in matrix and 'V' not in letters
  }
  if not axes:
    raise ValueError('config.optimizer: muon: no trained parameter is a matrix')
  orthogonal = optax.chain(
    optax.contrib.scale_by_muon(
      ns_steps=steps,
      beta=momentum,
      mu_dtype=mu_dtype,
      nesterov=nesterov,
      weight_dimension_numbers=lambda tree: _like(axes, tree),
    ),
    _scale_by_shape(axes, rms),
  )
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
  labels = {p: 'muon' if p in axes else 'adam' for p in dims}
  direction = optax.partition({'muon': orthogonal, 'adam': adam}, labels)
  return _descend(direction, learning_rate, dims, weight_decay)


def _descend(direction, learning_rate, dims, weight_decay):
  """x -= learning_rate * (direction + weight_decay * x), matrices decayed."""
  chain = [direction]
  if weight_decay:
    mask = {path: decays(letters) for path, letters in dims.items()}
    chain.append(optax.add_decayed_weights(weight_decay, mask))
  return optax.chain(*chain, optax.scale_by_learning_rate(learning_rate))


def _each_layer(transform, dims) -> optax.GradientTransformation:
  """`transform` on each path alone, and on each layer of those with an L."""

  def mapped(function, path):
    return jax.vmap(function) if dims[path].startswith('L') else function

  def init(params):
    return {p: mapped(transform.init, p)(x) for p, x in params.items()}

  def update(updates, state, params):
    both = {
      p: mapped(transform.update, p)(u, state[p], params[p])
      for p, u in updates.items()
    }
    return {p: b[0] for p, b in both.items()}, {
      p: b[1] for p, b in both.items()
    }

  return optax.GradientTransformation(init, update)


def _axes(path: str, dims: str, inputs: str, outputs: str):
  """The axes of a parameter that are a matrix's inputs and its outputs."""
  both = inputs + outputs
  if not (inputs and outputs) or len(set(both)) < len(both):
    raise ValueError(f'{path}: {inputs!r} x {outputs!r} is no matrix')
  if not set(both) <= set(dims):
    raise ValueError(f'{path}: {dims!r} has not all letters of {both!r}')
  return optax.contrib.MuonDimensionNumbers(
    tuple(dims.index(c) for c in inputs), tuple(dims.index(c) for c in outputs)
  )


def _like(axes, tree) -> dict:
  """`axes` for the paths of `tree` that are not masked out of it."""
  return {p: axes.get(p, optax.MaskedNode()) for p in tree}


def _scale_by_shape(axes, rms: float | None) -> optax.GradientTransformation:
  def factor(path, shape):
    fan_in = math.prod(shape[axis] for axis in axes[path].reduction_axis)
    fan_out = math.prod(shape[axis] for axis in axes[path].output_axis)
    if rms is None:
      return max(1.0, fan_out / fan_in) ** 0.5
    return rms * max(fan_in, fan_out) ** 0.5

  def update(updates, params):
    del params
    return {
      p: u * factor(p, u.shape) if p in axes else u for p, u in updates.items()
    }

  return optax.stateless(update)
