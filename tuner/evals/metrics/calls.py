"""Function calls, read out of what a model wrote; nothing is evaluated.

A call is {'name': str, 'arguments': dict}. Models write them as JSON, between
tags or bare, or as Python's calls with keywords.
"""

import ast
import json
import re
import warnings
from typing import Any

Call = dict[str, Any]
PYTHON_CHARACTERS = 100_000  # Longer text is no call, and slow to parse.
_TAGS = [
  re.compile(r'<(tool_call|TOOLCALL)>(.*?)(?:</\1>|\Z)', re.DOTALL),
  re.compile(r'()```(?:json|python|tool_code)?\n(.*?)```', re.DOTALL),
]
# What families write before the JSON of their calls.
_OPENERS = ('[TOOL_CALLS]', '<|python_tag|>', '<|tool_call|>', 'functools')
_WORDS = {'true': True, 'false': False, 'null': None}


class UnreadableError(ValueError):
  """The text is no call."""


def read(text: str) -> list[Call]:
  """The calls in the text; [] where there is none, or one cannot be read."""
  text = text.rpartition('</think>')[2].strip()
  for tag in _TAGS:
    if blocks := [match[2] for match in tag.finditer(text)]:
      break
  else:
    blocks = [text]
  try:
    return [call for block in blocks for call in _read_block(block.strip())]
  except (UnreadableError, RecursionError, MemoryError):
    return []


def _read_block(text: str) -> list[Call]:
  for opener in _OPENERS:
    text = text.removeprefix(opener).strip()
  try:
    value = json.loads(text)
  except ValueError:
    return _read_python(text)
  values = value if isinstance(value, list) else [value]
  return [_of_json(value) for value in values]


def _of_json(value: Any) -> Call:
  """Of {'name', 'arguments'}, as OpenAI writes it, or {name: arguments}."""
  if not isinstance(value, dict):
    raise UnreadableError
  if isinstance(value.get('function'), dict):
    value = value['function']
  if isinstance(value.get('name'), str):
    arguments = value.get('arguments', value.get('parameters', {}))
    name = value['name']
  elif len(value) == 1:
    ((name, arguments),) = value.items()
  else:
    raise UnreadableError
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments)
    except ValueError:
      raise UnreadableError from None
  if not isinstance(arguments, dict):
    raise UnreadableError
  return {'name': name, 'arguments': arguments}


def _read_python(text: str) -> list[Call]:
  """Of `f(a=1)` or `[f(a=1), g(b=2)]`."""
  if len(text) > PYTHON_CHARACTERS:
    raise UnreadableError
  try:
    with warnings.catch_warnings():  # of a backslash in a string
      warnings.simplefilter('ignore')
      body = ast.parse(text, mode='eval').body
  except (SyntaxError, ValueError):
    raise UnreadableError from None
  nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
  return [_of_node(node) for node in nodes]


def _of_node(node: ast.AST) -> Call:
  """A call with keywords alone; by position, an argument has no name."""
  if not isinstance(node, ast.Call) or node.args:
    raise UnreadableError
  arguments = {}
  for keyword in node.keywords:
    if keyword.arg is None:
      raise UnreadableError
    arguments[keyword.arg] = _value(keyword.value)
  return {'name': ast.unparse(node.func), 'arguments': arguments}


def _value(node: ast.AST | None) -> Any:
  """A literal; of anything else, such as 2 * x, its text."""
  if isinstance(node, ast.Constant):
    plain = isinstance(node.value, bool | int | float | str | None)
    return node.value if plain else ast.unparse(node)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    inner = _value(node.operand)
    if type(inner) in (int, float):
      return -inner
  if isinstance(node, ast.List | ast.Tuple):
    return [_value(inner) for inner in node.elts]
  if isinstance(node, ast.Dict):
    return {
      str(_value(key)): _value(inner)
      for key, inner in zip(node.keys, node.values)
    }
  if isinstance(node, ast.Name):
    return _WORDS.get(node.id, node.id)
  if isinstance(node, ast.Call) and node.keywords and not node.args:
    call = _of_node(node)
    return {call['name']: call['arguments']}
  if node is None:  # ** in a dict
    raise UnreadableError
  return ast.unparse(node)
