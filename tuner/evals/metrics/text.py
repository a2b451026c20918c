"""Scores of an answer as text: equal, contained."""

from tuner.data import rows
from tuner.evals.metrics import declare


@declare.metric('content')
def exact(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the texts are equal, white space at their ends aside."""
  del row
  return float(prediction.strip() == reference.strip())


@declare.metric('content')
def contains(prediction: str, reference: str, row: rows.Row) -> float:
  """1 where the reference stands somewhere in the prediction.

  White space at the reference's ends is left out. An empty reference is
  contained in an empty prediction only.
  """
  del row
  wanted = reference.strip()
  if not wanted:
    return float(not prediction.strip())
  return float(wanted in prediction)
