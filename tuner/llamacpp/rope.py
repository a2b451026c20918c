"""Rotary embeddings: as declared, and as llama.cpp's metadata has them.

llama.cpp keeps llama3's scaling as a tensor of divisors, rope_freqs.weight, and
longrope's as two; the rest are metadata keys. The divisors of llama3 do not say
which parameters they came from, so on the way back those are found by trying
and taken only where they give the same divisors.
"""

import math
import typing

import numpy as np

from tuner.llamacpp import declaration, library
from tuner.models import rope as rope_lib

Config = dict[str, typing.Any]
Ropes = typing.Sequence[rope_lib.Rope]
FREQS = 'rope_freqs.weight'
LONG, SHORT = 'rope_factors_long.weight', 'rope_factors_short.weight'
EXTRA = (FREQS, LONG, SHORT)
LOCAL_THETA = 10000.0  # llama.cpp's, where a file does not say Gemma 3's.
TOP_THETA = 10000.0
KINDS = ('default', 'linear', 'llama3', 'yarn', 'longrope')
YARN = {
  'factor': 'rope.scaling.factor',
  'original_max_position_embeddings': 'rope.scaling.original_context_length',
  'beta_fast': 'rope.scaling.yarn_beta_fast',
  'beta_slow': 'rope.scaling.yarn_beta_slow',
}


def short_float(value: typing.Any) -> float:
  """The shortest decimal that is this float32: 9.99999974e-06 -> 1e-05."""
  return float(str(np.float32(value)))


def to_metadata(
  architecture: declaration.Architecture, config: Config, ropes: Ropes
) -> Config:
  """Metadata without the architecture's name.

  config: a `config.normal` one; ropes: those that it declares, of layers
  without a window first. Raises ValueError for what GGUF cannot say.
  """
  rope = ropes[0]
  _check(architecture, config, ropes)
  meta = {'rope.freq_base': rope.theta, 'rope.dimension_count': rope.size}
  if architecture.name == 'gemma3':
    meta['rope.freq_base_swa'] = ropes[1].theta
  if architecture.name == 'phi3':
    usual = config.get('original_max_position_embeddings') or 4096
    is_long = rope.kind == 'longrope'
    original = rope.original if is_long else usual
    meta['rope.scaling.original_context_length'] = original
  if rope.kind == 'linear':
    meta |= _scaled('linear', rope.factor)
  if rope.kind == 'yarn':
    meta |= _yarn(architecture, rope)
  if rope.kind == 'longrope':
    meta['rope.scaling.attn_factor'] = rope.scale
  return meta


def to_tensors(rope: rope_lib.Rope) -> dict[str, np.ndarray]:
  """What llama.cpp has as tensors of a rope that `to_metadata` knows."""
  if rope.kind == 'llama3':
    return {FREQS: llama3_divisors(rope)}
  if rope.kind == 'longrope':
    waves = {LONG: rope.long, SHORT: rope.short}
    return {name: np.asarray(x, np.float32) for name, x in waves.items()}
  return {}


def _check(
  architecture: declaration.Architecture, config: Config, ropes: Ropes
) -> None:
  rope = ropes[0]
  if rope.kind not in KINDS:
    raise ValueError(
      f'config.json: rope type {rope.kind!r}; GGUF can hold {", ".join(KINDS)}.'
    )
  if odd := [other.kind for other in ropes[1:] if other.kind != 'default']:
    raise ValueError(
      'config.json: rope_parameters.sliding_attention.rope_type: '
      f"{odd[0]!r}; llama.cpp knows 'default'."
    )
  if rope.kind == 'longrope':
    _only(architecture, rope.kind, 'phi3')
  if rope.size != config['head_dim'] and architecture.name != 'phi3':
    raise ValueError(
      f'config.json: {rope.size} of the {config["head_dim"]} channels of a '
      f'head turn; llama.cpp turns all in {architecture.name}.'
    )


def _scaled(kind: str, factor: float) -> Config:
  return {'rope.scaling.type': kind, 'rope.scaling.factor': factor}


def _only(architecture: declaration.Architecture, kind: str, name: str) -> None:
  if architecture.name != name:
    raise ValueError(
      f'rope type {kind!r} is known for {name}, not for {architecture.name}.'
    )


def _yarn(
  architecture: declaration.Architecture, rope: rope_lib.Rope
) -> Config:
  """Raises ValueError for what llama.cpp computes in one way only."""
  usual = 0.1 * math.log(rope.factor) + 1
  if not math.isclose(rope.scale, usual, rel_tol=1e-6):
    raise ValueError(
      f'config.json: yarn with attention_factor: {rope.scale}; llama.cpp has '
      f'0.1 ln(factor) + 1 = {usual} built in.'
    )
  # llama.cpp rounds the corrected range. gpt-oss does not, yet is served so.
  if not rope.truncate and architecture.name != 'gpt-oss':
    raise ValueError(
      'config.json: yarn with truncate: false; llama.cpp rounds.'
    )
  return {
    **_scaled('yarn', rope.factor),
    YARN['original_max_position_embeddings']: rope.original,
    YARN['beta_fast']: rope.high,
    YARN['beta_slow']: rope.low,
  }


def _long_attention(config: Config, rope: Config) -> float:
  original = rope['original_max_position_embeddings']
  scale = config['max_position_embeddings'] / original
  if scale <= 1:
    return 1.0
  return math.sqrt(1 + math.log(scale) / math.log(original))


