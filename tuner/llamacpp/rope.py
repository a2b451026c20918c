"""Rotary embeddings: config.json's two spellings, and llama.cpp's metadata.

llama.cpp keeps llama3's scaling as a tensor of divisors, rope_freqs.weight, and
longrope's as two; the rest are metadata keys. The divisors of llama3 do not say
which parameters they came from, so on the way back those are found by trying
and taken only where they give the same divisors.
"""

import math
import typing

import numpy as np

from tuner.llamacpp import declaration, library

Config = dict[str, typing.Any]
FREQS = 'rope_freqs.weight'
LONG, SHORT = 'rope_factors_long.weight', 'rope_factors_short.weight'
EXTRA = (FREQS, LONG, SHORT)
LOCAL_THETA = 10000.0  # llama.cpp's, where a file does not say Gemma 3's.
TOP_THETA = 10000.0
# Kinds of scaling: what config.json must say of each, and what it may.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  'default': ((), ()),
  'linear': (('factor',), ()),
  'llama3': (
    (
      'factor',
      'low_freq_factor',
      'high_freq_factor',
      'original_max_position_embeddings',
    ),
    (),
  ),
  'yarn': (
    ('factor', 'original_max_position_embeddings'),
    ('beta_fast', 'beta_slow', 'attention_factor', 'truncate'),
  ),
  'longrope': (
    ('short_factor', 'long_factor', 'original_max_position_embeddings'),
    ('attention_factor', 'factor'),
  ),
}
YARN = {
  'factor': 'rope.scaling.factor',
  'original_max_position_embeddings': 'rope.scaling.original_context_length',
  'beta_fast': 'rope.scaling.yarn_beta_fast',
  'beta_slow': 'rope.scaling.yarn_beta_slow',
}
IGNORED = ('rope_type', 'type', 'rope_theta', 'partial_rotary_factor')


def short_float(value: typing.Any) -> float:
  """The shortest decimal that is this float32: 9.99999974e-06 -> 1e-05."""
  return float(str(np.float32(value)))


def of_config(config: Config) -> tuple[Config, float | None]:
  """(the rope of full attention, theta of windowed layers or None).

  The first holds rope_type, rope_theta and what its kind has. Raises ValueError
  where the two spellings disagree or a kind is not known.
  """
  new, old = (config.get(k) for k in ('rope_parameters', 'rope_scaling'))
  local = config.get('rope_local_base_freq')
  if new and 'full_attention' in new:
    inner = dict(new.get('sliding_attention') or {})
    if inner.get('rope_type', 'default') != 'default':
      raise ValueError(
        'config.json: rope_parameters.sliding_attention.rope_type: '
        f"{inner['rope_type']!r}; llama.cpp knows 'default'."
      )
    local, new = inner.get('rope_theta', local), new['full_attention']
  both = {**(old or {}), **(new or {})}
  if new and old and both != {**new, **old}:
    raise ValueError(
      f'config.json: rope_scaling is {old} and rope_parameters is {new}; they '
      'must agree.'
    )
  kind = both.get('rope_type', both.get('type', 'default'))
  kind = {'su': 'longrope'}.get(kind, kind)
  theta = both.get('rope_theta', config.get('rope_theta'))
  rope = {k: v for k, v in both.items() if k not in IGNORED and v is not None}
  if kind == 'longrope' and 'original_max_position_embeddings' not in rope:
    rope['original_max_position_embeddings'] = config.get(
      'original_max_position_embeddings'
    )
  _check(kind, rope)
  theta = TOP_THETA if theta is None else theta
  return {'rope_type': kind, 'rope_theta': float(theta), **rope}, local


def _check(kind: str, rope: Config) -> None:
  if kind not in KINDS:
    raise ValueError(
      f'config.json: rope type {kind!r}; GGUF can hold {", ".join(KINDS)}.'
    )
  required, optional = KINDS[kind]
  missing = [key for key in required if rope.get(key) is None]
  unknown = sorted(set(rope) - {*required, *optional})
  if kind == 'default':  # Some writers leave the original length there.
    unknown = [k for k in unknown if k != 'original_max_position_embeddings']
  if missing or unknown:
    raise ValueError(
      f'config.json: rope type {kind!r}: missing {library.quote(missing)}; '
      f'not known {library.quote(unknown)}.'
    )


