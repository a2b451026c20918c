"""Likelihoods of continuations, and choices by them."""

import jax
import numpy as np
import pytest
import support

from tuner import mesh as mesh_lib
from tuner.evals import likelihood
from tuner.models import policy, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  """(declared model, values)."""
  return support.load_model(tiny_dir)


@pytest.fixture(scope='module')
def runner(tiny):
  return policy.Policy(weights.fill(*tiny), chunk=16)


def make_pairs(lengths=((7, 1), (1, 9), (30, 4), (3, 3), (12, 1), (50, 20))):
  rng = np.random.default_rng(0)
  return [[rng.integers(3, 320, n).tolist() for n in pair] for pair in lengths]


def logits_of(model, ids):
  """Of one text, at one width, so that one program does for all."""
  padded = np.zeros((1, 72), np.int32)
  padded[0, : len(ids)] = ids
  return np.asarray(support.logits(model, padded), float)[0]


def plain(model, context, continuation):
  """(nats, is_greedy) by the logits of all positions of the pair alone."""
  start, stop = len(context) - 1, len(context) + len(continuation) - 1
  logits = logits_of(model, [*context, *continuation])[start:stop]
  top = logits.max(-1, keepdims=True)
  logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  nats = -logprobs[np.arange(len(continuation)), continuation].sum()
  return nats, (logits.argmax(-1) == continuation).all()


def test_likelihoods_are_those_of_each_pair_alone(runner):
  """Packed beside others, in the order given; one is what greedy writes."""
  pairs = make_pairs()
  before = [*pairs[0][0]]
  for _ in range(3):
    logits = logits_of(runner.model, before)[len(before) - 1]
    before.append(int(logits.argmax()))
  pairs.insert(2, [before[:-3], before[-3:]])
  pairs.insert(3, [before[:-3], [*before[-3:-1], (before[-1] + 1) % 320]])
  found = likelihood.score(runner, pairs, rows=2, tokens=96)
  for pair, one in zip(pairs, found, strict=True):
    nats, is_greedy = plain(runner.model, *pair)
    assert one.nats == pytest.approx(nats, abs=1e-4)
    assert (one.tokens, one.is_greedy) == (len(pair[1]), is_greedy)
    assert one.cut == 0
  assert found[2].is_greedy and not found[3].is_greedy


@pytest.mark.parametrize(('rows', 'tokens'), [(1, 64), (3, 200), (8, 1024)])
def test_packing_changes_nothing(runner, rows, tokens):
  """However they are packed, and in whatever company."""
  pairs = make_pairs(((7, 1), (1, 9), (30, 4), (3, 3)))
  alone = [likelihood.score(runner, [pair], 1, 64)[0] for pair in pairs]
  found = likelihood.score(runner, [*pairs * 3], rows, tokens)
  for one, other in zip(found, alone * 3, strict=True):
    assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert one.is_greedy == other.is_greedy


