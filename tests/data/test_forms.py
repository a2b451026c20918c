"""Each form gives the row that is written out here, and no other."""

import json
import pathlib
import pickle

import hypothesis
import pytest
from hypothesis import strategies as st

from tuner.data import files, forms, records, rows

GOLDEN = pathlib.Path(__file__).parent / 'forms'


def turn(role, content, **more):
  return {'role': role, 'content': content, **more}


def user(content, **more):
  return turn('user', content, **more)


def bot(content, **more):
  return turn('assistant', content, **more)


def call(name, arguments, **more):
  function = {'name': name, 'arguments': arguments}
  return {**more, 'type': 'function', 'function': function}


def tool(name, **more):
  return {'type': 'function', 'function': {'name': name, **more}}


def chat(*messages, **fields):
  return rows.Row(messages, **fields)


HELLO = chat(user('Hello'), bot('Hi.'))
BRIEF = turn('system', 'Be brief.')
SKY = {
  'messages': (user('Sky?'), bot('Blue.')),
  'kind': 'preference',
  'rejected': (bot('Green.'),),
}
BLUE = {
  'messages': (user('Sky?'), bot('Blue.')),
  'kind': 'label',
  'label': True,
}
MATHS = {'messages': (user('6 times 7?'),), 'kind': 'reward', 'answer': '42'}
CITY = {'type': 'object', 'properties': {'city': {'type': 'string'}}}
ROWS = {
  'alpaca.json': [
    ('alpaca', chat(user('Name a fruit.'), bot('A pear.'))),
    (
      'alpaca',
      chat(
        BRIEF,
        user('Hello'),
        bot('Hi.'),
        user('Make it plural.\npear'),
        bot('pears'),
      ),
    ),
  ],
  'sharegpt.json': [
    (
      'sharegpt',
      chat(
        BRIEF,
        user('Is it cold in Oslo?'),
        bot('', tool_calls=[call('weather', {'city': 'Oslo'})]),
        turn('tool', '{"celsius": -3}'),
        bot('Yes, -3 degrees.'),
        tools=(
          tool(
            'weather', description='Of a city', parameters={'type': 'object'}
          ),
        ),
      ),
    ),
    ('sharegpt', HELLO),
  ],
  'openai.jsonl': [
    (
      'messages',
      chat(
        turn('system', 'Marv is curt.'),
        user('Capital of Peru?'),
        bot('Lima', train=False),
        user('Politely?'),
        bot('It is Lima, dear.', train=True),
      ),
    ),
    (
      'messages',
      chat(
        user('Rain in Lima and in Oslo?'),
        bot(
          '',
          tool_calls=[
            call('rain', {'city': 'Lima'}, id='a'),
            call('rain', {'city': 'Oslo'}, id='b'),
          ],
        ),
        turn('tool', 'yes', tool_call_id='b'),
        turn('tool', 'no', tool_call_id='a'),
        bot('Only in Oslo.'),
        tools=(tool('rain', description='Whether it rains', parameters=CITY),),
        extra=('parallel_tool_calls',),
      ),
    ),
    (
      'messages',
      chat(
        turn('system', 'Call f.'),
        user('Go', name='ann'),
        bot('', tool_calls=[call('f', {})]),
        tools=(tool('f', parameters={}),),
        weight=0.5,
      ),
    ),
  ],
  'openai_preference.jsonl': [
    (
      'preference',
      chat(
        user('How cold is it?'),
        bot('Cold: bring a coat.'),
        kind='preference',
        rejected=(bot('Very.'),),
        extra=('input.parallel_tool_calls',),
      ),
    )
  ],
  'evals.jsonl': [
    (
      'ideal',
      chat(turn('system', 'Answer with a letter.'), user('A or B?'), bot('B')),
    )
  ],
  'preference.jsonl': [
    ('preference', rows.Row(**SKY)),
    ('preference', rows.Row(**SKY)),
    ('preference', rows.Row(**SKY, extra=('prompt_id',))),
    *[('preference', rows.Row(**SKY))] * 4,
  ],
  'label.jsonl': [('label', rows.Row(**BLUE))] * 5,
  'reward.jsonl': [('reward', rows.Row(**MATHS))] * 3,
  'pairs.csv': [
    (
      'prompt',
      chat(user('Say "hi", please'), bot('Hi,\nthere'), extra=('id',)),
    ),
    ('prompt', chat(user('Bye'), bot('Bye.'), extra=('id',))),
  ],
  'conversations.tsv': [
    ('messages', chat(BRIEF, user('Hello'), bot('Hi.'))),
  ],
  'wiki.txt': [
    ('text', chat(kind='text', text='A first document.')),
    ('text', chat(kind='text', text='A second one, é.')),
  ],
  'c4.jsonl': [
    ('text', chat(kind='text', text='A web page.\nTwo lines.', extra=('url',)))
  ],
  'reasoning.jsonl': [
    ('messages', chat(user('2 + 2?'), bot('4', reasoning_content='Easy.'))),
    (
      'messages',
      chat(
        user('2 + 2?', train=False),
        bot('4', reasoning_content='Easy.', train=True),
      ),
    ),
  ],
  'others.jsonl': [
    (name, HELLO) for name in 'prompt input question prompt ideal'.split()
  ],
}


