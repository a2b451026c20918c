"""Names in a config -> the declared weights that they mean.

A name is a weight's own ('q'), its module's at Hugging Face ('q_proj'), the end
of either path ('attention.q', 'mlp.shared_expert.up_proj') or a whole path
('blocks.0.attention.q': of that body of layers alone; all others reach into
every body). A single capital is a letter of dims. 'experts' is all that is
stacked over E.
"""

from collections.abc import Mapping, Sequence

from tuner import named
from tuner.models import weights

Rows = Mapping[str, weights.Row]
ALL_LINEAR = 'all-linear'


def matrices(rows: Rows) -> Rows:
  """The matrices of the blocks, the experts' among them."""
  return {
    path: row
    for path, row in rows.items()
    if row.is_matrix and path.startswith('blocks.')
  }


def targets(rows: Rows, wanted: str | Sequence[str]) -> tuple[str, ...]:
  """The paths of matrices that `wanted` names, in the model's order.

  'all-linear' is every matrix of the blocks but experts and what routes to
  them: experts are parameters and no Linear in `transformers`, which `peft`
  does not reach by that name either. They are said by name.

  Raises ValueError for what names none.
  """
  linears = matrices(rows)
  if wanted == ALL_LINEAR:
    routers = set('EU')  # Experts, their router, the gate of a shared one.
    return tuple(p for p, row in linears.items() if not routers & set(row.dims))
  names = [wanted] if isinstance(wanted, str) else list(wanted)
  key = 'config.adapt.targets'
  return _chosen(linears, names, key, 'matrix of the blocks', wanted)


def saved(rows: Rows, modules: Sequence[str]) -> tuple[str, ...]:
  """The paths of weights that train whole, in the model's order.

  A module is whole: its bias comes with its matrix. Where the head is tied
  to the embedding, either name means that one matrix, in both places.

  Raises ValueError for what names none, and for experts.
  """
  if not modules:
    return ()
  is_tied = 'head' not in rows
  names = [
    'embed' if is_tied and name in ('lm_head', 'head') else name
    for name in modules
  ]
  key = 'config.adapt.modules_to_save'
  found = _chosen(rows, names, key, 'weight of the model', names)
  experts = [path for path in found if 'E' in rows[path].lead]
  if experts:
    raise ValueError(
      f'{key}: {", ".join(experts)}: experts cannot be saved whole; adapt them '
      'by config.adapt.targets.'
    )
  of = {module_of(rows[path]) for path in found}
  return tuple(path for path, row in rows.items() if module_of(row) in of)


def module_of(row: weights.Row) -> str:
  """Its module at Hugging Face: the name without '.weight' or '.bias'."""
  head, _, last = row.hf.rpartition('.')
  return head if last in ('weight', 'bias') else row.hf


def _chosen(rows, names, key, kind, wanted) -> tuple[str, ...]:
  chosen: set[str] = set()
  for name in names:
    found = {p for p, row in rows.items() if _matches(name, p, row)}
    if not found:
      raise ValueError(_names_nothing(name, rows, key, kind))
    chosen |= found
  if not chosen:
    raise ValueError(_names_nothing(wanted, rows, key, kind))
  return tuple(path for path in rows if path in chosen)


def _names_nothing(name, rows: Rows, key: str, kind: str) -> str:
  """What to say of a name that means nothing, with the nearest that does."""
  known = [n for p, row in rows.items() for n in _names(p, row)]
  hint = named.nearest(str(name), known) or '.'
  short = ', '.join(sorted({path.rpartition('.')[2] for path in rows}))
  return (
    f'{key}: {name!r} names no {kind}{hint} Names are {short}; letters are '
    'those of their dims.'
  )


def _matches(name: str, path: str, row: weights.Row) -> bool:
  if len(name) == 1 and name.isupper():
    return name in row.dims[len(row.lead) :]
  if name == 'experts':
    return 'E' in row.lead
  ends = (path, module_of(row).replace('.{E}', ''))
  return any(end == name or end.endswith(f'.{name}') for end in ends)


def _names(path: str, row: weights.Row) -> tuple[str, str, str]:
  """('q', 'q_proj', 'blocks.0.attention.q')."""
  return path.rpartition('.')[2], module_of(row).rpartition('.')[2], path
