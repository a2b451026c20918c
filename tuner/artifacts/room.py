"""Whether devices have room for what was written beside what was trained."""

import math

import jax
import jax.numpy as jnp

from tuner import mesh as mesh_lib
from tuner.artifacts import trained as trained_lib

NOT_COMPARED = 'predictions were not compared: no room for a second model'


def lacking(trained: trained_lib.Trained) -> str:
  """Why a second model does not fit on the devices; '' if it may.

  Devices that do not say what they hold, as CPUs, have room until they fail.
  """
  needed = device_bytes(trained)
  for device in trained.mesh.local_devices:
    stats = device.memory_stats() or {}
    if 'bytes_limit' not in stats or 'bytes_in_use' not in stats:
      continue
    free = stats['bytes_limit'] - stats['bytes_in_use']
    if needed > free:
      return (
        f'it takes {needed / 1e9:.1f} GB of a device, {free / 1e9:.1f} GB are '
        'free'
      )
  return ''


def device_bytes(trained: trained_lib.Trained) -> int:
  """What one device holds of a model in the dtype of the computation."""
  sizes, total = trained.model.config.sizes, 0
  for row in trained.rows.values():
    shape = row.shape(sizes)
    place = mesh_lib.sharding(trained.mesh, row.dims, shape)
    total += math.prod(place.shard_shape(shape))
  return total * jnp.dtype(trained.config.model.dtype).itemsize


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether a device had no memory left."""
  return 'RESOURCE_EXHAUSTED' in str(error)