def read_file(path, **arguments):
  read = forms.reader(**arguments)
  found = [
    read(records.parse(item.payload), '') for item in files.items(str(path))
  ]
  return [(form, row) for row, form in found]


@pytest.mark.parametrize('name', ROWS)
def test_golden(name):
  assert read_file(GOLDEN / name) == ROWS[name]


def test_every_form_and_file_is_golden():
  assert {form for found in ROWS.values() for form, _ in found} == set(
    forms.FORMS
  )
  names = {path.name for path in GOLDEN.iterdir()} - {'images.jsonl'}
  assert names == set(ROWS)


def test_images_are_refused():
  with pytest.raises(rows.Refused, match='^images: found a list, but images, '):
    read_file(GOLDEN / 'images.jsonl')


def read_one(record, **arguments):
  return forms.reader(**arguments)(record, 'file:1')[0]


def test_forms_may_be_mixed():
  """What was recognised before says nothing about the next record."""
  read = forms.reader()
  given = [pair for name in ROWS for pair in raw(GOLDEN / name)]
  for first, form in given:
    for second, other in given:
      assert read(first, '')[1] == form
      assert read(second, '')[1] == other


def raw(path):
  items = [records.parse(item.payload) for item in files.items(str(path))]
  return list(zip(items, (form for form, _ in ROWS[path.name]), strict=True))


@pytest.mark.parametrize('name', forms.FORMS)
def test_a_form_can_be_named(name):
  """It reads its own rows as before, and says what is missing of others."""
  read = forms.reader(name)
  for record, form in (pair for file in ROWS for pair in raw(GOLDEN / file)):
    if form == name:
      assert read(record, '') == forms.reader()(record, '')
  with pytest.raises(rows.Refused, match=f"missing; .* form '{name}'$"):
    read({'nothing': 1}, '')


def test_a_named_form_leaves_the_rest_alone():
  record = {'prompt': 'a', 'completion': 'b', 'label': 1, 'text': 'ab'}
  row = read_one(record, form='prompt')
  assert (row.kind, row.extra) == ('chat', ('label', 'text'))
  row = read_one({'text': 'a', 'category': 'b'}, form='text')
  assert (row.text, row.extra) == ('a', ('category',))


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="'mesages' is none; did you mean 'mess"):
    forms.reader('mesages')
  with pytest.raises(ValueError, match="'promt' is no column.* 'prompt'"):
    forms.reader(columns={'promt': 'a'})
  with pytest.raises(ValueError, match='columns.prompt: 3, wanted a column'):
    forms.reader(columns={'prompt': 3})


def test_columns():
  """Ours -> the file's; what had that name makes room; faults say theirs."""
  columns = {'prompt': 'text', 'completion': 'category', 'system': 'rules'}
  record = {'text': 'a', 'category': 'b', 'prompt': 'c'}
  row = read_one(record, columns=columns, keep=True)
  assert row.messages == (user('a'), bot('b'))
  assert row.extra == ('source_prompt',)
  assert row.carried == {'source_prompt': 'c'}
  row = read_one({**record, 'rules': 'd'}, columns=columns)
  assert row.messages[0] == turn('system', 'd')
  for wrong, message in (
    ({'text': 'a', 'category': 3}, 'category: found a number'),
    ({'text': 'a'}, 'category: missing beside text'),
    ({'text': '', 'category': 'b'}, 'text: found an empty string'),
    ({**record, 'rules': 3}, 'rules: found a number'),
  ):
    with pytest.raises(rows.Refused, match=f'^{message}; wanted'):
      read_one(wrong, columns=columns)


