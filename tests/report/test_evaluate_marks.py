"""Where an answer differs from the wanted one: laws, then examples."""

import hypothesis
import pytest
from hypothesis import strategies as st

from tuner.report import evaluate_marks

TEXTS = st.text(alphabet='ab ,{"\n', max_size=60)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(TEXTS, TEXTS)
def test_pieces_are_the_text_and_what_is_not_marked_is_in_both(text, wanted):
  pieces = evaluate_marks.differences(text, wanted)
  assert ''.join(piece for piece, _ in pieces) == text
  at = 0
  for piece, differs in pieces:
    if not differs:  # In their order, and each once.
      at = wanted.index(piece, at) + len(piece)
  assert any(differs for _, differs in pieces) == (text != wanted)


@pytest.mark.parametrize(
  ('text', 'wanted', 'marked'),
  [
    ('a b c', 'a b c', 'a b c'),
    ('a x c', 'a b c', 'a [x] c'),
    ('card_lost', 'card_arrival', '[card_lost]'),
    ('', 'a', '[]'),
    ('a', '', '[a]'),
    ('f(1, 2)', 'f(1, 3)', 'f(1, [2])'),
    ('one two five', 'one two three four five', 'one two []five'),
    ('one x y two', 'one two', 'one [x y ]two'),
    ('{"a": 1, "c": 3}', '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "[]c": 3}'),
    ('no such thing at all', 'one two three', '[no such thing at all]'),
  ],
)
def test_examples(text, wanted, marked):
  shown = ''.join(
    f'[{piece}]' if differs else piece
    for piece, differs in evaluate_marks.differences(text, wanted)
  )
  assert shown == marked


def test_long_texts_differ_from_the_first_to_the_last_difference():
  words = [f'w{i}' for i in range(400)]
  other = ['x' if 0 < i < 399 and i % 2 else w for i, w in enumerate(words)]
  pieces = evaluate_marks.differences(' '.join(other), ' '.join(words))
  assert [differs for _, differs in pieces] == [False, True, False]
  assert pieces[0][0] == 'w0 ' and pieces[2][0].startswith(' w398 w399')


@pytest.mark.parametrize('most', [0, 1, 3, 4, 5, 99])
def test_the_first_characters_keep_their_marks(most):
  pieces = [('abc', False), ('', True), ('de', True)]
  kept = evaluate_marks.first(pieces, most)
  assert ''.join(piece for piece, _ in kept) == 'abcde'[:most]
  assert [differs for piece, differs in kept if piece] == (
    [differs for piece, differs in pieces if piece][
      : len([k for k, _ in kept if k])
    ]
  )
