"""Whatever the logits, an answer that ends satisfies its constraint."""

import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import llguidance
import numpy as np
import pytest
import support
import tokenizers
import transformers
from tokenizers import decoders, models

from tuner.generate import constrain, engine, guidance, sampling
from tuner.models import weights

Constraint = constrain.Constraint
SIZE = 401  # The tokenizer has 282 tokens; the rest pads the embedding.
STOPS = (2, 0)
LIMIT = 400
ROWS = 80
choose = jax.jit(sampling.choose, compiler_options=support.QUICK)

PERSON = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'minLength': 1, 'maxLength': 5},
    'age': {'type': 'integer', 'minimum': 7, 'maximum': 120},
    'tags': {
      'type': 'array',
      'items': {'enum': ['yes', 'no', None, 'né"e']},
      'maxItems': 3,
    },
    'at': {'type': 'string', 'pattern': '^[a-c]{2}[0-9]?$'},
  },
  'required': ['name', 'tags'],
  'additionalProperties': False,
}
ANY_ORDER = {
  'type': 'object',
  'patternProperties': {'^(Be|hi)$': {'type': ['number', 'boolean']}},
  'additionalProperties': False,
}
TREE = {
  '$ref': '#/$defs/node',
  '$defs': {
    'node': {
      'type': 'array',
      'items': {'anyOf': [{'$ref': '#/$defs/node'}, {'type': 'null'}]},
      'maxItems': 2,
    }
  },
}
SCHEMAS = {'person': PERSON, 'any_order': ANY_ORDER, 'tree': TREE}
REGEXES = {
  'words': '(yes|no)( (yes|no)){0,3}',
  'maybe empty': 'a*',
  'unicode': '[é-ü☃]{1,4}!?',
  'date': r'[0-9]{4}-(0[1-9]|1[0-2])-([0-2][0-9]|3[01])',
  'newlines': '(user\n)+/?"?',
}
# Valid texts, in ways of writing that a model may have learnt.
VALID = [
  (PERSON, '{"name":"hi","tags":[]}'),
  (PERSON, '{"name": "hi", "tags": ["yes", null]}'),
  (PERSON, ' {\n  "name": "\\u00e9\\n",\n  "tags": ["né\\"e"]\n}\n'),
  (PERSON, '{"name":"😀é","age":42,"tags":["no","no"],"at":"ab1"}'),
  (ANY_ORDER, '{"hi":1.5e3,"Be":true}'),
  (ANY_ORDER, '{"Be":-0.0,"hi":false}'),
  (TREE, '[[null],[[],null]]'),
  (None, '{"a": [1, {"b": "\\ud83d\\ude00"}], "c": null}'),
  (None, '"system"'),
  (None, '-12'),
]


def make_bytes_of_pieces():
  """A tokenizer of the other kind: pieces with ▁ for a space, and bytes."""
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2}
  for byte in range(256):
    vocab[f'<0x{byte:02X}>'] = len(vocab)
  for piece in '▁{}[]":,0123456789abchinotyesBe-.ul':
    vocab.setdefault(piece, len(vocab))
  vocab['▁{'] = len(vocab)
  model = models.BPE(
    vocab=vocab, merges=[('▁', '{')], unk_token='<unk>', byte_fallback=True
  )
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  backend.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  backend.add_special_tokens(['<unk>', '<s>', '</s>'])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token='</s>', unk_token='<unk>'
  )


MAKERS = {'bytes': support.make_tokenizer, 'pieces': make_bytes_of_pieces}


@pytest.fixture(scope='module', params=MAKERS)
def tokenizer(request):
  return MAKERS[request.param]()


@pytest.fixture(scope='module')
def vocabulary(tokenizer):
  return constrain.Vocabulary(tokenizer, SIZE, STOPS)


def json_constraint(schema):
  if schema is None:
    return Constraint('json')
  return Constraint('json_schema', json.dumps(schema))


def is_valid(constraint, text) -> bool:
  """By Python's own judges."""
  if constraint.kind == 'regex':
    return bool(re.fullmatch(constraint.text, text))
  try:
    value = json.loads(text)
  except ValueError:
    return False
  schema = json.loads(constraint.text or '{}')
  return jsonschema.Draft202012Validator(schema).is_valid(value)