def test_names_of_fields_are_the_files():
  read = forms.reader(columns={'messages': 'dialogue'})
  with pytest.raises(rows.Refused, match=r'^dialogue\[0\]\.value: found null;'):
    read({'dialogue': [{'from': 'human', 'value': None}]}, '')
  with pytest.raises(rows.Refused, match=r'^chosen\.value: found an empty'):
    read_one(
      {'prompt': 'a', 'chosen': {'from': 'gpt', 'value': ''}, 'rejected': 'b'}
    )


def test_what_is_carried():
  record = {
    'messages': [user('a', id=1), bot('b')],
    'topic': None,
    'images': [],
    'tools': None,
  }
  row = read_one(record, keep=True)
  assert row.extra == ('images', 'messages[].id', 'topic')
  assert row.carried == {
    'topic': None,
    'images': [],
    'source_messages': record['messages'],
  }
  assert read_one(record).carried == {}


def test_prompt_of_messages():
  """Answers that are given in a prompt are not learned, if they do not say."""
  record = {
    'prompt': [user('a'), bot('b'), user('c'), bot('d', train=True), user('e')],
    'completion': [
      bot('', tool_calls=[call('f', {})]),
      turn('tool', 'g'),
      bot('h'),
    ],
  }
  row = read_one(record)
  assert row.n_prompt == 5
  assert [message.get('train') for message in row.prompt] == [
    None,
    False,
    None,
    True,
    None,
  ]
  assert row.reference == 'h'
  assert 'train' not in row.messages[5]


