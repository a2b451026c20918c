"""Every file of configs/ can be forked: it assembles and takes one step."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import pathlib
import string

import jax
import numpy as np
import pytest

from tuner import adapt, check, commands, named, optim, schedules, sections
from tuner import experiment as experiment_lib
from tuner.data import mask, mixture
from tuner.objectives import sft

pytestmark = pytest.mark.usefixtures('quick_compiles')
ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / 'configs').glob('*.py'))


def load(path):
  """The ConfigDict of a config file."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.fixture
def rows(tmp_path):
  """Rows whose prompts differ in letters: configs may ignore digits."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'rows.jsonl'
  with path.open('w') as file:
    for _ in range(80):
      a, b = (
        ''.join(rng.choice(list(string.ascii_lowercase), 4)) for _ in '12'
      )
      row = {'input': f'{a} {b}', 'output': json.dumps({'a': a, 'b': b})}
      file.write(json.dumps(row) + '\n')
  return path


def shrunk(config, model, rows):
  """The config on the tiny model; what it does stays as it is."""
  config.model.path, config.data.path = str(model), str(rows)
  for key in ('carry', 'columns', 'dev', 'test'):  # Of other files than these.
    if not isinstance(config.data.get(key, 0.0), float):
      del config.data[key]
  config.model.head_chunk = 64
  config.data.max_tokens = 128
  config.batch.tokens = 128
  config.evaluate.max_tokens = 4
  config.train.steps = (
    1000 if isinstance(config.train.steps, int) else '99 epochs'
  )
  return config


def test_there_are_configs():
  assert {'quickstart', 'lora', 'full'} <= {path.stem for path in FILES}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_config_is_short_and_says_how_to_run_it(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 60
  doc = ast.get_docstring(ast.parse(text))
  assert f'python -m tuner.main --config=configs/{path.name} --workdir=' in doc


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_config_assembles_and_takes_one_step(path, tiny_dir, rows, tmp_path):
  experiment = experiment_lib.prepare(shrunk(load(path), tiny_dir, rows))
  with jax.set_mesh(experiment.mesh):
    commands.suites_of(experiment, tmp_path)
    frozen, state = experiment.start(experiment.load_base())
    batch = experiment.put(experiment.source(0))
    step = commands.compile_step(experiment, frozen, state, batch)
    state, metrics = step(state, frozen, batch)
  assert int(state.step) == 1
  assert math.isfinite(metrics['loss']) and metrics['weight'] > 0


# Flags read by nothing: every key of a config is asked for by some line.


@dataclasses.dataclass
class Reads:
  """(section, key) of every field read, while it listens."""

  found: set
  listens: bool = True

  def quietly(self, function):
    """`function`, whose reads do not count."""

    def call(*args, **kwargs):
      before, self.listens = self.listens, False
      try:
        return function(*args, **kwargs)
      finally:
        self.listens = before

    return call


@pytest.fixture
def reads(monkeypatch):
  """What the program reads of sections, checking and writing them aside."""
  reads = Reads(set())

  def spy(section, record):
    names = {field.name for field in dataclasses.fields(record)}

    def read(self, name):
      if reads.listens and name in names:
        reads.found.add((section, name))
      return object.__getattribute__(self, name)

    monkeypatch.setattr(record, '__getattribute__', read)

  for section, record in sections.RECORDS.items():
    spy(section, record)
  for owner, name in [(sections, 'read'), (sections.Config, 'resolved')]:
    monkeypatch.setattr(owner, name, reads.quietly(getattr(owner, name)))
  return reads


def test_every_key_of_a_section_is_read(reads, tiny_config, tmp_path):
  tiny_config.train.steps = 2
  tiny_config.evaluate.every = 2
  tiny_config.export = dict(formats=('adapter', 'model'))
  assert commands.train(tiny_config, tmp_path) == 0
  # Some keys are for check alone, and some for several sources.
  path = tiny_config.data.path
  tiny_config.data.path = None
  tiny_config.data.sources = {'all': {'path': path, 'share': 1.0}}
  assert check.run(tiny_config) == 0
  keys = {
    (section, field.name)
    for section, record in sections.RECORDS.items()
    for field in dataclasses.fields(record)
  }
  assert reads.found == keys


def test_every_top_level_key_is_in_the_record():
  keys = {field.name for field in dataclasses.fields(sections.Config)}
  assert set(inspect.signature(sections.get_config).parameters) == keys
  assert set(sections.RECORDS) < keys


FUNCTIONS = [
  getattr(module, name)
  for module, takes in [
    (adapt, ('rows',)),
    (optim, ('learning_rate', 'dims')),
    (schedules, ('total_steps',)),
    (sft, ('policy', 'reference', 'batch')),
  ]
  for name in named._public(module, takes)
]


@pytest.mark.parametrize('function', FUNCTIONS, ids=lambda f: f.__name__)
def test_every_key_of_a_named_function_is_used(function):
  source = ast.parse(inspect.getsource(function))
  used = {
    node.id
    for node in ast.walk(source)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
  }
  keys = [
    name
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.default is not parameter.empty
  ]
  assert set(keys) <= used


@pytest.mark.parametrize('key', ['too_long', 'loss', 'long_text'])
def test_policies_are_those_of_the_data(key):
  hints = sections.Data.__annotations__[key]
  assert hints.__args__ == getattr(mask, key.upper())


def test_exhausted_has_the_policies_of_mixtures():
  hints = sections.Data.__annotations__['exhausted']
  assert hints.__args__ == mixture.POLICIES
