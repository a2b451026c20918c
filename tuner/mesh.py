"""The mesh and the one table from letters to mesh axes.

Parallelism is a mesh, never a second recipe: every array's sharding follows
from its dims. `data` and `fsdp` divide the batch; `fsdp` divides each weight
along D, `tensor` along its heads, mlp or vocabulary, `expert` along its
experts.
"""

import math
from collections.abc import Mapping

import jax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'expert', 'tensor')
RULES = {
  'B': ('data', 'fsdp'),
  'D': 'fsdp',
  'N': 'tensor',
  'K': 'tensor',
  'F': 'tensor',
  'V': 'tensor',
  'E': 'expert',
  'I': 'tensor',
  'J': 'tensor',
}
# Activations, and the embedding where it is looked up, keep D whole: their
# batch already uses the fsdp axis.
ACTIVATION_RULES = {'B': ('data', 'fsdp'), 'V': 'tensor'}


def make(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: int | None = None,
  expert: int = 1,
) -> jax.sharding.Mesh:
  """A mesh over the first `devices` devices, over all by default.

  One axis may be -1, "what is left". Raises ValueError when the sizes do not
  multiply to the number of devices.
  """
  there = jax.devices()
  count = len(there) if devices is None else devices
  if not 1 <= count <= len(there):
    raise ValueError(
      f'config.mesh.devices: {devices}; there are {len(there)} here.'
    )
  sizes = [data, fsdp, expert, tensor]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count or min(sizes) < 1:
    raise ValueError(
      f'config.mesh: data={data}, fsdp={fsdp}, expert={expert}, '
      f'tensor={tensor} does not multiply to {count} devices.'
    )
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=there[:count])


def spec(dims: str, rules: Mapping = RULES) -> P:
  """The partition of an array of these dims; unnamed letters replicate."""
  return P(*(rules.get(letter) for letter in dims))


def sharding(
  mesh: jax.sharding.Mesh, dims: str, shape: tuple[int, ...], name: str = ''
) -> NamedSharding:
  """The sharding of a weight; a dim that does not divide is replicated.

  Says so in one log line when `name` is given.
  """
  entries = []
  for letter, size in zip(dims, shape, strict=True):
    axes = RULES.get(letter)
    if size % parts(mesh, axes):
      if name:
        logging.warning(
          '%s: %s = %d does not divide by %s = %d; replicated.',
          name, letter, size, axes, parts(mesh, axes),
        )  # fmt: skip
      axes = None
    entries.append(axes)
  return NamedSharding(mesh, P(*entries))


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int) -> NamedSharding:
  """Of a batch [A, B, ...]: micro-batches whole, rows divided."""
  return NamedSharding(mesh, P(None, RULES['B'], *(None,) * (ndim - 2)))


def constrain(x: jax.Array, dims: str) -> jax.Array:
  """x held to its activation sharding in the mesh set by jax.set_mesh.

  Without a mesh, or where a dim does not divide, x as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rules = ACTIVATION_RULES
  if mesh.empty or any(
    size % parts(mesh, rules.get(letter))
    for letter, size in zip(dims, x.shape, strict=True)
  ):
    return x
  return jax.lax.with_sharding_constraint(x, spec(dims, rules))


def dividing(
  mesh: jax.sharding.AbstractMesh, letter: str, size: int
) -> tuple[str, ...]:
  """The mesh axes that divide a dim of this size; none where it is uneven."""
  axes = RULES[letter]
  names = (axes,) if isinstance(axes, str) else axes
  if mesh.empty or size % parts(mesh, names):
    return ()
  return tuple(name for name in names if mesh.shape[name] > 1)


def parts(mesh, axes) -> int:
  """How many parts the named mesh axes make."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)
