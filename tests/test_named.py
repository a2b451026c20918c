"""Sections are bound to signatures, and every misfit is named."""

import importlib
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ml_collections
import pytest

from tuner import named


def adamw(
  learning_rate: Callable,
  b1: float = 0.9,
  steps: int = 3,
  nesterov: bool = False,
  dtype: str | None = None,
):
  return dict(learning_rate=learning_rate, b1=b1, steps=steps, dtype=dtype)


def needs(rank: int, targets: tuple[str, ...] = (), mesh: Any = None):
  return rank, targets, mesh


def _private():
  raise AssertionError('never called')


@pytest.fixture
def module():
  made = types.ModuleType('made')
  for function in (adamw, needs, _private):
    copy = types.FunctionType(
      function.__code__, globals(), function.__name__, function.__defaults__
    )
    copy.__annotations__ = function.__annotations__
    copy.__module__ = 'made'
    setattr(made, function.__name__, copy)
  made.loads = pathlib.Path.exists  # a function that made does not define
  return made


def bind(section, module, **kwargs):
  return named.bind(
    section,
    module,
    where='config.optimizer',
    takes=('learning_rate',),
    **kwargs,
  )


@pytest.mark.parametrize('kind', [dict, ml_collections.ConfigDict])
def test_binds_values_and_defaults(module, kind):
  bound = bind(kind(dict(name='adamw', b1=1)), module)
  assert bound('rate')['b1'] == 1.0
  assert bound('rate')['learning_rate'] == 'rate'
  assert bound.resolved == dict(
    name='adamw', b1=1.0, steps=3, nesterov=False, dtype=None
  )
  assert type(bound.resolved['b1']) is float


def test_resolved_section_binds_to_itself(module):
  once = bind(dict(name='adamw', b1=0.5, dtype='bfloat16'), module)
  assert bind(once.resolved, module).resolved == once.resolved


def test_the_section_is_left_as_it_was(module):
  section = dict(name='adamw', b1=0.5)
  bind(section, module)
  assert section == dict(name='adamw', b1=0.5)


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    (
      dict(name='adamw', nestrov=True),
      "config.optimizer: unknown key 'nestrov'; did you mean 'nesterov'? "
      'adamw(b1: float = 0.9, steps: int = 3, nesterov: bool = False, '
      'dtype: str | None = None)',
    ),
    (dict(name='adamw', b1='0.9'), "config.optimizer.b1: '0.9' (str), wanted "),
    (dict(name='adamw', b1=True), 'b1: True (bool), wanted float. adamw('),
    (dict(name='adamw', steps=True), 'steps: True (bool), wanted int. adamw('),
    (dict(name='adamw', steps=2.0), 'steps: 2.0 (float), wanted int. adamw('),
    (dict(name='adamw', dtype=3), 'dtype: 3 (int), wanted str | None. adamw('),
    (
      dict(name='adamw', learning_rate=1),
      "config.optimizer: 'learning_rate' is set by the program. adamw(",
    ),
    (
      dict(name='adamv'),
      "config.optimizer.name: unknown function 'adamv'; did you mean 'adamw'?"
      ' made has adamw',
    ),
    (dict(name='_private'), "unknown function '_private'. made has adamw"),
    (dict(name='loads'), "unknown function 'loads'. made has adamw"),
    (dict(name='needs'), "unknown function 'needs'. made has adamw"),
    (dict(b1=0.5), 'config.optimizer.name: None, wanted the name of a'),
    ('adamw', "config.optimizer: 'adamw', wanted dict(name="),
    (dict(name='no_such.thing'), "'no_such.thing': cannot import 'no_such': "),
    (dict(name='.thing'), "'.thing': cannot import ''"),
    (
      dict(name='os.path.exist'),
      "config.optimizer.name: 'os.path' has no function 'exist'; did you mean "
      "'exists'?",
    ),
  ],
)
def test_refuses_by_name(module, section, message):
  with pytest.raises(ValueError) as caught:
    bind(section, module)
  assert message in str(caught.value)


def test_missing_arguments_are_named(module):
  with pytest.raises(ValueError, match=r'config: missing rank. needs\(rank: '):
    named.bind(dict(name='needs'), module)


def test_a_function_is_passed_what_it_names_of_the_given(module):
  bound = named.bind(dict(name='needs', rank=2), module, mesh='m', other=1)
  assert bound() == (2, (), 'm')
  assert bound.resolved == dict(name='needs', rank=2, targets=())
  with pytest.raises(ValueError, match="'mesh' is set by the program"):
    named.bind(dict(name='needs', rank=2, mesh='x'), module, mesh='m')


def test_call_is_bind_and_call(module):
  section = dict(name='needs', rank=2, targets=['q'])
  assert named.call(section, module) == (2, ('q',), None)


def test_a_dotted_name_is_imported(monkeypatch, module):
  other = types.ModuleType('my_pkg.methods')
  other.mine = lambda rate, gain=2.0: (rate, gain)
  monkeypatch.setitem(sys.modules, 'my_pkg', types.ModuleType('my_pkg'))
  monkeypatch.setitem(sys.modules, 'my_pkg.methods', other)
  bound = bind(dict(name='my_pkg.methods.mine', gain=3.0), module)
  assert bound('r') == ('r', 3.0)
  other.short = lambda: None
  with pytest.raises(ValueError, match=r'wanted \(learning_rate, \.\.\.\)'):
    bind(dict(name='my_pkg.methods.short'), module)


