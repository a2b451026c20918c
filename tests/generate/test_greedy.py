"""Greedy decoding with a cache equals the argmax of the full forward pass."""

import numpy as np
import pytest
import support

from tuner import adapt
from tuner.generate import greedy
from tuner.models import weights

NEVER = [-1, -1]  # Stop tokens that no model says.
LENGTHS = (3, 9, 21, 34, 1)
MAX_TOKENS = 6


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 320, length).tolist() for length in LENGTHS]


DYNAMIC = {'rope_type': 'dynamic', 'factor': 4.0, 'rope_theta': 10000.0}
CHANGES = {
  'base': {},
  # Shorter than most prompts, and than what is generated.
  'lora_window': dict(model_type='mistral', sliding_window=4),
  # A bucket of 64 would reach past 40, where this rope changes; the longest
  # prompt and its answer fill the 40 exactly.
  'dynamic': dict(max_position_embeddings=40, rope_parameters=DYNAMIC),
}


@pytest.fixture(scope='module', params=CHANGES)
def model(request, tmp_path_factory):
  path = tmp_path_factory.mktemp(request.param)
  support.write_model(path, **CHANGES[request.param])
  declared, values = support.load_model(path)
  if 'lora' in request.param:
    values = attach(declared, values)
  return weights.fill(declared, values)


def attach(declared, values):
  """A random LoRA on every matrix."""
  adaptation = adapt.lora(weights.rows(declared), rank=2)
  sizes = declared.config.sizes
  rng = np.random.default_rng(1)
  trainable = {
    name: 0.2 * rng.standard_normal(shape, np.float32)
    for name, shape in adaptation.shapes(sizes).items()
  }
  return adaptation.attach(values, trainable)


@pytest.fixture(scope='module')
def answers(model):
  return greedy.generate(model, prompts(), NEVER, MAX_TOKENS)


def test_equals_the_argmax_of_the_full_forward_step_by_step(model, answers):
  """Position t's argmax of one uncached pass is the token at t + 1."""
  width = max(LENGTHS) + MAX_TOKENS
  for prompt, answer in zip(prompts(), answers, strict=True):
    assert len(answer) == MAX_TOKENS
    ids = prompt + answer
    # Tokens after the last are not seen: causal.
    tokens = np.array([ids + [7] * (width - len(ids))])
    best = np.asarray(support.logits(model, tokens)).argmax(-1)[0]
    assert best[len(prompt) - 1 : len(ids) - 1].tolist() == answer


def test_independent_of_the_batch_and_its_padding(model, answers):
  """All together, or one by one and in another order."""
  alone = greedy.generate(model, prompts()[::-1], NEVER, MAX_TOKENS, rows=1)
  assert alone == answers[::-1]


@pytest.fixture(scope='module')
def base(tiny_dir):
  return weights.fill(*support.load_model(tiny_dir))


@pytest.fixture(scope='module')
def full(base):
  return greedy.generate(base, prompts(), NEVER, MAX_TOKENS)


def test_independent_of_a_longer_neighbour(base, full):
  """A neighbour of 100 tokens widens the batch from 64 to 128."""
  longer = [*prompts(), [5] * 100]
  found = greedy.generate(base, longer, NEVER, MAX_TOKENS)
  assert found[:-1] == full


def test_stops_at_stop_ids(base, full):
  """Each answer ends with its first stop token; others go on."""
  stops = [full[0][2], full[1][0]]
  found = greedy.generate(base, prompts(), stops, MAX_TOKENS)
  for answer, whole in zip(found, full, strict=True):
    ends = [i for i, token in enumerate(whole) if token in stops]
    assert answer == (whole[: ends[0] + 1] if ends else whole)
  assert len(found[1]) == 1
  assert max(map(len, found)) == MAX_TOKENS


def test_max_tokens_cuts(base, full):
  """A smaller limit gives the beginning of the same answers."""
  found = greedy.generate(base, prompts(), NEVER, 2)
  assert found == [answer[:2] for answer in full]


def test_no_prompts(base):
  assert greedy.generate(base, [], NEVER, 4) == []


@pytest.mark.parametrize(
  'prompts, max_tokens, message',
  [
    (
      [[1], [1] * 250],
      7,
      'prompt 1 has 250 tokens; with max_tokens = 7 it exceeds the '
      "model's 256 positions.",
    ),
    ([[1], []], 4, 'prompt 1 is empty.'),
  ],
)
def test_errors(base, prompts, max_tokens, message):
  with pytest.raises(ValueError) as error:
    greedy.generate(base, prompts, NEVER, max_tokens)
  assert str(error.value) == message
