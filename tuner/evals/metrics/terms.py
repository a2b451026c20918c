"""Terms of a domain: whether an answer uses those of its reference."""

import collections
import math
import re
from collections.abc import Sequence

from tuner.data import rows
from tuner.evals.metrics import declare

# The commonest words of English prose, which no domain has for its own; with
# the texts' own frequencies, a list of many thousands is not needed.
_COMMON = frozenset(
  """a about above after again all also always am an and another any are as ask
  at away back be because been before being best better between big both but by
  call came can case cause change come could day did different do does done down
  during each end enough even ever every example far few find first following
  for form found from further general get give given go good got great group
  had hand hard has have having he help her here high him his home how however
  i if important in including instead into is it its just keep kind know known
  large last later least left less let life like line list little live long look
  made main make many may me mean means might more most much must my name need
  never new next no not nothing now number of off often old on once one only or
  order other our out over own part people place point possible put question
  rather read really right said same say second see seem set several she should
  show side simple since small so some something state still such sure take tell
  than that the their them themselves then there these they thing things think
  this those though three through thus time to together too two under until up
  upon us use used using usually value very want was water way we well went were
  what when where whether which while who whole why will with within without
  word words work world would year years yes yet you your""".split()
)
_WORD = re.compile(r'[^\W\d_][^\W_]*(?:[-/][^\W_]+)*')
FEWEST = 2  # references that a term stands in


def words(text: str) -> list[str]:
  """Words in lower case; parts joined by - or / are one."""
  return _WORD.findall(text.lower())


def found_in(references: Sequence[str], most_share: float = 0.5) -> list[str]:
  """The terms of texts, by frequency against what is common; sorted.

  A term stands in two texts or more, is no common word of English, and is not
  in more than `most_share` of the texts, as what stands everywhere is the form
  of an answer and not its subject (Spaerck Jones 1972).
  """
  seen: collections.Counter = collections.Counter()
  for text in references:
    seen.update(set(words(text)))
  most = max(FEWEST, math.floor(most_share * len(references)))
  return sorted(
    word
    for word, count in seen.items()
    if FEWEST <= count <= most and len(word) > 2 and word not in _COMMON
  )


@declare.metric('content')
def term_recall(
  prediction: str,
  reference: str,
  row: rows.Row,
  terms: tuple[str, ...] | None = None,
) -> float:
  """The share of the reference's terms that the prediction uses.

  terms: words of the domain, such as `found_in` gives for training answers;
  None: all words of the reference that are no common ones of English. 1 where
  the reference has none of them: it asks for none.
  """
  del row
  wanted = set(words(reference))
  own = {t.lower() for t in terms} if terms is not None else None
  wanted &= own if own is not None else wanted.difference(_COMMON)
  if not wanted:
    return 1.0
  return len(wanted.intersection(words(prediction))) / len(wanted)