def llama3_divisors(rope: rope_lib.Rope) -> np.ndarray:
  """[H / 2] float32: by how much llama3 divides each frequency."""
  exponents = np.arange(0, rope.size, 2, dtype=np.float64) / rope.size
  wave = 2 * np.pi * rope.theta**exponents
  smooth = (rope.original / wave - rope.low) / (rope.high - rope.low)
  between = 1 / ((1 - smooth) / rope.factor + smooth)
  is_long = wave > rope.original / rope.low
  divisors = np.where(is_long, rope.factor, between)
  is_short = wave < rope.original / rope.high
  return np.where(is_short, 1.0, divisors).astype(np.float32)


def of_metadata(
  architecture: declaration.Architecture,
  meta: Config,
  config: Config,
  tensors: dict[str, np.ndarray],
) -> Config:
  """config.json's keys; takes what it reads out of `meta` and `tensors`.

  Both `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
  (5) are given: a reader that misses its own takes a theta of 10000.
  """
  default = 1e6 if architecture.name == 'gemma3' else TOP_THETA
  theta = short_float(meta.pop('rope.freq_base', default))
  scaling = _scaling(architecture, meta, config, tensors, theta)
  found: Config = {'rope_theta': theta, 'rope_scaling': scaling or None}
  full = {'rope_type': 'default', 'rope_theta': theta, **scaling}
  found['rope_parameters'] = full
  dims = meta.pop('rope.dimension_count', config['head_dim'])
  if architecture.name == 'phi3':
    partial = dims / config['head_dim']
    found['partial_rotary_factor'] = full['partial_rotary_factor'] = partial
  elif dims != config['head_dim']:
    raise ValueError(
      f'rope.dimension_count is {dims}, heads have {config["head_dim"]} dims; '
      'a part of a head is not turned here.'
    )
  if architecture.name == 'gemma3':
    local = short_float(meta.pop('rope.freq_base_swa', LOCAL_THETA))
    found['rope_local_base_freq'] = local
    found['rope_parameters'] = {
      'full_attention': full,
      'sliding_attention': {'rope_type': 'default', 'rope_theta': local},
    }
  return found


def _scaling(architecture, meta, config, tensors, theta) -> Config:
  """{} or the rope's type and what it has."""
  linear = meta.pop('rope.scale_linear', 0)
  kind = meta.pop('rope.scaling.type', 'linear')
  if LONG in tensors or SHORT in tensors:
    return _longrope(architecture, meta, config, tensors)
  if architecture.name == 'phi3':
    meta.pop('rope.scaling.attn_factor', None)
    config['original_max_position_embeddings'] = meta.pop(
      'rope.scaling.original_context_length', 4096
    )
  if kind == 'yarn':
    found = {
      k: short_float(meta.pop(key)) if 'beta' in k else meta.pop(key)
      for k, key in YARN.items()
      if key in meta
    }
    found['factor'] = short_float(found['factor'])
    if architecture.name == 'gpt-oss':
      found['truncate'] = False
    return {'rope_type': 'yarn', **found}
  if kind not in ('linear', 'none'):
    raise ValueError(f'rope.scaling.type {kind!r} is not known.')
  factor = short_float(meta.pop('rope.scaling.factor', linear) or 1)
  if FREQS in tensors:
    return _llama3(tensors.pop(FREQS), theta, config['head_dim'])
  if factor == 1 or kind == 'none':
    return {}
  return {'rope_type': 'linear', 'factor': factor}


def _llama3(divisors: np.ndarray, theta: float, head_dim: int) -> Config:
  if (divisors == 1).all():
    return {}
  factor = short_float(divisors.max())
  for power in [13, *range(10, 21)]:  # 8192, which all of Llama 3 have, first.
    rope = rope_lib.Rope(head_dim, theta, 'llama3', factor, 2**power)
    tried = llama3_divisors(rope)
    if tried.shape == divisors.shape and np.allclose(tried, divisors, 1e-4, 0):
      return {
        'rope_type': rope.kind,
        'factor': rope.factor,
        'low_freq_factor': rope.low,
        'high_freq_factor': rope.high,
        'original_max_position_embeddings': rope.original,
      }
  raise ValueError(
    f'{FREQS} holds divisors that are not those of llama3 scaling with '
    'low_freq_factor 1, high_freq_factor 4 and an original length of 2**10 to '
    '2**20.'
  )


def _longrope(architecture, meta, config, tensors) -> Config:
  _only(architecture, 'longrope', 'phi3')
  missing = [name for name in (LONG, SHORT) if name not in tensors]
  if missing:
    raise ValueError(f'{library.quote(missing)} missing.')
  original = meta.pop('rope.scaling.original_context_length')
  config['original_max_position_embeddings'] = original
  rope = {
    'rope_type': 'longrope',
    'short_factor': [short_float(x) for x in tensors.pop(SHORT)],
    'long_factor': [short_float(x) for x in tensors.pop(LONG)],
    'original_max_position_embeddings': original,
  }
  usual = _long_attention(config, rope)
  given = meta.pop('rope.scaling.attn_factor', usual)
  if not math.isclose(given, usual, rel_tol=1e-6):
    rope['attention_factor'] = short_float(given)
  return rope
