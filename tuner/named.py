"""A config section -> the function that it names, its arguments bound.

A section is `dict(name='adamw', b2=0.95)`: `name` is a public function of the
module that the section stands for, or a dotted name such as
`my_package.module.function`, and the rest are keyword arguments of it. So the
signature is the schema: it holds the defaults, the annotations hold the types,
and a key that no signature has is refused here, before anything is loaded.
"""

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import pathlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MANY = 15  # parameters of which an error shows the names alone


@dataclasses.dataclass(frozen=True)
class Bound:
  """A function with its arguments bound, and what they resolved to.

  Attributes:
    function: the function itself.
    bound: keyword arguments that every call passes: the section's and the
      program's.
    resolved: the section with each default filled in, `name` first where the
      section had one. Program-given arguments are not in it.
  """

  function: Callable
  bound: dict[str, Any]
  resolved: dict[str, Any]

  def __call__(self, *args, **kwargs):
    return self.function(*args, **{**self.bound, **kwargs})


def bind(
  section: Mapping,
  module: types.ModuleType,
  /,
  *,
  where: str = 'config',
  takes: tuple[str, ...] = (),
  **given,
) -> Bound:
  """The function that `section` names, checked and bound.

  Args:
    section: a dict or ConfigDict with `name`.
    module: where an undotted name is looked up, among the public functions
      defined there, or in the modules of a package, whose leading parameters
      are `takes`.
    where: what the errors call the section, such as 'config.optimizer'.
    takes: names of the leading parameters, which the caller of the result
      passes by position: the contract of such functions.
    **given: offered by the program. A function is passed those that it names,
      and a section cannot set these.

  Raises:
    ValueError: no such function, or arguments that do not fit its signature.
  """
  values = _plain(section, where)
  if not isinstance(values.get('name'), str):
    raise ValueError(
      f'{where}.name: {values.get("name")!r}, wanted the name of a function, '
      f'one of {_listed(_public(module, takes))}'
    )
  name = values.pop('name')
  function = _find(name, module, takes, where)
  bound = fill(function, values, where=where, takes=takes, **given)
  resolved = {'name': name, **bound.resolved}
  return dataclasses.replace(bound, resolved=resolved)


def call(section, module, /, *args, where='config', takes=(), **given):
  """What the function that `section` names returns for `args`. See `bind`."""
  return bind(section, module, where=where, takes=takes, **given)(*args)


def fill(
  function: Callable,
  values: Mapping,
  /,
  *,
  where: str = 'config',
  takes: tuple[str, ...] = (),
  **given,
) -> Bound:
  """`function` with `values` as keyword arguments, checked. See `bind`.

  Raises:
    ValueError: a key that the signature lacks, a value of another type than
      its annotation, or a parameter without default that nothing sets.
  """
  params = inspect.signature(function).parameters
  given = {k: v for k, v in given.items() if k in params}
  free = _settable(params, takes, given)
  shown = _shown(function, free)
  takes_any = any(p.kind is p.VAR_KEYWORD for p in params.values())
  hints = _hints(function)
  resolved = {k: p.default for k, p in free.items() if p.default is not p.empty}
  for key, value in _plain(values, where).items():
    if key in given or (key in params and key not in free):
      raise ValueError(f'{where}: {key!r} is set by the program. {shown}')
    if key not in free and not takes_any:
      hint = nearest(key, free)
      raise ValueError(f'{where}: unknown key {key!r}{hint or "."} {shown}')
    try:
      resolved[key] = _fit(value, hints.get(key, Any))
    except _MisfitError:
      wrong = _misfit(value, hints[key], shown)
      raise ValueError(f'{where}.{key}: {wrong}') from None
  missing = [k for k in free if k not in resolved]
  if missing:
    raise ValueError(f'{where}: missing {_listed(missing)}. {shown}')
  return Bound(function, {**resolved, **given}, resolved)


