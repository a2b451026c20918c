"""Greedy decoding is the engine without any more to say.

What an answer is, and that nothing but its prompt decides it, tests of the
engine prove.
"""

import kinds
import pytest
import test_engine

from tuner.generate import engine, greedy

pytestmark = pytest.mark.usefixtures('quick_compiles', 'small')
small = test_engine.small


def test_equals_the_engine_and_stops_where_it_stops():
  model = kinds.load('llama')
  prompts = [one.prompt for one in test_engine.requests()]
  asked = [engine.Request(prompt, 6) for prompt in prompts]
  stops = test_engine.STOPS
  expected = engine.generate(model, asked, stops, test_engine.ROWS)
  found = greedy.generate(model, prompts, stops, 6, test_engine.ROWS)
  assert found == [answer.ids for answer in expected]
  assert {answer.ended for answer in expected} == {'stop', 'length'}
  assert greedy.generate(model, [], stops, 6) == []


def test_errors():
  with pytest.raises(ValueError, match='prompt 1 is empty'):
    greedy.generate(kinds.load('llama'), [[1], []], (), 4)
