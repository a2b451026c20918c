"""The config.json that goes with written weights, for old and new readers.

`transformers` 5 reads `rope_parameters` and `dtype`; version 4, vLLM and the
converter of llama.cpp read `rope_theta`, `rope_scaling`, `rope_local_base_freq`
and `torch_dtype`. Both are said, and say the same.
"""

from collections.abc import Mapping
from typing import Any

# Keys that stand in rope_parameters and, for older readers, beside it.
BESIDE = ('rope_theta', 'partial_rotary_factor')
DROPPED = ('quantization_config', 'auto_map')
UNWRITTEN = ('num_nextn_predict_layers', 'num_mtp_layers')  # Their numbers.
LAYERS = ('full_attention', 'sliding_attention')
# Families in which each of LAYERS has a rope, and the older key of the second's
# theta; rope_theta is the first's.
TYPED = {'gemma3_text': 'rope_local_base_freq', 'olmo3': 'rope_theta'}


def written_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """`config` as it is to be written beside weights of `dtype`.

  Without quantization_config, as weights are written plain, and without
  auto_map, whose code is not beside them. Layers that predict several tokens
  are not written either.
  """
  out = {k: v for k, v in config.items() if k not in DROPPED}
  out |= {k: 0 for k in UNWRITTEN if k in config}
  out['dtype'] = out['torch_dtype'] = dtype
  new = config.get('rope_parameters') or {}
  local = TYPED.get(config.get('model_type', ''))
  if local or any(isinstance(value, Mapping) for value in new.values()):
    return out | _typed(config, new, local)
  found = {**(config.get('rope_scaling') or {}), **new}
  return _with_rope(out, _flat(found, config))


def _flat(found: Mapping[str, Any], config: Mapping[str, Any]):
  """rope_parameters of all layers or of one type; None: nothing is said."""
  beside = {k: found.get(k, config.get(k)) for k in BESIDE}
  beside = {k: v for k, v in beside.items() if v is not None}
  if not found and not beside:
    return None
  rest = {k: v for k, v in found.items() if k not in (*BESIDE, 'type')}
  kind = found.get('rope_type') or found.get('type') or 'default'
  return {**rest, 'rope_type': kind, **beside}


def _with_rope(out: dict[str, Any], rope: dict[str, Any] | None):
  """The config with the keys that older readers look for, too."""
  out.pop('rope_scaling', None)
  if rope is None:
    return out
  out['rope_parameters'] = rope
  out.update({key: rope[key] for key in BESIDE if key in rope})
  if rope['rope_type'] != 'default':
    out['rope_scaling'] = {k: v for k, v in rope.items() if k not in BESIDE}
  return out


def _typed(config: Mapping[str, Any], new: Mapping[str, Any], local):
  """The rope keys where each type of layer has a rope of its own."""
  both = {kind: dict(own or {}) for kind, own in new.items()}
  old = config.get('rope_scaling') or {}
  theta = config.get(local) if local else None
  full = _flat({**old, **both.get(LAYERS[0], {})}, config)
  sliding = _flat(both.get(LAYERS[1], {}), {'rope_theta': theta})
  keys = {'rope_scaling': None} | _with_rope({}, full)
  for kind, own in zip(LAYERS, (full, sliding), strict=True):
    if own is not None:
      both[kind] = own
  if local and sliding and 'rope_theta' in sliding:
    theta = sliding['rope_theta']
    if keys.setdefault(local, theta) != theta:  # One key, and two to say.
      del keys[local]
  return keys | ({'rope_parameters': both} if both else {})
