"""Tiny models of several families, made once for all tests here."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import small


@pytest.fixture(scope='session')
def bases(tmp_path_factory):
  """family -> its directory, written once."""
  folder, found = tmp_path_factory.mktemp('bases'), {}

  def base(family):
    if family not in found:
      found[family] = small.write_base(folder / family, family)
    return found[family]

  return base
