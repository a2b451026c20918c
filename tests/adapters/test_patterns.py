"""Regular expressions that nobody vouches for: what they match, how long."""

import re
import time

import pytest

from tuner.adapters import patterns

NAMES = [
  f'model.layers.{i}.{part}'
  for i in (0, 1, 11)
  for part in ('self_attn.q_proj', 'self_attn.k_proj', 'mlp.up_proj')
]
END = r'(.*\.)?'


@pytest.mark.parametrize(
  'text',
  [
    'q_proj',
    'layers.1.self_attn.q_proj',
    'layers.1',
    '',
    r'.*\.(0|11)\..*q_proj',
    r'(?i).*Q_PROJ',
    r'(?!.*mlp).*_proj',
    r'layers\.\d+\.mlp\.up_proj',
  ],
)
@pytest.mark.parametrize('start', ['', END])
def test_they_match_as_peft_does(text, start):
  """Whole names, or ends of names for keys of rank_pattern."""
  expected = {name for name in NAMES if re.fullmatch(text, name)}
  if start and text[:4] == '(?i)':
    with pytest.raises(ValueError, match='global flags not at the start'):
      patterns.find([patterns.Pattern('key', text, start)], NAMES)
    return
  if start:
    regex = rf'(.*\.)?({text})$'
    expected = {name for name in NAMES if re.match(regex, name)}
  wanted = patterns.Pattern('key', text, start)
  assert patterns.find([wanted], NAMES) == {wanted: expected}


@pytest.mark.parametrize('text', [r'(\w+.?)+!', r'(\w|.)*!', r'.*' * 30 + '!'])
def test_one_that_takes_for_ever_is_ended(monkeypatch, text):
  monkeypatch.setattr(patterns, 'TIMEOUT_S', 0.5)
  start = time.monotonic()
  with pytest.raises(ValueError) as error:
    patterns.find([patterns.Pattern('target_modules', text)], NAMES)
  assert str(error.value) == (
    f'target_modules: {text!r}: matching took longer than 0.5 s; name modules '
    'instead'
  )
  assert time.monotonic() - start < 20


def test_one_that_cannot_be_compiled_is_named():
  """Whatever the compiler stumbles over."""
  for text in ('(' * 5000 + ')' * 5000, 'a{99999999999999999999}', r'(a)\2'):
    with pytest.raises(ValueError, match='^rank_pattern: .*no regular expr'):
      patterns.find([patterns.Pattern('rank_pattern', text, END)], NAMES)