def to_metadata(
  architecture: declaration.Architecture, config: Config
) -> tuple[Config, dict[str, np.ndarray]]:
  """(metadata without the architecture's name, extra tensors) of a config."""
  rope, local = of_config(config)
  kind, head_dim = rope['rope_type'], config['head_dim']
  dims = int(head_dim * _partial(config))
  if dims != head_dim and architecture.name != 'phi3':
    raise ValueError(
      f'config.json: partial_rotary_factor: {_partial(config)}; llama.cpp '
      f'turns all of a head in {architecture.name}.'
    )
  meta = {'rope.freq_base': rope['rope_theta'], 'rope.dimension_count': dims}
  tensors = {}
  if architecture.name == 'gemma3':
    meta['rope.freq_base_swa'] = float(LOCAL_THETA if local is None else local)
  if architecture.name == 'phi3':
    original = config.get('original_max_position_embeddings') or rope.get(
      'original_max_position_embeddings'
    )
    meta['rope.scaling.original_context_length'] = original or 4096
  if kind == 'linear':
    meta |= _scaled('linear', factor=float(rope['factor']))
  if kind == 'yarn':
    meta |= _yarn(architecture, rope)
  if kind == 'llama3':
    tensors[FREQS] = llama3_divisors(rope, head_dim)
  if kind == 'longrope':
    _only(architecture, kind, 'phi3')
    meta['rope.scaling.attn_factor'] = rope.get(
      'attention_factor'
    ) or _long_attention(config, rope)
    tensors[LONG] = np.asarray(rope['long_factor'], np.float32)
    tensors[SHORT] = np.asarray(rope['short_factor'], np.float32)
  return meta, tensors


def _scaled(kind: str, factor: float) -> Config:
  return {'rope.scaling.type': kind, 'rope.scaling.factor': factor}


def _only(architecture: declaration.Architecture, kind: str, name: str) -> None:
  if architecture.name != name:
    raise ValueError(
      f'rope type {kind!r} is known for {name}, not for {architecture.name}.'
    )


def _partial(config: Config) -> float:
  inner = (config.get('rope_parameters') or {}).get('partial_rotary_factor')
  given = inner if inner is not None else config.get('partial_rotary_factor')
  return 1.0 if given is None else float(given)


def _yarn(architecture: declaration.Architecture, rope: Config) -> Config:
  """Raises ValueError for what llama.cpp computes in one way only."""
  usual = 0.1 * math.log(rope['factor']) + 1
  given = rope.get('attention_factor', usual)
  if not math.isclose(given, usual, rel_tol=1e-6):
    raise ValueError(
      f'config.json: yarn with attention_factor: {given}; llama.cpp has '
      f'0.1 ln(factor) + 1 = {usual} built in.'
    )
  # llama.cpp rounds the corrected range. gpt-oss does not, yet is served so.
  if not rope.get('truncate', True) and architecture.name != 'gpt-oss':
    raise ValueError(
      'config.json: yarn with truncate: false; llama.cpp rounds.'
    )
  return {
    'rope.scaling.type': 'yarn',
    **{key: rope[k] for k, key in YARN.items() if k in rope},
  }


def _long_attention(config: Config, rope: Config) -> float:
  original = rope['original_max_position_embeddings']
  scale = config['max_position_embeddings'] / original
  if scale <= 1:
    return 1.0
  return math.sqrt(1 + math.log(scale) / math.log(original))


def llama3_divisors(rope: Config, head_dim: int) -> np.ndarray:
  """[H / 2] float32: by how much llama3 divides each frequency."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  wave = 2 * np.pi * rope['rope_theta'] ** exponents
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  original = rope['original_max_position_embeddings']
  smooth = (original / wave - low) / (high - low)
  between = 1 / ((1 - smooth) / rope['factor'] + smooth)
  divisors = np.where(wave > original / low, rope['factor'], between)
  return np.where(wave < original / high, 1.0, divisors).astype(np.float32)


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
  for power in [13, *range(10, 21)]:  # 8192, which all of Llama 3 have, first.
    rope = {
      'rope_type': 'llama3',
      'factor': short_float(divisors.max()),
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 2**power,
    }
    tried = llama3_divisors({**rope, 'rope_theta': theta}, head_dim)
    if tried.shape == divisors.shape and np.allclose(tried, divisors, 1e-4, 0):
      return rope
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