@pytest.mark.parametrize(
  'axes', [dict(data=8), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_eight_devices_are_one(tiny, runner, axes):
  """Rows divide over data x fsdp, weights over fsdp and tensor."""
  model, values = tiny
  pairs = make_pairs() * 2
  alone = likelihood.score(runner, pairs, 2, 96)
  mesh = mesh_lib.make(**axes)
  rows = weights.rows(model)
  placed = {
    path: jax.device_put(x, mesh_lib.sharding(mesh, rows[path].dims, x.shape))
    for path, x in values.items()
  }
  with jax.set_mesh(mesh):
    tuned = policy.Policy(weights.fill(model, placed), chunk=16)
    found = likelihood.score(tuned, pairs, 2, 96)
  for one, other in zip(found, alone, strict=True):
    assert one.nats == pytest.approx(other.nats, abs=1e-4)
    assert one.is_greedy == other.is_greedy


def test_a_shape_is_compiled_once(runner):
  """Other pairs of like lengths, another number of batches: no new program."""
  pairs = make_pairs(((20, 5),) * 9)
  likelihood.score(runner, pairs, 2, 96)
  before = likelihood._predictions._cache_size()
  likelihood.score(runner, make_pairs(((25, 3),) * 40), 2, 96)
  assert likelihood._predictions._cache_size() == before


@pytest.mark.parametrize(
  ('lengths', 'rows', 'tokens', 'shape'),
  [
    (((20, 5),) * 40, 8, 96, (8, 96)),
    (((20, 5),) * 5, 8, 1024, (1, 128)),
    (((20, 5),) * 5, 8, 96, (2, 96)),
    (((90, 20),) * 9, 8, 64, (4, 128)),
    (((250, 7),) * 9, 8, 64, (1, 320)),
    (((250, 7),) * 9, 8, 1024, (3, 1024)),
    (((50, 7), (2, 1)), 1, 1, (1, 64)),
  ],
)
def test_a_batch_is_no_larger_than_it_need_be(lengths, rows, tokens, shape):
  """Nor than asked for, unless one pair is."""
  fitted = [likelihood._Fitted(*x, 0) for x in fitted_of(lengths)]
  source = likelihood._packed(fitted, rows, tokens, 256)
  assert (source.rows, source.tokens) == shape


def fitted_of(lengths):
  return [([3] * (a + b), b) for a, b in lengths]


def test_the_context_is_cut_from_its_left(runner):
  """To as many as the model may look at; the last token is not looked at."""
  context, continuation = make_pairs(((30, 4),))[0]
  pair = [(context, continuation)]
  (fits,) = likelihood.score(runner, pair, limit=33)
  assert fits.cut == 0
  (cut,) = likelihood.score(runner, pair, limit=20, too_long='truncate_context')
  (wanted,) = likelihood.score(runner, [(context[13:], continuation)])
  assert cut.cut == 13
  assert cut.nats == pytest.approx(wanted.nats, abs=1e-5)
  assert cut.nats != pytest.approx(fits.nats, abs=1e-3)


def test_no_pairs_are_no_likelihoods(runner):
  assert likelihood.score(runner, []) == []


@pytest.mark.parametrize(
  ('pair', 'given', 'words'),
  [
    (([], [5]), {}, 'pair 1: its context has no tokens'),
    (([5], []), {}, 'pair 1: its continuation has no tokens'),
    (([5] * 250, [6] * 8), {}, 'a context of 250 and a continuation of 8 tok'),
    (([5] * 5, [6] * 4), {'limit': 7}, 'looks at 7 at most'),
    (
      ([5] * 5, [6] * 8),
      {'limit': 7, 'too_long': 'truncate_context'},
      'leaves all of a continuation',
    ),
    (([5], [6]), {'too_long': 'drop'}, "too_long is 'drop'"),
    (([5], [6]), {'limit': 257}, 'limit is 257 tokens; wanted: 1 to the 256'),
    (([5], [6]), {'limit': 0}, 'limit is 0'),
    (([5], [6]), {'rows': 0}, 'rows is 0'),
    (([5], [6]), {'tokens': 0}, 'tokens is 0'),
  ],
)
def test_what_cannot_be_scored_is_refused(runner, pair, given, words):
  with pytest.raises(ValueError, match=words):
    likelihood.score(runner, [([5], [6]), pair], **given)


def test_spaces_before_a_continuation_are_its_own():
  """The text is tokenised whole, then split where the context ends."""
  encode = support.make_tokenizer().encode
  ids = encode('ab yes')
  found = likelihood.encode_pair(encode, 'ab ', 'yes')
  assert found == (ids[:2], ids[2:])
  assert found == likelihood.encode_pair(encode, 'ab', ' yes')


@pytest.mark.parametrize('texts', [(' ', 'yes'), ('', 'yes'), ('ab', '')])
def test_half_a_pair_is_refused(texts):
  encode = support.make_tokenizer().encode
  with pytest.raises(ValueError, match='wanted: one at least of each'):
    likelihood.encode_pair(encode, *texts)


QUESTIONS = [
  {'question': 'hi', 'choices': ['no', 'yes!'], 'answer': 1},
  {'question': 'Be', 'choices': ['a', 'b', 'é'], 'answer': 2},
]


def test_choices_by_sum_and_by_byte(runner):
  """Every choice's own likelihood; fewest nats, and fewest a byte."""
  encode = support.make_tokenizer().encode
  found = likelihood.choose(runner, QUESTIONS, encode)
  for row, one in zip(QUESTIONS, found, strict=True):
    nats = []
    for choice in row['choices']:
      pair = likelihood.encode_pair(encode, row['question'], f' {choice}')
      nats.append(likelihood.score(runner, [pair])[0].nats)
    assert [s.nats for s in one.scored] == pytest.approx(nats, abs=1e-4)
    by_byte = [n / len(c.encode()) for n, c in zip(nats, row['choices'])]
    assert one.taken == int(np.argmin(nats))
    assert one.taken_by_byte == int(np.argmin(by_byte))
    assert one.answer == row['answer']


def test_a_byte_is_a_byte(monkeypatch):
  """'é' has two; accuracies with their intervals."""
  nats = iter([2.0, 3.0, 1.0, 1.1, 1.9])

  def canned(runner, pairs, rows, tokens):
    return [likelihood.Scored(next(nats), 1, False) for _ in pairs]

  monkeypatch.setattr(likelihood, 'score', canned)
  encode = support.make_tokenizer().encode
  found = likelihood.choose(None, QUESTIONS, encode)
  assert [(c.taken, c.taken_by_byte) for c in found] == [(0, 1), (0, 2)]
  accuracies = likelihood.accuracies(found)
  assert accuracies['accuracy'].mean == 0
  assert accuracies['accuracy_by_byte'].mean == 1
  assert accuracies['accuracy'].high > 0.5  # Of two questions.


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'answer': 2}, 'question 0: answer 2 of 2 choices'),
    ({'answer': -1}, 'answer -1'),
    ({'answer': True}, 'answer True'),
    ({'choices': ['yes'], 'answer': 0}, 'of 1 choices'),
    ({'choices': 'no yes'}, "choices 'no yes'; wanted"),
    ({'choices': ['no', '']}, "choices \\['no', ''\\]; wanted"),
    ({'question': ''}, "question ''"),
    ({'question': None}, 'question None'),
  ],
)
def test_what_is_no_question_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    likelihood.choose(None, [QUESTIONS[0] | change], None)


def test_a_missing_key_is_named():
  with pytest.raises(ValueError, match="question 0 has no 'answer'"):
    likelihood.choose(None, [{'question': 'a', 'choices': ['b', 'c']}], None)


@pytest.mark.parity
def test_likelihoods_are_those_of_transformers(runner, tiny_dir):
  """In float32: to 1e-4, and the same greedy tokens."""
  import torch
  import transformers

  torch.set_num_threads(1)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tiny_dir, dtype=torch.float32
  )
  pairs = make_pairs()
  found = likelihood.score(runner, pairs, rows=2, tokens=96)
  for (context, continuation), one in zip(pairs, found, strict=True):
    with torch.no_grad():
      logits = theirs(torch.tensor([[*context, *continuation]])).logits[0]
    logits = logits[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    logprobs = logits.log_softmax(-1).gather(-1, wanted[:, None])
    assert one.nats == pytest.approx(-float(logprobs.sum()), abs=1e-4)
    assert one.is_greedy == bool((logits.argmax(-1) == wanted).all())
