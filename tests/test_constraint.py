"""config.evaluate.constraint: read once, refused early and word by word."""

import pytest

from tuner import constraint, sections
from tuner.generate import constrain, guidance

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


def message(section):
  with pytest.raises(ValueError) as caught:
    constraint.read(section)
  return str(caught.value)


def test_a_schema_is_text_or_a_file(tmp_path):
  file = tmp_path / 'schema.json'
  file.write_text(SCHEMA)
  wanted = constrain.Constraint('json_schema', SCHEMA)
  for own in ({'path': str(file)}, {'text': SCHEMA}):
    assert constraint.read({'kind': 'json_schema', **own}) == wanted


def test_other_kinds():
  own = constrain.Constraint('regex', 'yes|no')
  assert constraint.read({'kind': 'regex', 'text': 'yes|no'}) == own
  assert constraint.read({'kind': 'json'}) == constrain.Constraint('json')
  assert constraint.read(None) is None


KEYS = {
  'json_schema': 'path or text',
  'regex': 'text',
  'json': 'nothing',
}
WRONG = [
  ('json_schema', {}, 'nothing'),
  ('json_schema', {'path': 'x', 'text': '{}'}, 'path and text'),
  ('regex', {'path': 'x'}, 'path'),
  ('regex', {}, 'nothing'),
  ('json', {'text': '{}'}, 'text'),
]


@pytest.mark.parametrize(('kind', 'own', 'found'), WRONG)
def test_keys_go_with_their_kind(kind, own, found):
  assert message({'kind': kind, **own}) == (
    f"config.evaluate.constraint: beside kind '{kind}' it takes {KEYS[kind]}; "
    f'found {found}.'
  )


def test_what_is_wrong_is_said_word_by_word(tmp_path, monkeypatch):
  where = 'config.evaluate.constraint'
  assert message({'kind': 'json_shema', 'text': '{}'}) == (
    f"{where}.kind: 'json_shema'; did you mean 'json_schema'? It must be one "
    'of json_schema, regex, json.'
  )
  assert message({'kind': 'x'}) == (
    f"{where}.kind: 'x'. It must be one of json_schema, regex, json."
  )
  assert message({'kind': 'json', 'schema': 'x'}).startswith(
    f"{where}: unknown key 'schema'"
  )
  assert message({'kind': 'json_schema', 'path': str(tmp_path / 'no')}) == (
    f"{where}.path: '{tmp_path}/no' is not there: no 'no' in '{tmp_path}'"
  )
  assert message({'kind': 'json_schema', 'path': str(tmp_path)}) == (
    f"{where}.path: '{tmp_path}' cannot be read: [Errno 21] Is a directory: "
    f"'{tmp_path}'"
  )
  bad = tmp_path / 'bad.json'
  bad.write_text('{"type": "strin"')
  assert message({'kind': 'json_schema', 'path': str(bad)}) == (
    f'{where}.path: {bad}: the schema is no JSON: '
    "Expecting ',' delimiter: line 1 column 17 (char 16)."
  )
  assert message({'kind': 'json_schema', 'text': '{"typ": 1}'}) == (
    f"{where}.text: the schema at $: 'typ' is no keyword of JSON Schema; one "
    'that is to be passed over begins with x-.'
  )
  assert message({'kind': 'regex', 'text': 'a('}).startswith(
    f"{where}.text: the regex 'a(': "
  )
  monkeypatch.setattr(guidance.importlib.util, 'find_spec', lambda name: None)
  assert message({'kind': 'json'}) == (
    f'{where}: constrained decoding needs llguidance, which is not installed: '
    "pip install 'tuner[constrained]'."
  )


def test_nothing_is_generated_to_be_held(tiny_config):
  tiny_config.evaluate.metrics = ()
  tiny_config.evaluate.constraint = {'kind': 'json'}
  with pytest.raises(ValueError) as caught:
    sections.read(tiny_config)
  assert str(caught.value) == (
    "config.evaluate.constraint: {'kind': 'json'}, but config.evaluate.metrics "
    'is empty, so that nothing is generated; name a metric, or leave the '
    'constraint out.'
  )
