"""What every test stands on: eight virtual devices, a tiny model, its data."""

import os

# Before jax is imported: its backend reads them once.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get(
  'XLA_FLAGS', ''
):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )

import importlib.util
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import support


def pytest_collection_modifyitems(items):
  """Without torch parity tests skip, or fail where it is required."""
  if importlib.util.find_spec('torch') and importlib.util.find_spec('peft'):
    return
  if os.environ.get('TUNER_REQUIRE_TORCH') == '1':
    raise pytest.UsageError(
      'TUNER_REQUIRE_TORCH=1 and torch or peft is not installed'
    )
  skip = pytest.mark.skip(reason='torch and peft are not installed')
  for item in items:
    if 'parity' in item.keywords:
      item.add_marker(skip)


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """No test reads or writes the user's cache."""
  os.environ['TUNER_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def tiny_dir(tmp_path_factory):
  """A Hugging Face directory of a random two-layer Llama with a tokenizer."""
  path = tmp_path_factory.mktemp('tiny_model')
  support.write_model(path)
  return path


@pytest.fixture(scope='session')
def tiny_rows(tmp_path_factory):
  """A JSONL file of 60 little questions with JSON answers."""
  path = tmp_path_factory.mktemp('tiny_rows') / 'rows.jsonl'
  support.write_rows(path)
  return path


@pytest.fixture
def tiny_config(tiny_dir, tiny_rows):
  """A config that trains the tiny model in seconds; a test changes keys."""
  return support.config(tiny_dir, tiny_rows)


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def quick_compiles(compiled):
  """XLA compiles to slower code in half the time, and a program only once.

  For laws, not for speed. Other processes start without both.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  wanted = {
    'jax_disable_most_optimizations': True,
    'jax_compilation_cache_dir': str(compiled),
    'jax_persistent_cache_min_compile_time_secs': 0.3,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: jax.config.values[name] for name in wanted}
  compilation_cache.reset_cache()
  for name, value in wanted.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
