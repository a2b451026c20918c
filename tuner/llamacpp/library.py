"""The `gguf` package, which does the file format and quantising."""

import typing


def load() -> typing.Any:
  """The module `gguf`. Raises RuntimeError naming the extra it comes with."""
  try:
    import gguf
  except ImportError as error:
    raise RuntimeError(
      "GGUF files need the package gguf: pip install 'tuner[gguf]'"
    ) from error
  return gguf


def quote(names: typing.Iterable[object], most: int = 10) -> str:
  """'a, b, c and 7 more', for an error."""
  listed = [str(name) for name in names]
  more = f' and {len(listed) - most} more' if len(listed) > most else ''
  return ', '.join(listed[:most]) + more
