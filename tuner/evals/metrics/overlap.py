"""Overlap of n-grams, by the libraries that papers report."""

import functools
from collections.abc import Sequence

import numpy as np

from tuner.data import rows as rows_lib
from tuner.evals.metrics import declare

# A model that loops writes more than that; what follows is scored no better.
MOST_CHARACTERS = 20_000
MOST_WORDS = 2_000


@declare.metric('content', needs=('rouge_score',))
def rouge_1(prediction: str, reference: str, row: rows_lib.Row) -> float:
  """F of shared words, stemmed (Lin 2004; `rouge-score`)."""
  del row
  return _rouge('rouge1', prediction, reference)


@declare.metric('content', needs=('rouge_score',))
def rouge_2(prediction: str, reference: str, row: rows_lib.Row) -> float:
  """F of shared pairs of words, stemmed (Lin 2004; `rouge-score`).

  Raises ValueError for a reference of one word.
  """
  del row
  return _rouge('rouge2', prediction, reference)


@declare.metric('content', needs=('rouge_score',))
def rouge_l(prediction: str, reference: str, row: rows_lib.Row) -> float:
  """F of the longest common subsequence of words, stemmed (`rouge-score`).

  Of a prediction of more than 2,000 words, the first 2,000: the time goes with
  the product of the lengths.
  """
  del row
  return _rouge('rougeL', prediction, reference)


@functools.cache
def _scorer(kind: str):
  from rouge_score import rouge_scorer

  return rouge_scorer.RougeScorer([kind], use_stemmer=True)


def _rouge(kind: str, prediction: str, reference: str) -> float:
  if not _scorer(kind).score(reference, reference)[kind].fmeasure:
    raise ValueError(
      f'the reference has too few words for {kind}: {reference[:80]!r}'
    )
  words = _cut(prediction).split()[:MOST_WORDS]
  return float(_scorer(kind).score(reference, ' '.join(words))[kind].fmeasure)


@declare.metric('content', needs=('sacrebleu',))
def bleu(prediction: str, reference: str, row: rows_lib.Row) -> float:
  """BLEU of one answer from 0 to 1, of the orders that it has (`sacrebleu`).

  Papineni et al. 2002, smoothed; `corpus_bleu` is what papers report. Raises
  ValueError for an empty reference.
  """
  del row
  return _sentence(_bleu(True), prediction, reference)


@declare.metric('content', needs=('sacrebleu',))
def chrf(prediction: str, reference: str, row: rows_lib.Row) -> float:
  """chrF of one answer from 0 to 1: F2 of characters (`sacrebleu`).

  Popovic 2015. Raises ValueError for an empty reference.
  """
  del row
  return _sentence(_chrf(), prediction, reference)


@functools.cache
def _bleu(effective_order: bool):
  from sacrebleu import metrics

  return metrics.BLEU(effective_order=effective_order)


@functools.cache
def _chrf():
  from sacrebleu import metrics

  return metrics.CHRF()


def _sentence(scorer, prediction: str, reference: str) -> float:
  if not reference.strip():
    raise ValueError('the reference is empty')
  found = scorer.sentence_score(_cut(prediction), [reference]).score / 100
  return min(1.0, max(0.0, found))


def _cut(text: str) -> str:
  """The text that is scored; what UTF-8 lacks is no word of any reference."""
  plain = text[:MOST_CHARACTERS].encode('utf-8', 'replace').decode()
  return plain


def _bleu_sums(predictions, references, rows) -> np.ndarray:
  """[rows, 10]: lengths of both, n-grams that are right and all, of 1 to 4."""
  del rows
  found = []
  for prediction, reference in zip(predictions, references, strict=True):
    own = _bleu(False).sentence_score(_cut(prediction), [reference])
    found.append([own.sys_len, own.ref_len, *own.counts, *own.totals])
  return np.array(found, np.float64).reshape(-1, 10)


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
  """BLEU; a count of none is smoothed as `sacrebleu` does ('exp')."""
  found, wanted = sums[..., 0], sums[..., 1]
  right, total = sums[..., 2:6], sums[..., 6:10]
  is_none = (right == 0) & (total > 0)
  halved = 0.5 ** np.cumsum(is_none, -1)
  share = np.where(is_none, halved, right) / np.maximum(total, 1)
  with np.errstate(divide='ignore'):
    log_share = np.log(share)
  brevity = np.minimum(0.0, 1 - wanted / np.maximum(found, 1e-9))
  score = np.exp(brevity + log_share.mean(-1))
  return np.where((total > 0).all(-1) & (right > 0).any(-1), score, 0.0)


@declare.metric(
  'content', needs=('sacrebleu',), sums=_bleu_sums, of_sums=_bleu_of_sums
)
def corpus_bleu(
  predictions: Sequence[str],
  references: Sequence[str],
  rows: Sequence[rows_lib.Row],
) -> float:
  """BLEU of all answers as one text, from 0 to 1 (Post 2018; `sacrebleu`)."""
  del rows
  cut = [_cut(text) for text in predictions]
  return _bleu(False).corpus_score(cut, [list(references)]).score / 100
