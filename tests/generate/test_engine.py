"""What an engine answers is the model's, whatever shares the batch with it."""

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import support

from tuner.generate import engine, prefix, sampling

pytestmark = pytest.mark.usefixtures('quick_compiles', 'small')
LENGTHS = (3, 9, 21, 34, 1, 14, 33)
MAX_TOKENS = (9, 12, 7, 12, 6, 1, 12)
LONGEST = 46
STOPS = tuple(range(0, 320, 20))
NEVER = tuple(range(-16, 0))  # As many that no model says: the same programs.
EIGHT = (8, *NEVER[1:])
ROWS = 2


@pytest.fixture
def small(monkeypatch):
  """Buckets so small that these texts meet chunks and swaps."""
  monkeypatch.setattr(engine, 'WIDTHS', (16,))
  monkeypatch.setattr(engine, 'PREFILL_TOKENS', 32)
  monkeypatch.setattr(engine, 'FEW', 0)
  monkeypatch.setattr(prefix, 'CHUNK', 16)


def requests(begin=(), **own):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 320, length).tolist() for length in LENGTHS]
  return [
    engine.Request([*begin, *prompt], n, **own)
    for prompt, n in zip(prompts, MAX_TOKENS, strict=True)
  ]


def assert_same(found, expected):
  """The same tokens; log probabilities to what another shape rounds."""
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert (one.ids, one.ended) == (other.ids, other.ended)
    np.testing.assert_allclose(one.logprobs, other.logprobs, 1e-4, 1e-4)


def assert_follows_the_full_forward(model, request, answer):
  """Every token is the most likely, and its log probability is the model's."""
  ids = [*request.prompt, *answer.ids]
  tokens = np.array([ids + [7] * (LONGEST - len(ids))])  # Causal: unseen.
  start = len(request.prompt) - 1
  logits = support.logits(model, tokens)[0, start : len(ids) - 1]
  assert logits.argmax(-1).tolist() == answer.ids
  logprobs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logprobs, jnp.array(answer.ids)[:, None], 1)[:, 0]
  np.testing.assert_allclose(answer.logprobs, own, 1e-4, 1e-4)


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_equals_the_full_forward_in_every_kind_of_cache(kind):
  """Two rows for seven requests, beyond the window and through chunks."""
  model, asked = kinds.load(kind), requests()
  answers = engine.generate(model, asked, STOPS, rows=ROWS)
  for request, answer in zip(asked, answers, strict=True):
    assert_follows_the_full_forward(model, request, answer)
    is_stop = [token in STOPS for token in answer.ids]
    assert not any(is_stop[:-1])
    assert answer.ended == ('stop' if is_stop[-1] else 'length')
    assert is_stop[-1] or len(answer.ids) == request.max_tokens


def test_stacked_layers_equal_layers_apart(monkeypatch):
  """As accelerators run it."""
  model, asked = kinds.load('gemma3'), requests(begin=range(100, 117))
  expected = engine.generate(model, asked, STOPS, rows=ROWS)
  monkeypatch.setattr(engine, 'UNSTACKED', ())
  assert_same(engine.generate(model, asked, STOPS, rows=ROWS), expected)


@pytest.fixture(scope='module')
def llama():
  return kinds.load('llama')


def test_what_shares_the_batch_plays_no_part(llama, monkeypatch):
  """Two at a time; one by itself; one after another, in another order, in a
  cache that shrinks and grows."""
  asked = requests()
  expected = engine.generate(llama, asked, STOPS, ROWS)
  assert_same(engine.generate(llama, asked[3:4], STOPS, ROWS), expected[3:4])
  slots, resized = [], engine.steps.resized
  monkeypatch.setattr(engine, 'SLOTS', 16)
  monkeypatch.setattr(
    engine.steps, 'resized', lambda *a: slots.append(a[2]) or resized(*a)
  )
  found = engine.generate(llama, asked[::-1], STOPS, 1)[::-1]
  assert_same(found, expected)
  assert slots[0] == 64 and 16 in slots and 32 in slots[slots.index(16) :]
  assert {answer.ended for answer in expected} == {'stop', 'length'}