def pairs(value: str | Mapping[str, str] | None, where: str) -> dict[str, str]:
  """{'a': 'x', 'b': 'y'} of that, or of 'a=x,b=y'. Raises ValueError."""
  if not isinstance(value, str):
    return dict(value or {})
  found = [pair.split('=') for pair in value.split(',')]
  if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in found):
    raise ValueError(f"{where}: {value!r}, wanted pairs like 'a=x,b=y'")
  return {key.strip(): named.strip() for key, named in found}


def nearest(word: str, choices: Iterable[str]) -> str:
  """'; did you mean ...?' for the choice nearest to `word`, or ''."""
  found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
  return f'; did you mean {found[0]!r}?' if found else ''


def existing_path(value: str, key: str) -> pathlib.Path:
  """`value` with `~` expanded, which exists.

  Raises:
    ValueError: it does not; names `key`, the first part of the path that is
      not there, and the nearest name beside it.
  """
  if not isinstance(value, str | pathlib.Path) or not str(value):
    raise ValueError(f'{key}: {value!r}, wanted the path of a file')
  path = pathlib.Path(value).expanduser()
  if path.exists():
    return path
  gone = path
  while not (gone.parent.exists() or gone.parent == gone):
    gone = gone.parent
  if not gone.parent.is_dir():
    raise ValueError(f'{key}: {str(path)!r}: {str(gone.parent)!r} is a file')
  beside = (entry.name for entry in gone.parent.iterdir())
  hint = nearest(gone.name, beside)
  raise ValueError(
    f'{key}: {str(path)!r} is not there: no {gone.name!r} in '
    f'{str(gone.parent.resolve())!r}{hint}'
  )


def _plain(section, where: str) -> dict:
  """A copy of a dict or ConfigDict as a dict."""
  if hasattr(section, 'to_dict'):  # a ConfigDict, nested ones with it
    return section.to_dict()
  if not isinstance(section, Mapping):
    raise ValueError(f"{where}: {section!r}, wanted dict(name='...', ...)")
  return dict(section)


def _public(
  module: types.ModuleType, takes: tuple[str, ...]
) -> dict[str, Callable]:
  """Functions defined in `module` that begin with `takes`, by name.

  Of a package: those of its modules.
  """
  inside = pkgutil.iter_modules(getattr(module, '__path__', ()))
  names = [f'{module.__name__}.{info.name}' for info in inside]
  found = {
    name: value
    for part in [module, *map(importlib.import_module, names)]
    for name, value in vars(part).items()
    if inspect.isfunction(value)
    and value.__module__ == part.__name__
    and not name.startswith('_')
    and tuple(inspect.signature(value).parameters)[: len(takes)] == takes
  }
  return dict(sorted(found.items()))


def _find(name: str, module, takes: tuple[str, ...], where: str) -> Callable:
  if '.' in name:
    return _imported(name, takes, where)
  public = _public(module, takes)
  if name not in public:
    raise ValueError(
      f'{where}.name: unknown function {name!r}'
      f'{nearest(name, public) or "."} {module.__name__} has {_listed(public)}'
    )
  return public[name]


