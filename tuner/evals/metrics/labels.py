"""Classification: an answer is a label, or none of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuner.data import rows as rows_lib
from tuner.evals.metrics import declare

OTHER = 'other'


def _label(text: str) -> str:
  return ' '.join(text.casefold().split())


def _vocabulary(
  references: Sequence[str], labels: tuple[str, ...] | None
) -> list[str]:
  """The labels, in order; those given, or those of the references."""
  own = {_label(text) for text in references}
  if labels is None:
    return sorted(own)
  given = list(dict.fromkeys(map(_label, labels)))
  if unknown := sorted(own.difference(given)):
    raise ValueError(
      f'the reference {unknown[0]!r} is none of the {len(given)} labels'
    )
  return given


def _counts(predictions, references, labels) -> tuple[list[str], np.ndarray]:
  """(labels, [rows, 2]: the number of each row's reference and prediction).

  A prediction that is no label has the number after the last.
  """
  names = _vocabulary(references, labels)
  numbers = {name: i for i, name in enumerate(names)}
  pairs = [
    (numbers[_label(reference)], numbers.get(_label(prediction), len(names)))
    for prediction, reference in zip(predictions, references, strict=True)
  ]
  return names, np.array(pairs, np.int64).reshape(-1, 2)


def confusion(
  predictions: Sequence[str],
  references: Sequence[str],
  rows: Sequence[rows_lib.Row],
  labels: tuple[str, ...] | None = None,
) -> dict[str, Any]:
  """{'labels', 'counts', 'absent'}: how often each was taken for which.

  counts[i][j]: rows whose reference is label i and whose prediction is label j,
  or in the last column none of them. absent: labels that no reference has.
  """
  del rows
  names, pairs = _counts(predictions, references, labels)
  counts = np.zeros((len(names), len(names) + 1), np.int64)
  np.add.at(counts, tuple(pairs.T), 1)
  absent = [n for n, count in zip(names, counts.sum(1)) if not count]
  return {'labels': names, 'counts': counts.tolist(), 'absent': absent}


def _sums(predictions, references, rows, labels=None) -> np.ndarray:
  """[rows, 3 labels]: right, predicted and wanted, one of each label."""
  del rows
  names, pairs = _counts(predictions, references, labels)
  row = np.arange(len(pairs))
  wanted = np.zeros((len(pairs), len(names)))
  predicted = np.zeros((len(pairs), len(names) + 1))
  wanted[row, pairs[:, 0]] = 1
  predicted[row, pairs[:, 1]] = 1
  predicted = predicted[:, :-1]
  return np.concatenate([wanted * predicted, predicted, wanted], 1)


def _of_sums(sums: np.ndarray) -> np.ndarray:
  right, predicted, wanted = np.split(sums, 3, -1)
  f1 = 2 * right / np.maximum(predicted + wanted, 1)
  return (f1 * (wanted > 0)).sum(-1) / np.maximum((wanted > 0).sum(-1), 1)


@declare.metric('content', table=('confusion', confusion))
def label(
  prediction: str,
  reference: str,
  row: rows_lib.Row,
  labels: tuple[str, ...] | None = None,
) -> float:
  """1 where both are the same label, without case and with white space folded.

  Its mean is the accuracy. labels: all that there are; None: whatever the
  references are. Raises ValueError for a reference that is none of them.
  """
  del row
  _vocabulary([reference], labels)
  return float(_label(prediction) == _label(reference))


@declare.metric(
  'content', sums=_sums, of_sums=_of_sums, table=('confusion', confusion)
)
def macro_f1(
  predictions: Sequence[str],
  references: Sequence[str],
  rows: Sequence[rows_lib.Row],
  labels: tuple[str, ...] | None = None,
) -> float:
  """The mean over labels of F1, 2 right / (predicted + wanted).

  Labels are compared as `label` does. A label that no reference has is left out
  of the mean, and named in the confusion table; a prediction that is no label
  is right for none (Opitz and Burst 2019, equation 2).
  """
  return float(_of_sums(_sums(predictions, references, rows, labels).sum(0)))