@pytest.mark.parametrize('kind, length', [('llama', 13), ('window', 30)])
def test_a_shared_prefix_changes_nothing(kind, length, monkeypatch):
  model, begin = kinds.load(kind), range(100, 100 + length)
  asked = requests(begin=begin)[:5]
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 10**9)
  assert prefix.length_of([one.prompt for one in asked]) == 0
  expected = engine.generate(model, asked, STOPS, rows=ROWS)
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 1)
  shared = prefix.length_of([one.prompt for one in asked])
  assert 0 < length - shared < prefix.MULTIPLE
  assert_same(engine.generate(model, asked, STOPS, rows=ROWS), expected)


def test_a_prefix_leaves_each_prompt_a_token_of_its_own(monkeypatch):
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 1)
  monkeypatch.setattr(prefix, 'MULTIPLE', 1)
  assert prefix.length_of([[1, 2, 3], [1, 2, 3]]) == 2
  assert prefix.length_of([[1, 2, 3], [1, 2, 4, 5]]) == 2
  assert prefix.length_of([[1, 2], [2, 2]]) == 0
  assert prefix.length_of([[1]]) == 0


def test_a_rope_of_the_texts_length_shares_no_prefix(monkeypatch):
  monkeypatch.setattr(prefix, 'LEAST_SAVED', 1)
  model, asked = kinds.load('dynamic'), requests(begin=range(12))[:3]
  found = prefix.find(model, asked, is_split=True)
  assert found.length == 0
  answers = engine.generate(model, asked, STOPS, ROWS)
  for request, answer in zip(asked, answers, strict=True):
    assert_follows_the_full_forward(model, request, answer)


def test_a_window_keeps_no_more_slots_than_it_is_long():
  """Rings of six beside layers that keep all."""
  model = kinds.load('gemma3')
  memory = engine.steps.empty(model, 4, 64)
  sizes = {name: x[0].shape for name, x in memory.items()}
  assert sizes['window 6'][3] == 6 and sizes['window None'][3] == 64
  assert sizes['window 6'][0] + sizes['window None'][0] == model.config.L


def test_programs_are_compiled_once_a_shape(llama):
  """As many as there are widths, and sizes of the cache; not more the next."""

  def programs():
    return engine.steps.decode._cache_size(), engine.steps.prefill._cache_size()

  asked = [engine.Request([5] * n, 9) for n in (2, 3, 4, 5, 6, 7) * 3]
  engine.steps.decode.clear_cache()
  engine.steps.prefill.clear_cache()
  engine.generate(llama, asked, (319, *NEVER[1:]), ROWS)
  assert programs() == (1, 1)
  asked = [dataclasses.replace(one, max_tokens=5, seed=3) for one in asked]
  engine.generate(llama, asked[1:], (3, *NEVER[1:]), ROWS)
  assert programs() == (1, 1)


def test_few_texts_are_answered_by_two_programs(llama, monkeypatch):
  """One width, one cache, layers stacked; no answer differs."""
  asked, sizes = requests(), set()
  expected = engine.generate(llama, asked, STOPS, ROWS)
  prefill, decode = engine.steps.prefill, engine.steps.decode

  def prefilled(model, memory, *others):
    sizes.add(('width', others[3].shape[1]))
    return prefill(model, memory, *others)

  def decoded(model, memory, *others):
    sizes.add(('slots', memory['window None'][0].shape[3]))
    return decode(model, memory, *others)

  monkeypatch.setattr(engine.steps, 'prefill', prefilled)
  monkeypatch.setattr(engine.steps, 'decode', decoded)
  monkeypatch.setattr(engine, 'WIDTHS', (8, 16, 40))
  monkeypatch.setattr(engine, 'SLOTS', 16)
  monkeypatch.setattr(engine, 'FEW', sum(LENGTHS) + sum(MAX_TOKENS))
  assert_same(engine.generate(llama, asked, STOPS, ROWS), expected)
  assert sizes == {('width', 40), ('slots', 64)}


def test_max_tokens_cut_and_none_are_asked_for(llama):
  asked = requests()
  whole = engine.generate(llama, asked, NEVER, ROWS)
  cut = [
    dataclasses.replace(one, max_tokens=min(i, one.max_tokens))
    for i, one in enumerate(asked)
  ]
  for i, (one, full) in enumerate(
    zip(engine.generate(llama, cut, NEVER, ROWS), whole)
  ):
    assert one.ids == full.ids[:i]
  assert engine.generate(llama, [], []) == []


