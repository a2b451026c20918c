"""What trains, and how it joins the frozen weights.

`full`, `lora`, `dora` and `peft` return an adaptation: which weights stay
frozen, what the trainable tree holds (dims, where it starts) and how both make
a filled model. Both trees are flat, {path: array}. Frozen weights get no
gradient and no optimizer state.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tuner.adapters import base as base_lib
from tuner.adapters import low_rank, read, select
from tuner.models import linear, weights

Rows = Mapping[str, weights.Row]
Tree = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Full:
  """Every weight trains; nothing is frozen."""

  rows: Rows

  @property
  def dims(self) -> dict[str, str]:
    """The dims of each trainable array."""
    return {path: row.dims for path, row in self.rows.items()}

  @property
  def matrices(self) -> dict[str, tuple[str, str]]:
    """(inputs, outputs) letters of each trainable matrix."""
    rows = self.rows.items()
    return {p: (r.inputs, r.outputs) for p, r in rows if r.is_matrix}

  rate_scale = 1.0
  is_adapter = False

  @property
  def given(self) -> dict[str, Any]:
    """Values to start from beside the base's: none."""
    return {}

  @property
  def facts(self) -> dict[str, Any]:
    """What a resumed run must have in common beside the config: nothing."""
    return {}

  def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable array."""
    return {path: row.shape(sizes) for path, row in self.rows.items()}

  def split(self, base: Tree) -> tuple[Tree, Tree]:
    """(frozen, the weights that move into the trainable tree): none, all."""
    return {}, base

  def initial(
    self, sizes: Mapping[str, int], key: jax.Array, base: Tree | None = None
  ) -> Tree:
    """What the trainable tree holds beside the base's weights: nothing."""
    del sizes, key, base
    return {}

  def attach(self, frozen: Tree, trainable: Tree, key=None) -> dict[str, Any]:
    """The weights of the tuned model, by path."""
    del key
    return {**frozen, **trainable}

  def base(self, frozen: Tree) -> dict[str, Any]:
    """The weights of the untuned model. Raises: full fine-tuning moves them."""
    raise ValueError(
      'config.adapt: full fine-tuning keeps no untuned reference; use lora for '
      f'an objective that needs one ({len(frozen)} frozen weights).'
    )


Adaptation = Full | low_rank.LowRank


def full(rows: Rows) -> Full:
  """Every weight trains."""
  return Full(rows)


def lora(
  rows: Rows,
  rank: int = 16,
  alpha: float = 32.0,
  targets: str | Sequence[str] = 'all-linear',
  dropout: float = 0.0,
  scaling: str = 'lora',
  lr_ratio: float = 1.0,
  modules_to_save: Sequence[str] = (),
) -> low_rank.LowRank:
  """Low-rank adapters on chosen matrices (Hu et al. 2021).

  targets: 'all-linear' (every matrix of the blocks but experts and their
    router), names ('q', 'o_proj', 'experts', 'blocks.0.mlp.down') or letters
    of dims ('N': all that touch query heads); see adapters.select.
  scaling: 'lora' alpha / rank; 'rslora' alpha / sqrt(rank).
  lr_ratio: learning rate of b over that of a (LoRA+, Hayou et al. 2024).
  modules_to_save: what trains whole beside it ('embed_tokens', 'lm_head',
    'norm', 'input_layernorm'). Where the head is tied to the embedding, both
    names mean the one matrix, which stays tied.
  """
  _check_rates(dropout, lr_ratio)
  if rank < 1:
    raise ValueError(f'config.adapt.rank: {rank}; it must be at least 1.')
  if not alpha > 0:
    raise ValueError(f'config.adapt.alpha: {alpha}; it must be above 0.')
  if scaling not in low_rank.SCALINGS:
    allowed = ', '.join(low_rank.SCALINGS)
    raise ValueError(
      f'config.adapt.scaling: {scaling!r}; allowed are {allowed}.'
    )
  sizes = {}
  for path in select.targets(rows, targets):
    count = len(rows[path].layers) or 1
    sizes[path] = low_rank.Size((rank,) * count, (alpha,) * count)
  saved = select.saved(rows, modules_to_save)
  found = low_rank.LowRank(
    rows, sizes, dropout, lr_ratio, scaling=scaling, saved=saved
  )
  _check_parts(found)
  return found


def dora(
  rows: Rows,
  rank: int = 16,
  alpha: float = 32.0,
  targets: str | Sequence[str] = 'all-linear',
  dropout: float = 0.0,
  scaling: str = 'lora',
  lr_ratio: float = 1.0,
  modules_to_save: Sequence[str] = (),
) -> low_rank.LowRank:
  """Low-rank directions and trained magnitudes (DoRA, Liu et al. 2024).

  W' = m (W + s b a) / |W + s b a|, the length of what each output reads. m
  starts at |W|. Arguments are those of lora.
  """
  found = lora(
    rows, rank, alpha, targets, dropout, scaling, lr_ratio, modules_to_save
  )
  found = dataclasses.replace(found, kind='dora')
  _check_parts(found)
  return found


def peft(
  rows: Rows,
  path: str,
  sizes: Mapping[str, int],
  base: base_lib.Base,
  revision: str | None = None,
  dropout: float | None = None,
  lr_ratio: float = 1.0,
  trained_on: str | None = None,
) -> low_rank.LowRank:
  """Goes on from an adapter that `peft` wrote: LoRA, rsLoRA or DoRA.

  path: its directory or hub id, at `revision`.
  dropout: None: the one it was trained with.
  trained_on: what its config calls the base, if that is this base under
    another name.
  """
  _check_rates(dropout or 0.0, lr_ratio)
  found = read.adapter(rows, sizes, path, revision)
  base_lib.check(base, found.directory, found.settings, trained_on)
  dropout = found.settings.dropout if dropout is None else dropout
  made = low_rank.LowRank(
    rows,
    found.sizes,
    dropout,
    lr_ratio,
    found.settings.kind,
    found.settings.scaling,
    found.saved,
    found.values,
    {'adapter': found.sha256, 'dropout': dropout},
  )
  _check_parts(made)
  return made


def _check_rates(dropout: float, lr_ratio: float) -> None:
  if not lr_ratio > 0:
    raise ValueError(f'config.adapt.lr_ratio: {lr_ratio}; it must be above 0.')
  if not 0 <= dropout < 1:
    raise ValueError(f'config.adapt.dropout: {dropout}; it must be in [0, 1).')


def _check_parts(adaptation: low_rank.LowRank) -> None:
  """Raises ValueError for what cannot train so, or not be read by `peft`."""
  both = sorted(set(adaptation.targets) & set(adaptation.saved))
  if both:
    raise ValueError(
      f'config.adapt: {", ".join(both)} in targets and in modules_to_save; a '
      'matrix has an adapter or trains whole.'
    )
  rows = adaptation.rows
  experts = [path for path in adaptation.targets if 'E' in rows[path].lead]
  if experts and (adaptation.kind == 'dora' or adaptation.dropout):
    what = 'dora' if adaptation.kind == 'dora' else 'dropout'
    raise ValueError(
      f'config.adapt: {what} on experts ({", ".join(experts)}), which `peft` '
      'does not know; use lora without dropout for them.'
    )


def merge(declared: Rows, attached: Mapping[str, Any], path: str) -> jax.Array:
  """The plain array that the attached weight at `path` stands for."""
  return linear.merged(attached[path], declared[path])
