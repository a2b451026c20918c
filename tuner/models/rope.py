"""Rotary positions (Su et al. 2021) and the ways they stretch to long texts.

`Rope` says one rotary embedding, `tables` and `rotate` apply it, `read` and
`read_types` find it in a config.json.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What each kind reads of its dict in config.json: (required, optional).
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  'default': ((), ()),
  'linear': (('factor',), ()),
  'dynamic': (('factor',), ()),
  'yarn': (
    ('factor',),
    ('attention_factor', 'beta_fast', 'beta_slow', 'truncate')
    + ('mscale', 'mscale_all_dim'),
  ),
  'longrope': (('short_factor', 'long_factor'), ('factor', 'attention_factor')),
  'llama3': (('factor', 'low_freq_factor', 'high_freq_factor'), ()),
}
# These alone read how long the texts of pre-training were; `transformers`
# ignores the key in the others.
WITH_ORIGINAL = ('yarn', 'longrope', 'llama3')
# May stand beside the dict as well as in it.
BESIDE = (
  'rope_theta',
  'partial_rotary_factor',
  'original_max_position_embeddings',
)


@dataclasses.dataclass(frozen=True)
class Rope:
  """One rotary embedding.

  size: the channels of a head that turn, its first ones; an even number.
  kind: 'default'; 'linear': positions divided by factor; 'dynamic' (NTK): the
    base grows once a text is longer than `original`; 'yarn' (Peng et al. 2023)
    and 'llama3' (Llama 3.1): long waves stretched, short ones kept; 'longrope'
    (Ding et al. 2024): each wave stretched by its own factor, `long` in texts
    longer than `original`, else `short`.
  original: the context, in tokens, that the model was pre-trained with.
  low, high: where the ramp between stretched and kept waves begins and ends,
    in turns within `original`.
  truncate: whether yarn's ramp begins and ends at whole channels.
  scale: what cosines and sines are multiplied by.
  """

  size: int
  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  original: int = 0
  low: float = 1.0
  high: float = 4.0
  truncate: bool = True
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()
  scale: float = 1.0


def tables(
  rope: Rope, positions_BT: jax.Array, lengths_B: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """(cos_BTH, sin_BTH) in float32, H = rope.size / 2 pairs of channels.

  lengths_B: how long the text of each row is, or may become, where positions
    do not say it: while it is written. By default each text of a packed row
    ends where positions restart.
  """
  frequency = jnp.asarray(_frequencies(rope), jnp.float32)
  if rope.kind in ('dynamic', 'longrope'):
    lengths_BT = _lengths(positions_BT) if lengths_B is None else lengths_B
    frequency = _by_length(rope, lengths_BT.reshape(len(positions_BT), -1))
  angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency
  return rope.scale * jnp.cos(angle_BTH), rope.scale * jnp.sin(angle_BTH)


def _lengths(positions_BT: jax.Array) -> jax.Array:
  """The length of the text that each token is of."""
  index_T = jnp.arange(positions_BT.shape[1])
  goes_on = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
  goes_on_BT = jnp.pad(goes_on, ((0, 0), (0, 1)))
  ends_BT = jnp.where(goes_on_BT, len(index_T), index_T)
  end_BT = jax.lax.cummin(ends_BT, axis=1, reverse=True)
  return positions_BT + end_BT - index_T + 1


def _by_length(rope: Rope, lengths_BT: jax.Array) -> jax.Array:
  """frequency_BTH of the kinds that depend on the text's length."""
  size = rope.size
  if rope.kind == 'longrope':
    short_H, long_H = (
      jnp.asarray(_frequencies(rope) / np.asarray(factors), jnp.float32)
      for factors in (rope.short, rope.long)
    )
    return jnp.where(lengths_BT[..., None] > rope.original, long_H, short_H)
  longest_BT = jnp.maximum(lengths_BT, rope.original)
  stretch_BT = rope.factor * longest_BT / rope.original - (rope.factor - 1)
  theta_BT = rope.theta * stretch_BT ** (size / (size - 2))
  return theta_BT[..., None] ** -(jnp.arange(0, size, 2) / size)


def _frequencies(rope: Rope) -> np.ndarray:
  """Radians a position for each pair of channels, in float64."""
  frequency_H = rope.theta ** -(np.arange(0, rope.size, 2) / rope.size)
  if rope.kind == 'linear':
    return frequency_H / rope.factor
  if rope.kind not in ('llama3', 'yarn'):
    return frequency_H
  if rope.kind == 'llama3':
    turns_H = rope.original * frequency_H / (2 * math.pi)
    ramp_H = np.clip((turns_H - rope.low) / (rope.high - rope.low), 0.0, 1.0)
  else:
    ramp_H = 1 - _yarn_ramp(rope)
  return frequency_H * (ramp_H + (1 - ramp_H) / rope.factor)


