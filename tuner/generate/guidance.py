"""Grammars as llguidance takes them, and what is wrong with those it refuses.

It says what it cannot hold to, but not where in a schema, and it passes over
keys that it does not know and grammars that nothing satisfies; here both are
refused, by the smallest part of the schema that has the fault.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any

# What a JSON text may hold beyond the library's defaults, as a model might have
# said it anyway. Unlimited white space is where weak models never come out of;
# around the value, a line's end is enough, behind which they would go on so.
SPACE = r'[ \n\r\t]{1,32}'
AROUND = r'[ \n\r\t]{1,2}'
OPTIONS = {
  'whitespace_pattern': SPACE,
  'json_allow_general_unicode_escapes': True,
}
# Where a JSON schema holds schemas: one, several in a list, several by name.
HOLDS = ('items', 'additionalProperties', 'additionalItems')
HOLDS_LIST = ('items', 'prefixItems', 'anyOf', 'oneOf', 'allOf')
HOLDS_NAMED = ('properties', 'patternProperties', '$defs', 'definitions')
# With those: what the library holds to, and what says nothing about a value.
KEYWORDS = {
  *(*HOLDS, *HOLDS_LIST, *HOLDS_NAMED),
  *('type', 'enum', 'const', 'multipleOf', 'maximum', 'exclusiveMaximum'),
  *('minimum', 'exclusiveMinimum', 'maxLength', 'minLength', 'pattern'),
  *('maxItems', 'minItems', 'maxProperties', 'minProperties', 'required'),
  *('format', 'contentEncoding', 'contentMediaType', 'contentSchema'),
  *('title', 'description', 'default', 'deprecated', 'readOnly', 'writeOnly'),
  *('examples', 'id', '$id', '$schema', '$anchor', '$comment', '$vocabulary'),
  '$ref',
}


def library():
  """llguidance. Raises ValueError if it is not installed."""
  if importlib.util.find_spec('llguidance') is None:
    raise ValueError(
      'constrained decoding needs llguidance, which is not installed: '
      "pip install 'tuner[constrained]'"
    )
  import llguidance  # An extra.

  return llguidance


def of_regex(text: str) -> str:
  """The grammar of a regex. Raises ValueError with what is wrong and where."""
  grammar = library().LLMatcher.grammar_from_regex(text)
  fault = _fault(grammar)
  if fault:
    raise ValueError(f'the regex {text!r}: {fault}')
  return grammar


def of_schema(text: str) -> str:
  """The grammar of the JSON of a schema, with a line's end around it.

  Raises ValueError with what is wrong and where.
  """
  try:
    schema = json.loads(text)
  except ValueError as error:
    raise ValueError(f'the schema is no JSON: {error}') from None
  if not isinstance(schema, dict | bool):
    raise ValueError(f'the schema is {text!r}; it must be a JSON object')
  fault = _schema_fault(schema, schema)
  if fault:
    path, reason = _innermost(schema, schema, '$') or ('$', fault)
    raise ValueError(f'the schema at {path}: {reason}')
  for path, key in _unknown(schema, '$'):
    raise ValueError(
      f'the schema at {path}: {key!r} is no keyword of JSON Schema; one that '
      'is to be passed over begins with x-'
    )
  return of_json(schema)


def of_json(schema: Any = True) -> str:
  """The grammar of a schema known to be good; by default, of any JSON."""
  return library().LLMatcher.grammar_from_lark(
    f'start: AROUND? json AROUND?\nAROUND: /{AROUND}/\n'
    f'json: %json {json.dumps(_with_options(schema))}\n'
  )


def reason(message: str) -> str:
  """The library's message on one line; of a regex, what and where it is."""
  found = re.search(r'\n( *)\^+\nerror: (.*)', message)
  if found:
    # The regex stands there behind four spaces.
    return f'{found[2]}, at character {len(found[1]) - 3}'
  return (message.splitlines() or [''])[0]


def _with_options(schema) -> dict[str, Any]:
  """The schema with OPTIONS, of which its own x-guidance has the last word."""
  own = {} if schema is True else schema
  options = own.get('x-guidance', {})
  if isinstance(options, dict):
    options = {**OPTIONS, **options}
  return {**own, 'x-guidance': options}


def _schema_fault(schema, root) -> str:
  """Why a part of a schema is refused; '' if it is not."""
  if schema is False:
    return 'it is false, which nothing satisfies'
  if isinstance(root, dict) and isinstance(schema, dict):
    # References are to the root's definitions.
    named = {k: root[k] for k in ('$defs', 'definitions') if k in root}
    schema = {**named, **schema}
  return _fault(
    library().LLMatcher.grammar_from_json_schema(_with_options(schema))
  )


def _innermost(schema, root, path: str) -> tuple[str, str] | None:
  """(path, reason) of the smallest part of a schema that is refused alone."""
  for name, part in _parts(schema):
    found = _innermost(part, root, path + name)
    if found:
      return found
  fault = _schema_fault(schema, root)
  return (path, fault) if fault else None


def _unknown(schema, path: str) -> Iterator[tuple[str, str]]:
  """(path, key) of each key that is no keyword."""
  for key in schema if isinstance(schema, dict) else ():
    if key not in KEYWORDS and not key.startswith('x-'):
      yield path, key
  for name, part in _parts(schema):
    yield from _unknown(part, path + name)


def _parts(schema) -> Iterator[tuple[str, Any]]:
  """(name, schema) of the schemas directly in a schema that are objects."""
  for key, value in schema.items() if isinstance(schema, dict) else ():
    found: dict[str, Any] = {}
    if key in HOLDS_NAMED and isinstance(value, dict):
      found = {f'.{key}.{name}': part for name, part in value.items()}
    elif key in HOLDS_LIST and isinstance(value, list):
      found = {f'.{key}[{i}]': part for i, part in enumerate(value)}
    elif key in HOLDS:
      found = {f'.{key}': value}
    yield from (
      (n, part) for n, part in found.items() if isinstance(part, dict)
    )


def _fault(grammar: str) -> str:
  """Why the library refuses a grammar, or that nothing satisfies it."""
  matcher = library().LLMatcher
  is_wrong, messages = matcher.validate_grammar_with_warnings(grammar)
  if is_wrong:
    return reason(messages[0])
  # Only without a first byte does it show.
  start = matcher(_bytes(), grammar, log_level=0)
  start.compute_bitmask()
  return 'nothing satisfies it' if start.is_error() else ''


@functools.cache
def _bytes():
  """A vocabulary of bytes."""
  return library().LLTokenizer('byte')
