"""Weights that trained whole beside an adapter (`peft`'s modules_to_save).

Layers of a stack train together here, so that all of them must be there. A
tied head is the embedding: `peft` unties the two when it saves either, unless
it was told ensure_weight_tying, and one matrix cannot be both of what they
then are.
"""

from collections.abc import Mapping

import numpy as np

from tuner import named
from tuner.adapters import sites
from tuner.models import weights

Rows = Mapping[str, weights.Row]
Sizes = Mapping[str, int]
HEAD, EMBED = 'lm_head.weight', 'model.embed_tokens.weight'


def values(
  rows: Rows, sizes: Sizes, saved: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """(values by path, all that is wrong) of tensors by Hugging Face name."""
  places = {
    sites.in_memory(name): (path, index)
    for path, row in rows.items()
    for index, name in row.names(sizes).items()
  }
  layers: dict[str, dict[tuple, np.ndarray]] = {}
  saved, faults = _without_tied_head(rows, saved)
  for name, tensor in sorted(saved.items()):
    if name not in places:
      near = named.nearest(name, places) or ''
      faults.append(f'{name}: the model has no such weight{near}')
      continue
    path, index = places[name]
    wanted = rows[path].hf_shape(sizes)
    if tensor.shape != wanted:
      faults.append(f'{name}: shape {tensor.shape}; the model implies {wanted}')
      continue
    layers.setdefault(path, {})[index] = tensor
  found = {}
  for path, own in layers.items():
    found[path], missing = _stacked(rows[path], sizes, own)
    faults += [f'{name}: missing; other layers have it' for name in missing]
  return found, faults


def _without_tied_head(rows: Rows, saved: Mapping[str, np.ndarray]):
  """(saved without a head that is the embedding, what is wrong with it)."""
  kept = dict(saved)
  if 'head' in rows or not {HEAD, EMBED} & set(saved):
    return kept, []
  head, embed = kept.pop(HEAD, None), saved.get(EMBED)
  cure = 'to which the model ties it; train with ensure_weight_tying=True'
  if head is None:
    return kept, [f'{EMBED}: trained without lm_head, {cure}']
  if embed is None:
    return kept, [f'{HEAD}: trained without embed_tokens, {cure}']
  if not np.array_equal(head, embed):
    return kept, [f'{HEAD}: differs from embed_tokens, {cure}']
  return kept, []


def _stacked(row: weights.Row, sizes: Sizes, own: Mapping[tuple, np.ndarray]):
  """(the declared array, names of layers that are not there)."""
  letters = row.dims[len(row.stacked) :]
  order = [''.join(row.groups).index(d) for d in letters]
  value, missing = np.zeros(row.shape(sizes), np.float32), []
  apart = [sizes[d] for d in ''.join(row.groups)]
  for index, name in row.names(sizes).items():
    if index in own:
      value[index] = own[index].reshape(apart).transpose(order)
    else:
      missing.append(name)
  return value, missing