def ids_of(words, size=SIZE):
  """The ids whose bits are set."""
  assert words.dtype == np.uint32 and words.shape == (-(-size // 32),)
  bits = np.unpackbits(words.astype('<u4').view(np.uint8), bitorder='little')
  return np.flatnonzero(bits)


def encode(tokenizer, text):
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert tokenizer.decode(ids) == text
  return ids


def decode(tokenizer, ids):
  return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def walk(tokenizer, matcher, rng, constraint):
  """Token ids by random logits, the stop token included; None if too long.

  On the way, that a stop token is allowed exactly where the text is valid.
  """
  ids: list[int] = []
  # What closes is likelier with time, or few walks would end.
  closers = [*STOPS, *(tokenizer.convert_tokens_to_ids(c) for c in '"]}')]
  while len(ids) < LIMIT:
    allowed = ids_of(matcher.allowed())
    text = decode(tokenizer, ids)
    may_end = bool(set(STOPS) & set(allowed.tolist()))
    assert may_end == is_valid(constraint, text) == matcher.may_end, repr(text)
    assert set(STOPS) <= set(allowed.tolist()) or not may_end
    logits = rng.standard_normal(SIZE)
    logits[closers] += 0.02 * len(ids)
    token = int(allowed[logits[allowed].argmax()])
    matcher.accept(token)
    ids.append(token)
    if token in STOPS:
      assert matcher.is_over and matcher.may_end
      return ids
  return None


CONSTRAINTS = {
  **{name: json_constraint(schema) for name, schema in SCHEMAS.items()},
  'any json': Constraint('json'),
  **{name: Constraint('regex', text) for name, text in REGEXES.items()},
}


@pytest.mark.parametrize('name', CONSTRAINTS)
def test_whatever_the_logits_choose_is_valid_where_it_ends(
  vocabulary, tokenizer, name
):
  constraint, rng = CONSTRAINTS[name], np.random.default_rng(0)
  grammar = vocabulary.grammar(constraint)
  texts = []
  for _ in range(8):
    ids = walk(tokenizer, grammar.start(), rng, constraint)
    if ids is not None:
      texts.append(decode(tokenizer, ids[:-1]))
  assert len(texts) >= 6
  for text in texts:
    assert is_valid(constraint, text), repr(text)
  assert len(set(texts)) > 1


@pytest.mark.parametrize('schema, text', VALID, ids=[t for _, t in VALID])
def test_a_valid_answer_is_not_changed(vocabulary, tokenizer, schema, text):
  """Greedy under the mask, by a model that says it anyway; and by `choose`."""
  constraint = json_constraint(schema)
  assert is_valid(constraint, text)
  said = [*encode(tokenizer, text), STOPS[0]]
  matcher = vocabulary.grammar(constraint).start()
  # Of one shape, to be compiled once.
  words = np.full((ROWS, -(-SIZE // 32)), 2**32 - 1, np.uint32)
  logits = np.random.default_rng(0).standard_normal((ROWS, SIZE), np.float32)
  for row, token in enumerate(said):
    words[row] = matcher.allowed()
    assert token in ids_of(words[row]), (token, text)
    matcher.accept(token)
    logits[row, token] = 20.0
  settings = sampling.settings([sampling.Sampling()] * ROWS)
  keys = sampling.keys(np.zeros(ROWS, np.uint32), np.arange(ROWS))
  chosen = choose(jnp.asarray(logits), settings, keys, jnp.asarray(words))
  assert chosen[: len(said)].tolist() == said


@pytest.mark.parametrize('name', REGEXES)
def test_a_match_is_not_changed(vocabulary, tokenizer, name):
  examples = {
    'words': 'yes no yes',
    'maybe empty': '',
    'unicode': 'ö☃é!',
    'date': '2024-02-29',
    'newlines': 'user\nuser\n/',
  }
  matcher = vocabulary.grammar(Constraint('regex', REGEXES[name])).start()
  for token in encode(tokenizer, examples[name]):
    assert token in ids_of(matcher.allowed())
    matcher.accept(token)
  assert matcher.may_end
  assert set(STOPS) <= set(ids_of(matcher.allowed()).tolist())


def test_properties_come_in_the_order_of_the_schema(vocabulary, tokenizer):
  """What the module says of order: held to here, so that it stays true."""
  matcher = vocabulary.grammar(json_constraint(PERSON)).start()
  for token in encode(tokenizer, '{"')[:-1]:
    matcher.accept(token)
  with pytest.raises(ValueError, match='cannot follow'):
    for token in encode(tokenizer, '"tags":[],"name":"a"}'):
      matcher.accept(token)


def test_where_one_text_can_follow_its_usual_tokens_do():
  """Byte by byte would be the same text, which no model has learnt so."""
  tokenizer = support.make_tokenizer()
  vocabulary = constrain.Vocabulary(tokenizer, SIZE, STOPS)
  matcher = vocabulary.grammar(Constraint('regex', 'system(yes|no)')).start()
  [system] = encode(tokenizer, 'system')
  assert ids_of(matcher.allowed()).tolist() == [system]
  matcher.accept(system)
  assert len(ids_of(matcher.allowed())) > 1


def test_white_space_is_bounded(vocabulary, tokenizer):
  matcher = vocabulary.grammar(Constraint('json')).start()
  for token in encode(tokenizer, '[' + 32 * '\n'):
    matcher.accept(token)
  [newline] = encode(tokenizer, '\n')
  with pytest.raises(ValueError, match='cannot follow'):
    matcher.accept(newline)
  matcher.accept(*encode(tokenizer, ']'))  # The refusal did no harm.
  assert matcher.may_end


def test_an_answer_is_over_soon_after_its_json(vocabulary, tokenizer):
  """A model that would go on with empty lines is stopped at the second."""
  matcher = vocabulary.grammar(Constraint('json')).start()
  for token in encode(tokenizer, '[]\n'):
    matcher.accept(token)
  assert matcher.may_end and not matcher.is_over
  matcher.accept(*encode(tokenizer, '\n'))
  assert matcher.is_over
  assert set(ids_of(matcher.allowed()).tolist()) == set(STOPS)


def test_padding_and_special_tokens_are_never_allowed(vocabulary, tokenizer):
  """Not even inside a string, where any text may stand."""
  known = len(tokenizer)
  assert known < SIZE - 32
  matcher = vocabulary.grammar(Constraint('json')).start()
  matcher.accept(*encode(tokenizer, '"'))
  allowed = ids_of(matcher.allowed())
  assert len(allowed) > 100
  assert allowed.max() < known
  assert not set(tokenizer.all_special_ids) & set(allowed.tolist())
  for token in (known, SIZE - 1, SIZE, -1):
    with pytest.raises(ValueError, match=f'token {token} cannot follow'):
      matcher.accept(token)


def test_an_embedding_smaller_than_the_tokenizer_is_what_may_be_said():
  tokenizer = support.make_tokenizer()
  size = len(tokenizer) - 5
  whole = constrain.Vocabulary(tokenizer, len(tokenizer), STOPS)
  small = constrain.Vocabulary(tokenizer, size, STOPS)
  regex = Constraint('regex', r'[\s\S]*')
  all_ids = ids_of(whole.grammar(regex).start().allowed(), len(tokenizer))
  ids = ids_of(small.grammar(regex).start().allowed(), size)
  assert all_ids.max() >= size
  np.testing.assert_array_equal(ids, all_ids[all_ids < size])


def test_a_tokenizer_told_to_pad_and_cut_is_read_without_that():
  tokenizer = support.make_tokenizer()
  tokenizer.backend_tokenizer.enable_truncation(4)
  tokenizer.backend_tokenizer.enable_padding(length=9)
  vocabulary = constrain.Vocabulary(tokenizer, SIZE, STOPS)
  assert vocabulary.tokens.tokenize_str('abcdefg') != []
  assert len(vocabulary.tokens.tokenize_str('abcdefg')) == 7
  assert tokenizer.backend_tokenizer.truncation['max_length'] == 4


def test_answers_of_one_grammar_know_nothing_of_each_other(
  vocabulary, tokenizer
):
  grammar = vocabulary.grammar(Constraint('regex', 'yes|no'))
  first, second = grammar.start(), grammar.start()
  before = ids_of(second.allowed())
  for token in encode(tokenizer, 'yes'):
    first.accept(token)
  assert first.may_end and not second.may_end
  np.testing.assert_array_equal(ids_of(second.allowed()), before)
  np.testing.assert_array_equal(ids_of(grammar.start().allowed()), before)


def test_is_over_where_only_a_stop_token_may_follow(vocabulary, tokenizer):
  matcher = vocabulary.grammar(Constraint('regex', 'no!?')).start()
  for token in encode(tokenizer, 'no'):
    assert not matcher.is_over and not matcher.may_end
    matcher.accept(token)
  assert matcher.may_end and not matcher.is_over
  matcher.accept(*encode(tokenizer, '!'))
  assert matcher.may_end and matcher.is_over
  assert set(ids_of(matcher.allowed()).tolist()) == set(STOPS)
  matcher.accept(STOPS[1])
  assert matcher.is_over
  with pytest.raises(ValueError, match='token 2 cannot follow'):
    matcher.accept(2)
  with pytest.raises(RuntimeError, match='has ended'):
    matcher.allowed()


def test_a_stop_token_too_early_is_refused(vocabulary):
  matcher = vocabulary.grammar(Constraint('regex', 'no')).start()
  with pytest.raises(ValueError, match='token 2 cannot follow'):
    matcher.accept(2)
  assert not matcher.is_over


def test_a_stop_token_that_is_text_only_ends():
  """Were it allowed as white space or in a string, it would end the answer."""
  tokenizer = support.make_tokenizer()
  [newline] = encode(tokenizer, '\n')
  own = constrain.Vocabulary(tokenizer, SIZE, [2, newline])
  for constraint in (Constraint('json'), Constraint('regex', r'\[\s*\]')):
    matcher = own.grammar(constraint).start()
    matcher.accept(*encode(tokenizer, '['))
    assert newline not in ids_of(matcher.allowed())
    with pytest.raises(ValueError, match=f'token {newline} cannot follow'):
      matcher.accept(newline)
    matcher.accept(*encode(tokenizer, ']'))
    assert {2, newline} <= set(ids_of(matcher.allowed()).tolist())
    matcher.accept(newline)
    assert matcher.is_over


def test_a_grammar_too_complex_is_an_error_not_an_end(vocabulary, tokenizer):
  """The library then allows its end token; that must not pass for an end."""
  limits = llguidance.LLParserLimits(step_lexer_fuel=1, initial_lexer_fuel=1)
  grammar = Constraint('regex', '(.*a){4}[^b]{30}').grammar()
  inner = llguidance.LLMatcher(
    vocabulary.tokens, grammar, log_level=0, limits=limits
  )
  matcher = constrain.Matcher(vocabulary, inner)
  with pytest.raises(RuntimeError, match='llguidance gave up'):
    for token in encode(tokenizer, 'aaaaaaaaaa'):
      matcher.allowed()
      matcher.accept(token)


def test_a_grammar_that_the_tokens_cannot_say_is_refused():
  """No token of this tokenizer has the snowman's bytes."""
  vocab = {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.decoder = decoders.ByteLevel()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.add_special_tokens(['<s>', '</s>'])
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  vocabulary = constrain.Vocabulary(tokenizer, 4, [1])
  assert ids_of(
    vocabulary.grammar(Constraint('regex', '[ab]')).start().allowed(), 4
  ).tolist() == [2, 3]
  with pytest.raises(ValueError, match="regex '☃' cannot be said in"):
    vocabulary.grammar(Constraint('regex', '☃'))


FAULTS = {
  ('xml', ''): "constraint.kind: 'xml'; it must be one of json_schema, regex",
  ('json', '{}'): "constraint.text: '{}', but any JSON needs none",
  ('regex', None): 'constraint.text: None; it must be a string',
  ('regex', '('): "the regex '(': unclosed group, at character 1.",
  ('regex', 'ab[z-a]'): 'the start must be <= the end, at character 4.',
  ('regex', '(a)\n(b'): 'unclosed group',
  ('regex', 'a(?=b)'): 'is not supported, at character 2.',
  ('regex', r'\bno'): 'lookarounds not supported',
  ('regex', r'[^\s\S]'): 'nothing satisfies it',
  ('json_schema', ''): 'the schema is no JSON: Expecting value: line 1',
  ('json_schema', '{'): 'the schema is no JSON',
  ('json_schema', '[]'): "the schema is '[]'; it must be a JSON object",
  ('json_schema', 'false'): 'the schema at $: it is false',
  ('json_schema', '{"type": "objct"}'): 'at $: Invalid type: objct.',
  (
    'json_schema',
    '{"properties": {"a": {"items": {"anyOf": [{"type": "null"}, '
    '{"pattern": "("}]}}}}',
  ): 'at $.properties.a.items.anyOf[1]: unclosed group, at character 1.',
  (
    'json_schema',
    '{"$ref": "#/$defs/x", "$defs": {"x": {"not": {}}}}',
  ): 'at $.$defs.x: Unimplemented keys: ["not"].',
  (
    'json_schema',
    '{"properties": {"a": {"$ref": "#/$defs/y"}}, "$defs": {"x": {}}}',
  ): "at $.properties.a: Pointer '/$defs/y' does not exist.",
  (
    'json_schema',
    '{"type": "object", "properties": {"a": false}, "required": ["a"]}',
  ): "at $: Unsatisfiable schema: required property 'a' is unsatisfiable.",
  (
    'json_schema',
    '{"items": {"maxlength": 3}}',
  ): "at $.items: 'maxlength' is no keyword of JSON Schema",
  ('json_schema', '{"uniqueItems": true}'): 'Unimplemented keys',
  ('json_schema', '{"x-guidance": 3}'): 'at $: invalid type: integer `3`',
}


@pytest.mark.parametrize('given', FAULTS, ids=repr)
def test_a_wrong_constraint_is_refused_by_what_and_where(given):
  with pytest.raises(ValueError, match=re.escape(FAULTS[given])):
    Constraint(*given)


@pytest.mark.parametrize(
  'text',
  [
    'true',
    '{}',
    '{"properties": {"not": {"type": "string"}}}',
    '{"properties": {"a": false}}',
    '{"enum": [{"maxlength": 3}], "x-mine": 1, "title": "t"}',
  ],
)
def test_schemas_that_look_wrong_and_are_not(text):
  Constraint('json_schema', text)


@pytest.mark.parametrize('key', sorted(guidance.KEYWORDS))
def test_every_keyword_that_is_taken_is_known_to_the_library(key):
  """None is on the list that it would refuse whatever its value."""
  value = {
    'object': {},
    'array': [{}],
    'string': '#' if key == '$ref' else 'email',
    'number': 1,
  }
  library = llguidance.LLMatcher
  faults = [
    library.validate_grammar(library.grammar_from_json_schema({key: v}))
    for v in [*value.values(), ['a'], 'object', 'http://x/y', False]
  ]
  assert '' in faults, faults


@pytest.mark.parametrize('stop_ids', [[], [-1], [2, SIZE], [300]])
def test_stop_ids_that_are_no_tokens_are_refused(stop_ids):
  with pytest.raises(ValueError, match=re.escape(f'stop_ids: {stop_ids}')):
    constrain.Vocabulary(support.make_tokenizer(), SIZE, stop_ids)


def test_a_slow_tokenizer_is_refused():
  with pytest.raises(ValueError, match='object is not a fast tokenizer'):
    constrain.Vocabulary(object(), SIZE, STOPS)


def test_without_the_library_one_is_told_what_to_install(monkeypatch):
  monkeypatch.setattr(guidance.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=re.escape("'tuner[constrained]'")):
    Constraint('json')
  with pytest.raises(ValueError, match=re.escape("'tuner[constrained]'")):
    constrain.Vocabulary(support.make_tokenizer(), SIZE, STOPS)


def test_answers_of_a_model_are_held_to_each_request_s_own(
  tiny_dir, quick_compiles
):
  """A random model: greedy, sampled and free rows in one batch."""
  tokenizer = support.make_tokenizer()
  model = weights.fill(*support.load_model(tiny_dir))
  own = constrain.Vocabulary(tokenizer, model.config.V, STOPS)
  wanted = [
    Constraint('regex', '[0-9]{2,6}'),
    Constraint('regex', '(yes|no)( (yes|no)){0,3}'),
    json_constraint(ANY_ORDER | {'maxProperties': 2}),
    None,
  ] * 2
  settings = [sampling.Sampling()] * 4 + [sampling.Sampling(1.5, top_p=0.9)] * 4

  def request(i):
    start = wanted[i] and own.grammar(wanted[i]).start()
    prompt = encode(tokenizer, f'hi {i}')
    return engine.Request(prompt, 60, settings[i], seed=i, constraint=start)

  answers = engine.generate(model, [request(i) for i in range(8)], STOPS)
  ended = 0
  for constraint, answer in zip(wanted, answers, strict=True):
    if constraint and answer.ended == 'stop':
      ids = answer.ids[:-1] if answer.ids[-1] in STOPS else answer.ids
      text = decode(tokenizer, ids)
      assert is_valid(constraint, text), (constraint, text)
      ended += 1
  assert ended >= 4
  for free in (3, 7):
    alone = engine.generate(model, [request(free)] * 8, STOPS)[0]
    assert alone.ids == answers[free].ids