def _imported(name: str, takes: tuple[str, ...], where: str) -> Callable:
  """The function of a dotted name; its leading parameters may be renamed."""
  path, _, attribute = name.rpartition('.')
  try:
    module = importlib.import_module(path)
  except (ImportError, ValueError) as e:  # ValueError: '..name'
    raise ValueError(
      f'{where}.name: {name!r}: cannot import {path!r}: {e}'
    ) from e
  function = getattr(module, attribute, None)
  if not callable(function):
    raise ValueError(
      f'{where}.name: {path!r} has no function {attribute!r}'
      f'{nearest(attribute, vars(module))}'
    )
  by_position = [
    p
    for p in inspect.signature(function).parameters.values()
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  if len(by_position) < len(takes):
    raise ValueError(
      f'{where}.name: {name!r} takes {inspect.signature(function)}, wanted '
      f'({", ".join(takes)}, ...)'
    )
  return function


def _settable(params, takes, given) -> dict[str, inspect.Parameter]:
  """The parameters left for a section after `takes` and `given`."""
  rest = list(params.items())[len(takes) :]
  return {
    k: p
    for k, p in rest
    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and k not in given
  }


def _shown(function: Callable, free: Mapping[str, inspect.Parameter]) -> str:
  name = getattr(function, '__name__', repr(function))
  is_long = len(free) > MANY
  shown = free if is_long else (str(p) for p in free.values())
  return f'{name}({", ".join(shown)})'


def _listed(names: Iterable[str]) -> str:
  return ', '.join(names) or 'nothing'


def _hints(function: Callable) -> dict[str, Any]:
  """Annotations by parameter, or else the types of plain defaults.

  No annotations at all where one of them does not evaluate.
  """
  plain = {
    k: type(p.default)
    for k, p in inspect.signature(function).parameters.items()
    if p.annotation is p.empty and type(p.default) in (bool, int, float, str)
  }
  try:
    return {**plain, **typing.get_type_hints(function)}
  except (NameError, TypeError, AttributeError):
    return plain


def _misfit(value, annotation, shown: str) -> str:
  """What a value is and what is wanted; of names, the nearest."""
  choices, are_many = _choices(annotation)
  kind = type(value).__name__
  if not choices:
    wanted = inspect.formatannotation(annotation)
    return f'{value!r} ({kind}), wanted {wanted}. {shown}'
  listed = _listed(map(str, choices))
  if are_many:
    if not isinstance(value, list | tuple):
      return f'{value!r} ({kind}), wanted a list of some of {listed}.'
    value = next(item for item in value if item not in choices)
  hint = nearest(value, map(str, choices)) if isinstance(value, str) else ''
  return f'{value!r}, wanted one of {listed}{hint or "."}'


def _choices(annotation) -> tuple[tuple[Any, ...], bool]:
  """(all values that it allows, whether it is of lists of them).

  () where they cannot be listed.
  """
  origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is typing.Literal:
    return inner, False
  if annotation in (None, type(None)):
    return (None,), False
  if origin in (types.UnionType, typing.Union):
    found = [_choices(member) for member in inner]
    if all(choices and not are_many for choices, are_many in found):
      return tuple(c for choices, _ in found for c in choices), False
  if origin in (list, tuple, collections.abc.Sequence):
    if inner and (origin is not tuple or inner[1:] == (...,)):
      return _choices(inner[0])[0], True
  return (), False


class _MisfitError(Exception):
  """A value is not of the annotated type."""


def _fit(value, annotation):
  """`value` as the annotation says it: 1 -> 1.0, [1] -> (1,).

  Annotations that are not built of plain types, unions, Literal and containers
  accept every value. Raises _MisfitError.
  """
  origin = typing.get_origin(annotation)
  arguments = typing.get_args(annotation)
  if origin in (types.UnionType, typing.Union):
    return _fit_union(value, arguments)
  if origin is typing.Literal:
    return _require(value, any(value is a or value == a for a in arguments))
  if annotation is None or annotation is type(None):
    return _require(value, value is None)
  kind = origin or annotation
  if kind in (list, tuple, collections.abc.Sequence):
    return _fit_sequence(value, kind, arguments)
  if kind is float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(_require(value, is_number))
  if kind is int:
    return _require(value, type(value) is int)
  if kind is collections.abc.Callable:
    return _require(value, callable(value))
  if kind in (str, bool, dict, Mapping):
    return _require(value, isinstance(value, kind))
  return value


def _fit_union(value, members):
  """The member that keeps the value's own type, else the first that fits."""
  fitted = []
  for member in members:
    try:
      fitted.append(_fit(value, member))
    except _MisfitError:
      continue
  _require(value, bool(fitted))
  return next((v for v in fitted if type(v) is type(value)), fitted[0])


def _fit_sequence(value, kind, arguments):
  _require(value, isinstance(value, list | tuple))
  wanted = [Any] * len(value)
  if kind is not tuple or arguments[1:] == (...,):
    wanted = list(arguments[:1] or [Any]) * len(value)
  elif arguments:
    _require(value, len(arguments) == len(value))
    wanted = list(arguments)
  items = [_fit(v, a) for v, a in zip(value, wanted, strict=True)]
  return list(items) if kind is list else tuple(items)


def _require(value, is_right: bool):
  if not is_right:
    raise _MisfitError
  return value
