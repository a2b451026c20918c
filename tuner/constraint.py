"""config.evaluate.constraint: what every answer is held to, if to anything.

dict(kind='json_schema', path='schema.json'), dict(kind='json_schema',
text='{...}'), dict(kind='regex', text='yes|no') or dict(kind='json'). It is
read, and held to be one, before a weight is loaded.
"""

from collections.abc import Mapping
from typing import Any

from tuner import named
from tuner.generate import constrain

WHERE = 'config.evaluate.constraint'
# The keys that may be there together, beside the kind.
TAKES = {
  'json_schema': (('path',), ('text',)),
  'regex': (('text',),),
  'json': ((),),
}


def read(section: Mapping[str, Any] | None) -> constrain.Constraint | None:
  """The constraint of the section; None: of none. Raises ValueError."""
  if section is None:
    return None
  own = named.fill(_section, section, where=WHERE).resolved
  kind, path, text = own['kind'], own['path'], own['text']
  if kind not in constrain.KINDS:
    raise ValueError(
      f'{WHERE}.kind: {kind!r}{named.nearest(kind, constrain.KINDS) or "."} It '
      f'must be one of {", ".join(constrain.KINDS)}.'
    )
  given = tuple(key for key in ('path', 'text') if own[key] is not None)
  if given not in TAKES[kind]:
    wanted = ' or '.join(
      ' and '.join(keys) or 'nothing' for keys in TAKES[kind]
    )
    raise ValueError(
      f'{WHERE}: beside kind {kind!r} it takes {wanted}; found '
      f'{" and ".join(given) or "nothing"}.'
    )
  if path is not None:
    text = _text(path)
  try:
    return constrain.Constraint(kind, text or '')
  except ValueError as error:
    said = str(error).removeprefix('constraint.text: ')
    of = f'.path: {path}' if path is not None else '.text' if text else ''
    raise ValueError(f'{WHERE}{of}: {said}') from error


def _section(kind: str, path: str | None = None, text: str | None = None):
  """The keys of the section."""


def _text(path: str) -> str:
  file = named.existing_path(path, f'{WHERE}.path')
  try:
    return file.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{WHERE}.path: {path!r} cannot be read: {error}'
    ) from error