def test_fill_checks_a_mapping_against_any_function():
  bound = named.fill(needs, dict(rank=1), where='config')
  assert bound.resolved == dict(rank=1, targets=(), mesh=None)

  def loose(a=1, **rest):
    return a, rest

  assert named.fill(loose, dict(b=2))() == (1, {'b': 2})


@pytest.mark.parametrize(
  ('annotation', 'value', 'wanted'),
  [
    (float, 1, 1.0),
    (float | None, 1, 1.0),
    (int | float, 1, 1),
    (float | int, 1, 1),
    (float | str, 'a', 'a'),
    (Literal['a', 'b'], 'b', 'b'),
    (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[int, float], [1, 2], (1, 2.0)),
    (tuple, [1, 'a'], (1, 'a')),
    (list[float], (1,), [1.0]),
    (Sequence[str], ['a'], ('a',)),
    (dict, {'a': 1}, {'a': 1}),
    (dict[str, int], {'a': 1}, {'a': 1}),
    (Any, [1], [1]),
    (complex, 'anything', 'anything'),
  ],
)
def test_fits(annotation, value, wanted):
  def function(x: annotation):
    return x

  got = named.fill(function, dict(x=value))()
  assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
  ('annotation', 'value'),
  [
    (float, None),
    (int, 1.0),
    (bool, 1),
    (str, 1),
    (Literal['a', 'b'], 'c'),
    (tuple[int, ...], 1),
    (tuple[int, ...], 'ab'),
    (tuple[int, ...], [1, 'a']),
    (tuple[int, int], [1]),
    (list[str], ['a', None]),
    (dict, []),
    (int | None, 'x'),
    (Callable, 3),
    (None, 3),
  ],
)
def test_misfits(annotation, value):
  def function(x: annotation):
    return x

  with pytest.raises(ValueError, match=r'config\.x: .*, wanted '):
    named.fill(function, dict(x=value))


@pytest.mark.parametrize(
  ('annotation', 'value', 'told'),
  [
    (
      Literal['aaa', 'b'],
      'aa',
      "'aa', wanted one of aaa, b; did you mean 'aaa'?",
    ),
    (Literal['aaa', 'b'], 3, '3, wanted one of aaa, b.'),
    (Literal['aaa', 1] | None, 'x', "'x', wanted one of aaa, 1, None."),
    (
      tuple[Literal['aaa', 'b'], ...],
      ['b', 'aa', 'x'],
      "'aa', wanted one of aaa, b; did you mean 'aaa'?",
    ),
    (list[Literal['aa']], 'aa', "'aa' (str), wanted a list of some of aa."),
  ],
)
def test_a_choice_is_told_as_names(annotation, value, told):
  def function(x: annotation):
    return x

  with pytest.raises(ValueError) as caught:
    named.fill(function, dict(x=value))
  assert str(caught.value) == f'config.x: {told}'


def test_a_plain_default_says_the_type_where_no_annotation_does():
  def dpo(policy, batch, beta=0.1, label=None):
    return policy, batch, beta, label

  takes = ('policy', 'batch')
  assert named.fill(dpo, dict(beta=1), takes=takes)('p', 'b')[2] == 1.0
  assert named.fill(dpo, dict(label=3), takes=takes)('p', 'b')[3] == 3
  with pytest.raises(
    ValueError, match=r"config.beta: '1' \(str\), wanted float"
  ):
    named.fill(dpo, dict(beta='1'), takes=takes)


def test_an_annotation_that_does_not_evaluate_accepts_all():
  def function(x: 'NoSuchName' = 1, y=2):  # noqa: F821
    return x, y

  assert named.fill(function, dict(x='a'))() == ('a', 2)
  with pytest.raises(ValueError, match='wanted int'):
    named.fill(function, dict(y='a'))


def test_existing_path(tmp_path, monkeypatch):
  (tmp_path / 'train.jsonl').write_text('{}')
  monkeypatch.setenv('HOME', str(tmp_path))
  path = named.existing_path('~/train.jsonl', 'config.data.path')
  assert path == tmp_path / 'train.jsonl'
  for wrong, message in [
    ('trian.jsonl', "no 'trian.jsonl' in .*did you mean 'train.jsonl'"),
    ('zzz', "config.data.path: '.*zzz' is not there: no 'zzz' in .*'$"),
    ('sub/train.jsonl', "no 'sub' in"),
    ('train.jsonl/x', r"train.jsonl' is a file"),
  ]:
    with pytest.raises(ValueError, match=message):
      named.existing_path(str(tmp_path / wrong), 'config.data.path')
  with pytest.raises(ValueError, match='wanted the path'):
    named.existing_path('', 'config.data.path')


def test_a_package_offers_what_its_modules_do(tmp_path, monkeypatch):
  package = tmp_path / 'methods'
  package.mkdir()
  (package / '__init__.py').write_text('')
  for name in ('one', 'two'):
    (package / f'{name}.py').write_text(
      f'def {name}(a, b=1):\n  return a + b\n'
    )
  monkeypatch.syspath_prepend(tmp_path)
  methods = importlib.import_module('methods')
  assert named.call({'name': 'two', 'b': 2}, methods, 3, takes=('a',)) == 5
  with pytest.raises(ValueError, match='methods has one, two'):
    named.bind({'name': 'three'}, methods, takes=('a',))
