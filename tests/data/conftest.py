"""The tiny tokenizer (tests/support.py) as fixtures."""

import pytest
import support


@pytest.fixture(scope='session')
def tiny_tokenizer_dir(tmp_path_factory):
  """A Hugging Face directory: the tokenizer, its template, the stop token."""
  path = tmp_path_factory.mktemp('tiny_tokenizer')
  support.write_tokenizer(path)
  return path


@pytest.fixture(scope='session')
def tokenizer():
  return support.make_tokenizer()


@pytest.fixture(scope='session')
def tokenizer_with():
  """make_tokenizer itself, for tests that need another template."""
  return support.make_tokenizer
