"""Function calls, judged by the rules of the Berkeley leaderboard.

Patil et al. 2025, "The Berkeley Function Calling Leaderboard", section 3.2:
calls are compared as syntax trees with the values that are accepted. Values
inside of objects are compared one level deep, and calls are matched greedily in
the order of the reference, as its checker does.
"""

import re
from typing import Any

from tuner.data import rows
from tuner.evals.metrics import calls, declare

_KINDS: dict[str, type] = {
  'string': str,
  'any': str,
  'integer': int,
  'number': float,
  'float': float,
  'boolean': bool,
  'array': list,
  'tuple': list,
  'object': dict,
  'dict': dict,
}
_LEFT_OUT = re.compile(r'[ ,./\-_*^]')
OMITTED = ''  # among the accepted values: the argument may be left out


@declare.metric('content')
def function_call(
  prediction: str, reference: str, row: rows.Row, accepted: str = 'accepted'
) -> float:
  """1 where the prediction's calls are those that the row accepts.

  They are as many, in any order. Each has the name, every required argument, no
  argument that is not accepted, and of each a value of the declared type that
  is among the accepted ones. Strings are equal without case, blanks and
  ,./-_*^; an int is a float where a float is wanted. An argument may be left
  out where '' is accepted. Where the row has no call, 1 if there is none.

  accepted: the column (of config.data.carry) with [{name: {argument: [value,
  ...]}}]; a row without it accepts the tool_calls of its last message alone.

  Raises:
    ValueError: the reference's own calls are not accepted, or cannot be read
      out of its text; or the row has no such tool.
  """
  wanted = row.carried.get(accepted)
  if wanted is None:
    wanted = _own_calls(row)
  if not _are_calls(wanted):
    raise ValueError(
      f'column {accepted!r}: {str(wanted)[:80]}; wanted a list of '
      '{name: {argument: [accepted value, ...]}}'
    )
  tools = _tools(row)
  for name in (name for call in wanted for name in call):
    if name not in tools:
      raise ValueError(f'no tool {name!r}; the row has {", ".join(tools)}')
  if prediction != reference and not _is_right(
    calls.read(reference), wanted, tools
  ):
    raise ValueError(
      f'the reference is not what is accepted, or not read: {reference[:80]!r}'
    )
  return float(_is_right(calls.read(prediction), wanted, tools))


def _own_calls(row: rows.Row) -> list[dict[str, dict[str, Any]]]:
  """What accepts the row's own calls and no others."""
  made = row.messages[-1].get('tool_calls', ()) if row.messages else ()
  return [
    {
      call['function']['name']: {
        key: [_one_each(value)]
        for key, value in call['function']['arguments'].items()
      }
    }
    for call in made
  ]


def _one_each(value: Any) -> Any:
  """An object, or a list of them, with one accepted value for each key."""
  if isinstance(value, dict):
    return {key: [inner] for key, inner in value.items()}
  if isinstance(value, list) and value:
    if all(isinstance(item, dict) for item in value):
      return [_one_each(item) for item in value]
  return value


def _are_calls(wanted: Any) -> bool:
  return isinstance(wanted, list) and all(
    isinstance(call, dict)
    and len(call) == 1
    and all(
      isinstance(own, dict) and all(isinstance(v, list) for v in own.values())
      for own in call.values()
    )
    for call in wanted
  )


def _tools(row: rows.Row) -> dict[str, dict]:
  functions = [tool.get('function', tool) for tool in row.tools]
  return {f['name']: f.get('parameters') or {} for f in functions}


def _is_right(found: list[calls.Call], wanted: list, tools: dict) -> bool:
  if len(found) != len(wanted):
    return False
  left = list(found)
  for expected in wanted:
    ((name, accepted),) = expected.items()
    for i, call in enumerate(left):
      if call['name'] == name and _fit(
        call['arguments'], accepted, tools[name]
      ):
        del left[i]
        break
    else:
      return False
  return True


def _fit(arguments: dict, accepted: dict, parameters: dict) -> bool:
  """Whether the arguments of one call are accepted."""
  declared = parameters.get('properties') or {}
  if not set(parameters.get('required') or ()) <= arguments.keys():
    return False
  for name, value in arguments.items():
    if name not in declared or name not in accepted:
      return False
    if not _is_accepted(value, accepted[name], declared[name]):
      return False
  return all(
    name in arguments or OMITTED in values for name, values in accepted.items()
  )


def _is_accepted(value: Any, accepted: list, declared: dict) -> bool:
  kind: Any = _kind(declared)
  inner = None
  if kind is list:
    inner = _kind(declared.get('items') or {})
  if kind is float and type(value) is int:
    value = float(value)
  usual: Any = next((type(v) for v in accepted if v != OMITTED), kind)
  kind = kind or usual
  if type(value) is kind:
    if inner and not any(_items_fit(value, own, inner) for own in accepted):
      return False
    # What is declared is not what is accepted: a name stands for the value.
    stands_for = usual is not kind
  elif type(value) is usual:
    stands_for = True
  else:
    return False
  if stands_for or kind not in (str, list, dict):
    return value in accepted
  if kind is str:
    return plain(value) in [plain(v) for v in accepted if type(v) is str]
  if kind is dict:
    return any(_object_fits(value, own) for own in accepted)
  if inner is dict:
    return any(_objects_fit(value, own) for own in accepted)
  return _plain_all(value) in [_plain_all(own) for own in accepted]


def _kind(declared: Any) -> type | None:
  """The Python type of a parameter; None where any may stand."""
  name = declared.get('type') if isinstance(declared, dict) else None
  return _KINDS.get(name) if isinstance(name, str) else None


def _items_fit(value: list, accepted: Any, inner: type) -> bool:
  """Whether all items are of the declared type, or of that of the accepted."""
  if not isinstance(accepted, list):
    return True
  usual = next((type(v) for v in accepted if v != OMITTED), None)
  return all(type(item) in (inner, usual) for item in value)


def _object_fits(value: dict, accepted: Any) -> bool:
  if not isinstance(accepted, dict):
    return False
  for key, own in value.items():
    if key not in accepted or _plain_one(own) not in _plain_all(accepted[key]):
      return False
  return all(key in value or OMITTED in own for key, own in accepted.items())


def _objects_fit(value: list, accepted: Any) -> bool:
  if not isinstance(accepted, list) or len(value) != len(accepted):
    return False
  return all(
    isinstance(own, dict) and _object_fits(own, other)
    for own, other in zip(value, accepted)
  )


def plain(text: str) -> str:
  """Text by which strings are compared: April 1, 2024 is april 12024."""
  return _LEFT_OUT.sub('', text).lower().replace("'", '"')


def _plain_one(value: Any) -> Any:
  return plain(value) if isinstance(value, str) else value


def _plain_all(values: Any) -> list:
  return [_plain_one(value) for value in values]