def _yarn_ramp(rope: Rope) -> np.ndarray:
  """0 for the pairs of channels that are kept, 1 for the stretched ones.

  Linear in the channel, where llama3's is linear in the turns.
  """

  def channel(turns):
    """The pair of channels that turns so often within the original context."""
    wave = rope.original / (turns * 2 * math.pi)
    return rope.size * math.log(wave) / (2 * math.log(rope.theta))

  first, last = channel(rope.high), channel(rope.low)
  if rope.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, rope.size - 1)
  span = last - first if last != first else 0.001
  return np.clip((np.arange(rope.size // 2) - first) / span, 0.0, 1.0)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """x with channel pairs (i, i + size/2) turned by their position's angle.

  Channels after the first `size` stay as they are.
  """
  cos, sin = (table[:, :, None, :] for table in tables)
  size = 2 * cos.shape[-1]
  turning, rest = x_BTNH[..., :size], x_BTNH[..., size:]
  first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  out = jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
  return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out


def read(
  config: Mapping[str, Any],
  size: int,
  theta: float = 10000.0,
  partial: bool = False,
) -> Rope:
  """The rotary embedding of a config.json, for `size` channels of a head.

  From `rope_parameters` (newer files) or `rope_scaling` (older ones), which
  may both be there if they agree. theta: the family's, where none is said.
  partial: whether the family reads partial_rotary_factor, the share of the
    channels that turn.

  Raises ValueError for a kind or a key that is not known and where two places
  disagree: some reader of that directory is wrong.
  """
  found = _dict(config)
  kind = found.pop('rope_type', 'default')
  if kind not in KINDS:
    raise ValueError(
      f'config.json: rope type {kind!r} is not supported; supported: '
      f'{", ".join(KINDS)}.'
    )
  required, optional = KINDS[kind]
  missing = [key for key in required if key not in found]
  unknown = set(found) - {*required, *optional, *BESIDE}
  if missing or unknown:
    said = [f'{", ".join(missing)} missing'] if missing else []
    said += [f'{", ".join(sorted(unknown))} not known'] if unknown else []
    raise ValueError(f'config.json: rope of type {kind!r}: {"; ".join(said)}.')
  beside = {key: _agreed(config, found, key) for key in BESIDE}
  share = float(beside['partial_rotary_factor'] or 1.0)
  if share != 1.0 and not partial:
    raise ValueError(
      f'config.json: partial_rotary_factor: {share:g}; this family knows 1.'
    )
  longest = config['max_position_embeddings']
  original = beside['original_max_position_embeddings']
  original = (original if kind in WITH_ORIGINAL else None) or longest
  size = int(size * share)
  return Rope(
    size,
    theta=float(beside['rope_theta'] or theta),
    kind=kind,
    original=original,
    **_own(kind, found, original, longest, size),
  )


def read_types(
  config: Mapping[str, Any],
  size: int,
  old: Mapping[str, str],
  thetas: Mapping[str, float],
) -> dict[str, Rope]:
  """The rotary embedding of each type of layer of a config.json.

  From `rope_parameters`, one dict a type, or in older files from `rope_theta`
  and such keys; the older rope_scaling is of 'full_attention' alone.
  old: each type's older key of its theta; thetas: where neither is said.
  """
  new = config.get('rope_parameters') or {}
  if unknown := sorted(set(new) - set(thetas)):
    raise ValueError(
      f'config.json: rope_parameters holds {", ".join(unknown)}; for this '
      f'family it holds a dict for each of {", ".join(thetas)}.'
    )
  found = {}
  for kind, theta in thetas.items():
    own = {**config, 'rope_parameters': new.get(kind)}
    own['rope_theta'] = config.get(old[kind])
    if kind != 'full_attention':
      own['rope_scaling'] = None
    found[kind] = read(own, size, theta)
  return found


def _dict(config) -> dict[str, Any]:
  """What the config's dicts say of the rope, without nulls."""
  both = []
  for key in ('rope_parameters', 'rope_scaling'):
    given = {k: v for k, v in (config.get(key) or {}).items() if v is not None}
    old = given.pop('type', None)
    if old:
      given.setdefault('rope_type', old)
    both.append(given)
  new, old = both
  own = [{k: v for k, v in x.items() if k not in BESIDE} for x in both]
  shared = {k for k in BESIDE if k in new and k in old and new[k] != old[k]}
  if new and old and (own[0] != own[1] or shared):
    raise ValueError(
      f'config.json: rope_scaling is {config["rope_scaling"]} and '
      f'rope_parameters is {config["rope_parameters"]}; they must agree.'
    )
  return {**old, **new}


def _agreed(config, found, key):
  """A key that may stand in the dict, beside it, or in both."""
  beside, inside = config.get(key), found.get(key)
  if beside is not None and inside is not None and beside != inside:
    raise ValueError(
      f'config.json: {key} is {beside} and rope_parameters.{key} is {inside}; '
      'they must agree.'
    )
  return inside if beside is None else beside


def _own(kind, found, original, longest, size) -> dict[str, Any]:
  """The fields of a Rope that only some kinds have."""
  ratio = longest / original if kind in ('yarn', 'longrope') else 1.0
  factor = float(found.get('factor') or ratio)
  scale = found.get('attention_factor')
  if kind == 'llama3':
    low, high = found['low_freq_factor'], found['high_freq_factor']
    return {'factor': factor, 'low': float(low), 'high': float(high)}
  if kind == 'yarn':
    return {
      'factor': factor,
      'low': float(found.get('beta_slow') or 1.0),
      'high': float(found.get('beta_fast') or 32.0),
      'truncate': bool(found.get('truncate', True)),
      'scale': _yarn_scale(found, factor) if scale is None else float(scale),
    }
  if kind == 'longrope':
    if scale is None:
      grown = math.log(max(factor, 1.0)) / math.log(original)
      scale = math.sqrt(1 + grown)
    waves = {}
    for name in ('short', 'long'):
      waves[name] = tuple(float(f) for f in found[f'{name}_factor'])
      if len(waves[name]) != size // 2:
        raise ValueError(
          f'config.json: {name}_factor has {len(waves[name])} numbers; '
          f'{size} channels turn, so it must have {size // 2}.'
        )
    return {'factor': factor, 'scale': float(scale), **waves}
  return {'factor': factor}


def _yarn_scale(found, factor) -> float:
  def grown(by):
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

  scales = (found.get('mscale'), found.get('mscale_all_dim'))
  if all(scales):
    return grown(scales[0]) / grown(scales[1])
  return grown(1.0)
