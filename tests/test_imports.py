"""The house rules that a machine can hold: who imports whom, and sizes.

Each rule reads source text only, so that it also holds for an import inside
a function, and is itself tested below on a line that breaks it.
"""

import ast
import configparser
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / 'tuner').rglob('*.py'))
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

# What a part of tuner/ may import of tuner; parts not named here, all but main.
MAY_IMPORT = {
  'tuner.data': ('tuner.data', 'tuner.named'),
  'tuner.named': (),
  'tuner.mesh': ('tuner.named',),
  'tuner.models': ('tuner.models', 'tuner.mesh', 'tuner.named'),
  'tuner.objectives': ('tuner.objectives', 'tuner.named'),
  'tuner.optim': ('tuner.schedules', 'tuner.named'),
  'tuner.schedules': ('tuner.named',),
  'tuner.evals.metrics': ('tuner.evals.metrics', 'tuner.data.rows'),
  'tuner.evals.stats': (),
  'tuner.report': ('tuner.report', 'tuner.evals.stats', 'tuner.named'),
}
DEVICE = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')
# What a part of tuner/ must not import of others. '' is every part.
MAY_NOT_IMPORT = {
  '': ('tuner.main', 'torch', 'tensorflow', 'pickle', 'yaml', 'tests'),
  'tuner.data': DEVICE,
  'tuner.named': DEVICE,
  'tuner.evals.metrics': DEVICE,
  'tuner.evals.stats': DEVICE,
  'tuner.report': DEVICE,
}
DISTRIBUTIONS = {  # whose name is not their module's
  'absl': 'absl-py',
  'huggingface_hub': 'huggingface-hub',
  'jsonschema_specifications': 'jsonschema',
  'lm_eval': 'lm-eval',
  'ml_collections': 'ml-collections',
  'orbax': 'orbax-checkpoint',
  'referencing': 'jsonschema',
  'rouge_score': 'rouge-score',
}


def is_in(module, package):
  return not package or module == package or module.startswith(package + '.')


def module_name(path):
  parts = pathlib.PurePosixPath(path).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path, source):
  """(line, absolute dotted name) of everything that a file imports."""
  package = list(pathlib.PurePosixPath(path).parts[:-1])
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      up = package[: len(package) + 1 - node.level] if node.level else []
      base = '.'.join([*up, *([node.module] if node.module else [])])
      yield from ((node.lineno, f'{base}.{a.name}') for a in node.names)
    elif isinstance(node, ast.Call) and node.args:
      name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
      first = node.args[0]
      if name in ('import_module', '__import__') and (
        isinstance(first, ast.Constant) and isinstance(first.value, str)
      ):
        yield node.lineno, first.value


def wrong_imports(path, source):
  """'path:line: why' for each import that its part of tuner may not have."""
  module = module_name(path)
  wrong = []
  for line, name in imports(path, source):
    for part, banned in MAY_NOT_IMPORT.items():
      if is_in(module, part) and any(is_in(name, b) for b in banned):
        wrong.append(f'{path}:{line}: {part or "tuner"} imports {name}')
    for part, allowed in MAY_IMPORT.items():
      if not (is_in(module, part) and is_in(name, 'tuner')):
        continue
      if not any(is_in(name, a) for a in allowed):
        wrong.append(f'{path}:{line}: {part} imports {name}')
  return wrong


def undeclared(path, source, declared):
  """'path:line: ...' for each imported package that setup.cfg does not name."""
  wrong = []
  for line, name in imports(path, source):
    top = name.partition('.')[0]
    if top in sys.stdlib_module_names or top == 'tuner':
      continue
    if DISTRIBUTIONS.get(top, top).lower() not in declared:
      wrong.append(f'{path}:{line}: {top} is not in setup.cfg')
  return wrong


def too_long(path, source):
  """'path: ...' where a file or a function holds more than one idea."""
  wrong = []
  lines = len(source.splitlines())
  if lines > MAX_LINES:
    wrong.append(f'{path}: {lines} lines; which two ideas does it hold?')
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if lines > MAX_FUNCTION_LINES:
        wrong.append(f'{path}:{node.lineno}: {node.name} has {lines} lines')
  return wrong