def test_preference_of_several_turns():
  asked = [user('a'), bot('b'), user('c')]
  calls = [bot('', tool_calls=[call('f', {})]), turn('tool', 'd'), bot('e')]
  row = read_one({'chosen': asked + calls, 'rejected': [*asked, bot('g')]})
  assert row.prompt == tuple(asked)
  assert row.messages[3:] == tuple(calls)
  assert row.rejected == (bot('g'),)
  row = read_one({'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'system': 's'})
  assert row.prompt == (turn('system', 's'), user('a'))


def test_what_a_label_is():
  """A class is no label; in cells of CSV true and false are text."""
  record = {'prompt': 'a', 'completion': 'b'}
  read = forms.reader()
  for value, label in (
    (True, True),
    (False, False),
    ('True', True),
    ('false', False),
    ('complaint', None),
  ):
    row, _ = read({**record, 'label': value}, '')
    assert (row.label, row.kind == 'label') == (label, label is not None)
  for value in (None, 1, 0, '', '1', [True]):
    with pytest.raises(rows.Refused, match='^label: found .*true or false'):
      read({**record, 'label': value}, '')


def test_messages_as_json_in_a_cell():
  """Whole lists of messages, and what is beside them; prompts stay text."""
  asked = json.dumps([user('a')])
  whole = json.dumps([user('a'), bot('b')])
  for messages, kind in ((asked, 'reward'), (whole, 'chat')):
    row = read_one({'messages': messages, 'answer': 'c'})
    assert row.kind == kind
    assert row.messages[0] == user('a')
  row = read_one({'conversations': asked, 'chosen': 'b', 'rejected': 'c'})
  assert row.messages == (user('a'), bot('b'))
  assert read_one({'prompt': asked, 'answer': 'c'}).messages == (user(asked),)
  for column in ('messages', 'conversations'):
    with pytest.raises(rows.Refused, match='not JSON .*; wanted: a list$'):
      read_one({column: '[a', 'answer': 'c'})


def test_an_answer_beside_a_whole_chat_is_not_read():
  read = forms.reader()
  row, _ = read({'messages': [user('a'), bot('b')], 'answer': 'c'}, '')
  assert (row.kind, row.extra) == ('chat', ('answer',))
  row, _ = read({'messages': [user('a')], 'answer': 'c'}, '')
  assert (row.kind, row.extra) == ('reward', ())


@pytest.mark.parametrize('answer', [7, 1.5, ['a', 1], {'a': None}, False, 'x'])
def test_an_answer_is_any_json(answer):
  assert read_one({'prompt': 'a', 'answer': answer}).answer == answer


@pytest.mark.parametrize(
  ('value', 'weight'), [(0, 0.0), (2, 2.0), ('0.5', 0.5), (None, 1.0), ('', 1)]
)
def test_weight(value, weight):
  record = {'prompt': 'a', 'completion': 'b', 'weight': value}
  assert read_one(record).weight == weight


@pytest.mark.parametrize('weight', [float('nan'), float('inf'), -0.1, '-1'])
def test_weight_of_a_table(weight):
  """A column of floats can hold what JSON cannot."""
  with pytest.raises(rows.Refused, match='^weight: found .*0 or more$'):
    read_one({'prompt': 'a', 'completion': 'b', 'weight': weight})


NESTED = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=6,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(NESTED, st.sampled_from(['arguments', 'answer', 'extra']))
def test_json_is_kept(value, place):
  """Nulls, too, inside arguments, answers and columns that are not read."""
  call_ = call('f', {'a': value})
  given = {'messages': [user('a'), bot('', tool_calls=[call_])]}
  if place == 'answer':
    given = {'prompt': 'a', 'answer': {'a': value}}
  elif place == 'extra':
    given = {'prompt': 'a', 'completion': 'b', 'x': value}
  line = json.dumps(given).encode()
  hypothesis.assume('\\u0000' not in line.decode() or place == 'extra')
  row = read_one(records.parse(line), keep=True)
  found = {
    'arguments': lambda: row.messages[1]['tool_calls'] == [call_],
    'answer': lambda: row.answer == {'a': value},
    'extra': lambda: row.carried == {'x': value},
  }
  assert found[place]()


JSON = NESTED | st.dictionaries(
  st.sampled_from(sorted(forms.COLUMNS)), NESTED, max_size=4
)


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(
  st.dictionaries(st.sampled_from(sorted(forms.RESERVED)), JSON, max_size=5),
  st.sampled_from([None, *forms.FORMS]),
)
def test_anything_is_read_or_refused(record, form):
  """No record, however odd, gets another error than Refused."""
  try:
    row = read_one(record, form=form, keep=True)
  except rows.Refused as refused:
    assert '; wanted: ' in str(refused)
  else:
    assert rows.loads(rows.dumps(row), row.where) == row


MESSAGE = st.fixed_dictionaries(
  {},
  optional={
    'role': st.sampled_from('system user assistant tool x'.split()) | NESTED,
    'from': st.sampled_from('human gpt function_call observation'.split()),
    'content': st.sampled_from(['a', '', None]) | NESTED,
    'value': st.sampled_from(['a', '{"name": "f", "arguments": {}}']) | NESTED,
    'tool_calls': st.lists(st.just(call('f', {})) | NESTED, max_size=2)
    | NESTED,
    'tool_call_id': NESTED,
    'weight': NESTED,
    'thinking': NESTED,
    'name': NESTED,
    'function_call': NESTED,
  },
)


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(
  st.sampled_from('messages conversations prompt chosen completion'.split()),
  st.lists(MESSAGE | NESTED, max_size=4),
  st.fixed_dictionaries(
    {},
    optional={
      'rejected': st.just('b') | st.lists(MESSAGE, max_size=3),
      'completion': st.just('b'),
      'prompt': st.just('a'),
      'tools': NESTED,
      'answer': NESTED,
      'label': NESTED,
    },
  ),
)
def test_any_messages_are_read_or_refused(column, messages, more):
  test_anything_is_read_or_refused.hypothesis.inner_test(
    {**more, column: messages}, None
  )


def test_a_reader_is_made_anew_from_what_made_it():
  """Workers are given the arguments."""
  arguments = pickle.loads(pickle.dumps(('prompt', {'prompt': 'x'}, True)))
  row, form = forms.reader(*arguments)({'x': 'a', 'completion': 'b'}, 'f:1')
  assert (row.where, form, row.messages) == (
    'f:1',
    'prompt',
    (user('a'), bot('b')),
  )


def test_some_columns_are_carried_by_name():
  """Read by the form or not, called as in the file; the rest is extra."""
  record = {'text': 'a', 'completion': 'b', 'answers': ['b', 'c'], 'id': 7}
  columns = {'prompt': 'text'}
  row = read_one(record, columns=columns, keep=('answers', 'text', 'none'))
  assert row.carried == {'answers': ['b', 'c'], 'text': 'a'}
  assert row.extra == ('id',)
  row = read_one(record, columns=columns, keep=())
  assert row == read_one(record, columns=columns)
  with pytest.raises(rows.Refused, match=r'^answers\[0\]: .*surrog'):
    read_one(
      {**record, 'answers': ['\ud800']}, keep=('answers',), columns=columns
    )
