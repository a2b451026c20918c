"""What a metric says of itself beside its signature."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np

Kind = Literal['format', 'content', 'likelihood']
Function = TypeVar('Function', bound=Callable)


@dataclasses.dataclass(frozen=True)
class Facts:
  """What `metric` declares. A function that declares nothing has these.

  kind: 'format' looks at the form of an answer alone, 'content' at what it
  says. needs: modules of optional libraries. bounds: of a score. sums and
  of_sums: of a score of the whole set that is a function of sums over rows, so
  that it can be drawn again without the texts: sums(predictions, references,
  rows, **own) -> [rows, K], of_sums([..., K]) -> [...]. table: its name, and a
  function of the same arguments as the score that gives it.
  """

  kind: Kind = 'content'
  needs: tuple[str, ...] = ()
  bounds: tuple[float, float] = (0.0, 1.0)
  sums: Callable[..., np.ndarray] | None = None
  of_sums: Callable[[np.ndarray], np.ndarray] | None = None
  table: tuple[str, Callable[..., dict[str, Any]]] | None = None


def metric(*args: Any, **facts: Any) -> Callable[[Function], Function]:
  """Declares the Facts of the metric that it stands above."""
  declared = Facts(*args, **facts)

  def declare(function: Function) -> Function:
    function.__dict__['facts'] = declared
    return function

  return declare


def of(function: Callable) -> Facts:
  """The Facts of a metric."""
  return getattr(function, 'facts', Facts())


def check_installed(function: Callable, where: str) -> None:
  """Raises ValueError where a library that the metric needs is missing."""
  for name in of(function).needs:
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f'{where}: {function.__name__!r} needs {name!r}, which is not '
        "installed: pip install 'tuner[metrics]', or leave it out."
      )