def read_declared():
  """Distributions of install_requires and of every extra, in lower case."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  text = parser['options']['install_requires']
  text += ''.join(parser['options.extras_require'].values())
  lines = [line for line in text.splitlines() if line.strip()]
  return {re.split(r'[\[<>=! ]', line.strip())[0].lower() for line in lines}


def relative(path):
  return path.relative_to(ROOT).as_posix()


def test_imports_go_one_way():
  wrong = [w for p in FILES for w in wrong_imports(relative(p), p.read_text())]
  assert not wrong, '\n'.join(wrong)


def test_imported_packages_are_declared():
  declared = read_declared()
  wrong = [
    w for p in FILES for w in undeclared(relative(p), p.read_text(), declared)
  ]
  assert not wrong, '\n'.join(wrong)


def test_files_and_functions_are_short():
  wrong = [w for p in FILES for w in too_long(relative(p), p.read_text())]
  assert not wrong, '\n'.join(wrong)


def test_every_folder_is_a_package_that_is_installed():
  wrong = {p.parent for p in FILES if not (p.parent / '__init__.py').exists()}
  assert not wrong, f'no __init__.py in {sorted(map(relative, wrong))}'


def test_there_is_something_to_read():
  assert ROOT / 'tuner' / 'named.py' in FILES
  assert {'jax', 'numpy', 'pytest', 'torch'} <= read_declared()


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('tuner/data/x.py', 'import jax'),
    ('tuner/data/x.py', 'import jax.numpy as jnp'),
    ('tuner/data/x.py', 'def f():\n  from flax import nnx'),
    ('tuner/data/x.py', 'from tuner import optim'),
    ('tuner/data/x.py', 'from .. import optim'),
    ('tuner/data/sub/x.py', 'from ...models import layers'),
    ('tuner/data/x.py', "importlib.import_module('jax.numpy')"),
    ('tuner/data/__init__.py', 'import tuner.train'),
    ('tuner/objectives/sft.py', 'from tuner.models import decoder'),
    ('tuner/objectives/sft.py', 'from tuner import data'),
    ('tuner/models/x.py', 'from tuner import train'),
    ('tuner/models/x.py', 'import tuner.optim as o'),
    ('tuner/models/families/x.py', 'from tuner import checkpoint'),
    ('tuner/models/x.py', 'from tuner.objectives import sft'),
    ('tuner/models/x.py', 'from tuner import adapt'),
    ('tuner/report/x.py', 'from tuner import train'),
    ('tuner/report/x.py', 'import jax'),
    ('tuner/named.py', 'from tuner import data'),
    ('tuner/evals/metrics/text.py', 'import jax'),
    ('tuner/train.py', 'from tuner import main'),
    ('tuner/train.py', 'import tuner.main'),
    ('tuner/train.py', 'import pickle'),
    ('tuner/models/hub.py', 'import torch'),
  ],
)
def test_a_wrong_import_is_found(path, source):
  assert len(wrong_imports(path, source)) == 1


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('tuner/data/x.py', 'import numpy as np\nfrom tuner.data import rows'),
    ('tuner/data/x.py', 'from . import rows\nfrom tuner import named'),
    ('tuner/data/x.py', 'import jaxtyping'),
    ('tuner/objectives/sft.py', 'import jax'),
    ('tuner/models/x.py', 'from tuner.models import layers'),
    ('tuner/models/x.py', 'from tuner import mesh'),
    ('tuner/train.py', 'from tuner import data, models, objectives'),
    ('tuner/main.py', 'from tuner import train'),
    ('tuner/train.py', 'from tuner import main_loop'),
  ],
)
def test_a_right_import_is_not(path, source):
  assert wrong_imports(path, source) == []


def test_an_undeclared_package_is_found():
  found = undeclared(
    'tuner/x.py', 'import os\nimport zstd\nimport jax', {'jax'}
  )
  assert found == ['tuner/x.py:2: zstd is not in setup.cfg']


def test_long_files_and_functions_are_found():
  long = 'def f():\n' + '  pass\n' * MAX_FUNCTION_LINES
  assert 'f has 61 lines' in too_long('x.py', long)[0]
  assert '401 lines' in too_long('x.py', 'x = 1\n' * (MAX_LINES + 1))[0]
  fits = 'def f():\n' + '  pass\n' * (MAX_FUNCTION_LINES - 1)
  assert too_long('x.py', fits + 'x = 1\n' * (MAX_LINES - 60)) == []