def text_of(ids):
  return ''.join(chr(65 + token % 26) for token in ids)


def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(llama):
  asked = requests()
  whole = engine.generate(llama, asked, NEVER, ROWS)
  stop = text_of(whole[1].ids)[4:6]
  asked = [dataclasses.replace(one, stop=('never', stop)) for one in asked]
  found = engine.generate(llama, asked, NEVER, ROWS, text_of)
  for one, full in zip(found, whole, strict=True):
    text = text_of(full.ids)
    end = text.find(stop) + 2 if stop in text else len(text)
    assert one.ids == full.ids[:end]
    assert one.ended == ('text' if stop in text else 'length')
  assert found[1].ended == 'text'


def test_sampled_answers_are_functions_of_the_request(llama):
  """Neighbours, greedy ones among them, draw nothing of a row's numbers."""
  drawn = sampling.Sampling(temperature=1.5, top_k=50)
  asked = [
    dataclasses.replace(one, sampling=drawn, seed=i)
    for i, one in enumerate(requests())
  ]
  expected = engine.generate(llama, asked, NEVER, ROWS)
  mixed = [x for pair in zip(requests(), asked, strict=True) for x in pair]
  found = engine.generate(llama, mixed[::-1], NEVER, ROWS)[::-1]
  assert_same(found[1::2], expected)
  greedy = engine.generate(llama, requests(), NEVER, ROWS)
  assert_same(found[::2], greedy)
  assert [a.ids for a in greedy] != [a.ids for a in expected]
  again = [dataclasses.replace(one, seed=one.seed + 99) for one in asked]
  assert engine.generate(llama, again, NEVER, ROWS) != expected


class Even:
  """A constraint: even tokens, and after the third the stop token 8 alone."""

  def __init__(self):
    self.said = []

  def allowed(self):
    if len(self.said) < 3:
      return np.full(320 // 32, 0x55555554 & ~(1 << 8), np.uint32)
    return np.array([1 << 8] + [0] * 9, np.uint32)

  def accept(self, token):
    self.said.append(token)


def test_a_constraint_allows_what_it_allows_and_the_rest_goes_on(llama):
  asked = requests()
  free = engine.generate(llama, asked, EIGHT, ROWS)
  held = [
    dataclasses.replace(one, constraint=Even(), max_tokens=6) for one in asked
  ]
  mixed = [*asked[:3], *held]
  found = engine.generate(llama, mixed, EIGHT, ROWS)
  assert_same(found[:3], free[:3])
  for request, answer in zip(held, found[3:], strict=True):
    assert request.constraint.said == answer.ids
    assert len(answer.ids) == 4 and answer.ended == 'stop'
    assert all(token % 2 == 0 for token in answer.ids)
    ids = [*request.prompt, *answer.ids]
    tokens = np.array([ids + [7] * (LONGEST - len(ids))])
    logprobs = jax.nn.log_softmax(support.logits(llama, tokens)[0])
    start = len(request.prompt) - 1
    for i, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs)):
      assert abs(logprobs[start + i, token] - logprob) < 1e-3


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(prompt=[]), 'prompt 1 is empty.'),
    (
      dict(prompt=[1] * 250, max_tokens=7),
      'prompt 1 has 250 tokens; with max_tokens = 7 it exceeds the '
      "model's 256 positions.",
    ),
    (dict(max_tokens=-1), 'request 1: max_tokens is -1; at least 0.'),
    (
      dict(adapter=1),
      'request 1: adapter 1; the model has 0, numbered from 1, and 0 is the '
      'base alone.',
    ),
    (
      dict(stop=('x',)),
      "request 1: stop strings ('x',) need decode, from token ids to text.",
    ),
  ],
)
def test_errors(llama, changes, message):
  fine = engine.Request([1, 2], 3)
  with pytest.raises(ValueError) as error:
    engine.generate(llama, [fine, dataclasses.replace(fine, **changes)], [])
  assert str(error.value) == message


def test_a_matcher_is_of_one_request(llama):
  one = engine.Request([1, 2], 3, constraint=Even())
  with pytest.raises(ValueError, match='two requests share a matcher'):
    engine.generate(llama, [one, one], [8])
  with pytest.raises(ValueError, match='rows: 0; at least one'):
    engine.generate(llama, [], [8], rows=0)
