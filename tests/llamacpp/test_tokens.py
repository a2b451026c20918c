"""A tokenizer that went through a GGUF file's metadata encodes as before."""

import json
import re

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tuner.llamacpp import bpe, read, spm, tokens, vocabulary, write

LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN2 = LLAMA3.replace('{1,3}', '')
TEKKEN = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?'
  r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|'
  r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
GPT4O = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def split(pattern, how='isolated', invert=False):
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), how, invert),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def words(add_prefix_space=False):
  return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


# As the models' own tokenizer.json have them: (structure, normalizer, whether
# merges are ignored for words that are tokens), and the names in llama.cpp.
STRUCTURES = {
  'smollm': (
    pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), words()]
    ),
    None,
    False,
  ),
  'gpt-2': (words(), None, False),
  'llama-bpe': (split(LLAMA3), None, True),
  'dbrx': (split(LLAMA3, 'removed', True), None, False),
  'qwen2': (split(QWEN2), normalizers.NFC(), False),
  'tekken': (split(TEKKEN), None, True),
  'gpt-4o': (split(GPT4O), None, False),
}
ALIASES = {
  'refact': 'smollm',
  'starcoder': 'smollm',
  'llama3': 'llama-bpe',
  'smaug-bpe': 'dbrx',
}


@pytest.fixture(scope='module', params=STRUCTURES)
def trained(request):
  """(llama.cpp's name, a tokenizer of that structure)."""
  conftest = request.getfixturevalue('helpers')
  made = conftest.train_bpe(*STRUCTURES[request.param])
  made.add_special_tokens(
    [
      tokenizers.AddedToken(t, special=True, normalized=False)
      for t in conftest.SPECIALS
    ]
  )
  made.add_tokens([tokenizers.AddedToken('    ', normalized=False)])
  return request.param, made


def through_gguf(made, folder, helpers, vocab_size, **own):
  """The tokenizer of a directory that was made of a GGUF file of `made`."""
  folder.mkdir(exist_ok=True)
  helpers.write_tokenizer(folder, made, **own)
  (folder / 'config.json').write_text('{}')
  meta = vocabulary.of_folder(folder, vocab_size).meta
  found = tokens.of_metadata(meta, {'max_position_embeddings': 9})
  (folder / 'back').mkdir()
  found.write(folder / 'back')
  path = folder / 'back' / 'tokenizer.json'
  return meta, tokenizers.Tokenizer.from_file(str(path)), found


def assert_encodes_alike(found, made, texts):
  for text in texts:
    assert found.encode(text).ids == made.encode(text).ids, repr(text)
    bare = made.encode(text, add_special_tokens=False)
    assert found.encode(text, add_special_tokens=False).ids == bare.ids
    for skip in (True, False):
      back = found.decode(bare.ids, skip_special_tokens=skip)
      assert back == made.decode(bare.ids, skip_special_tokens=skip)


def test_bpe_encodes_alike(trained, tmp_path, helpers, nasty_texts):
  name, made = trained
  n = made.get_vocab_size()
  meta, found, _ = through_gguf(made, tmp_path / 'hf', helpers, n + 3)
  assert meta['tokenizer.ggml.pre'] == name
  assert_encodes_alike(found, made, nasty_texts)
  assert found.get_vocab() == made.get_vocab()
  types = meta['tokenizer.ggml.token_type']
  assert types[:3] == [3] * 3 and types[n - 1 :] == [4, 5, 5, 5]
  if name == 'qwen2':  # What the normalizer does, llama.cpp does not.
    assert vocabulary.of_folder(tmp_path / 'hf', n).notes


def test_structures_differ_on_these_texts(helpers, nasty_texts):
  """Else the test above would let a wrong name pass."""
  parts = {
    name: tuple(
      str(pre.pre_tokenize_str(normal.normalize_str(t) if normal else t))
      for t in nasty_texts
    )
    for name, (pre, normal, _) in STRUCTURES.items()
  }
  alike = {'llama-bpe', 'dbrx'}  # But for merges that are ignored.
  assert parts.pop('dbrx') == parts['llama-bpe'] and alike
  assert len(set(parts.values())) == len(parts)


@pytest.mark.parametrize('name', ALIASES)
def test_names_for_one_structure(name):
  assert bpe.by_name(name) is bpe.by_name(ALIASES[name])


@pytest.mark.parametrize(
  'pre',
  [
    pre_tokenizers.Whitespace(),
    words(add_prefix_space=True),
    split(LLAMA3.replace('{1,3}', '{1,2}')),
    split(LLAMA3, 'removed'),
    pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=False), words()]
    ),
  ],
)
def test_unknown_structure_is_named(pre, tmp_path, helpers):
  made = helpers.bpe_tokenizer()
  made.pre_tokenizer = pre
  kind = json.loads(made.to_str())['pre_tokenizer']['type']
  with pytest.raises(ValueError, match=f'no pre-tokenizer.*"type": "{kind}"'):
    through_gguf(made, tmp_path / 'hf', helpers, 320)


def test_unknown_normalizer_is_named(tmp_path, helpers):
  made = helpers.bpe_tokenizer()
  made.normalizer = normalizers.NFKC()
  with pytest.raises(ValueError, match='"NFKC"'):
    through_gguf(made, tmp_path / 'hf', helpers, 320)


# SentencePiece.


def train_spm(helpers, prefix=True, gemma=False):
  """A BPE vocabulary with byte tokens, as converted from SentencePiece."""
  replace = normalizers.Replace(' ', '▁')
  made = tokenizers.Tokenizer(
    models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  made.normalizer = (
    normalizers.Sequence([normalizers.Prepend('▁'), replace])
    if prefix
    else replace
  )
  trainer = trainers.BpeTrainer(
    vocab_size=900,
    special_tokens=['<unk>', '<s>', '</s>', *spm.BYTES],
    show_progress=False,
    limit_alphabet=150,
    max_token_length=12,
  )
  texts = [t for t in helpers.make_nasty_texts(400) if '\0' not in t]
  made.train_from_iterator(texts * 3, trainer)
  state = json.loads(made.to_str())
  # SentencePiece joins every two tokens that are one; training only some.
  vocab = state['model']['vocab']
  plain = [t for t in vocab if t not in ('<unk>', '<s>', '</s>', *spm.BYTES)]
  scores = {token: -float(i) for i, token in enumerate(plain)}
  state['model']['merges'] = [list(p) for p in spm.splits(scores)]
  state['added_tokens'] = [t for t in state['added_tokens'] if t['id'] < 3]
  if gemma:
    state['pre_tokenizer'] = {
      'type': 'Split',
      'pattern': {'String': ' '},
      'behavior': 'MergedWithPrevious',
      'invert': False,
    }
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  strip = [decoders.Strip(' ', 1, 0)] if prefix else []
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  made.add_special_tokens(['<|im_start|>', '<|im_end|>', '<|endoftext|>'])
  made.add_tokens([tokenizers.AddedToken('[TOOL]', normalized=False)])
  return made


def joined_by_score(text, scores, is_prefixed):
  """SentencePiece's BPE in words: join the pair with the highest score."""
  pieces = list((' ' * is_prefixed + text).replace(' ', '▁'))
  while True:
    pairs = [
      (-scores[a + b], i)
      for i, (a, b) in enumerate(zip(pieces, pieces[1:]))
      if a + b in scores
    ]
    if not pairs:
      break
    _, i = min(pairs)
    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
  return [
    token
    for piece in pieces
    for token in (
      [piece] if piece in scores else [f'<0x{b:02X}>' for b in piece.encode()]
    )
  ]


@pytest.mark.parametrize('prefix', [True, False])
def test_spm_encodes_alike(prefix, tmp_path, helpers, nasty_texts):
  made = train_spm(helpers, prefix, gemma=not prefix)
  n = made.get_vocab_size()
  meta, found, _ = through_gguf(made, tmp_path / 'hf', helpers, n)
  assert meta['tokenizer.ggml.model'] == 'llama'
  assert meta['tokenizer.ggml.add_space_prefix'] is prefix
  texts = [*nasty_texts, 'a[TOOL] b', '<s>x</s>', ' [TOOL]']
  assert_encodes_alike(found, made, texts)
  types = meta['tokenizer.ggml.token_type']
  assert types[0] == tokens.UNKNOWN and types[1:3] == [tokens.CONTROL] * 2
  assert types[3:259] == [tokens.BYTE] * 256
  assert types[-1] == tokens.USER_DEFINED


@pytest.mark.parametrize('prefix', [True, False])
def test_spm_by_scores_is_what_the_scores_say(
  prefix, tmp_path, helpers, nasty_texts
):
  """Scores as read by an encoder that knows nothing of merges."""
  made = train_spm(helpers, prefix)
  meta, found, _ = through_gguf(
    made, tmp_path / 'hf', helpers, made.get_vocab_size()
  )
  names = ('tokens', 'scores', 'token_type')
  rows = zip(*(meta[f'tokenizer.ggml.{name}'] for name in names))
  scores = {t: s for t, s, kind in rows if kind == tokens.NORMAL}
  special = re.compile('<|>')
  texts = [t for t in nasty_texts if t and not special.search(t)]
  assert len(texts) > 100
  for text in texts:
    expected = joined_by_score(text, scores, prefix)
    assert found.encode(text).tokens == expected, repr(text)


def test_merges_apart_have_no_scores(tmp_path, helpers):
  """'ab' + 'c' before 'b' + 'c', and 'a' + 'bc' after it."""
  with pytest.raises(ValueError, match="make 'abc' do not follow"):
    spm.scores_of(['abc', 'bc'], ['ab c', 'b c', 'a bc'])
  made = train_spm(helpers)
  state = json.loads(made.to_str())
  del state['model']['merges'][5]
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  with pytest.raises(ValueError, match='1 merges missing'):
    through_gguf(made, tmp_path / 'hf', helpers, 1000)


def test_prefix_only_in_front_is_noted(tmp_path, helpers):
  made = train_spm(helpers)
  made.normalizer = None
  for scheme, is_added in (('first', False), ('always', True)):
    made.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme=scheme, split=False
    )
    folder = tmp_path / scheme
    folder.mkdir()
    helpers.write_tokenizer(folder, made)
    (folder / 'config.json').write_text('{}')
    found = vocabulary.of_folder(folder, made.get_vocab_size())
    assert found.meta['tokenizer.ggml.add_space_prefix'] is is_added
    assert len(found.notes) == 1


# Ends, stops, templates.


@pytest.mark.parametrize('ends', ['', 'bos', 'eos', 'bos eos'])
def test_bos_and_eos_are_put_as_before(ends, tmp_path, helpers, nasty_texts):
  made = helpers.bpe_tokenizer()
  front = ['<|im_start|>'] * ('bos' in ends)
  back = ['<|im_end|>'] * ('eos' in ends)
  if ends:
    made.post_processor = tokenizers.processors.TemplateProcessing(
      single=[*front, '$A', *back],
      special_tokens=[('<|im_start|>', 1), ('<|im_end|>', 2)],
    )
  meta, found, _ = through_gguf(made, tmp_path / 'hf', helpers, 320)
  assert meta['tokenizer.ggml.add_bos_token'] is ('bos' in ends)
  assert meta['tokenizer.ggml.add_eos_token'] is ('eos' in ends)
  assert_encodes_alike(found, made, nasty_texts[:40])


def test_another_token_in_front_is_refused(tmp_path, helpers):
  made = helpers.bpe_tokenizer()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single=['<|endoftext|>', '$A'], special_tokens=[('<|endoftext|>', 0)]
  )
  with pytest.raises(ValueError, match=r'puts \[0\]'):
    through_gguf(made, tmp_path / 'hf', helpers, 320)


def test_all_stop_tokens_are_kept(tmp_path, helpers):
  folder = tmp_path / 'hf'
  folder.mkdir()
  helpers.write_tokenizer(folder, helpers.bpe_tokenizer())
  generation = {'eos_token_id': [0, 2, 5]}
  (folder / 'generation_config.json').write_text(json.dumps(generation))
  (folder / 'config.json').write_text('{}')
  meta = vocabulary.of_folder(folder, 320).meta
  found = tokens.of_metadata(meta, {'max_position_embeddings': 9})
  assert found.stops == [2, 0, 5]
  assert found.ids == {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}


def test_templates_are_kept(tmp_path, helpers):
  both = [
    {'name': 'default', 'template': 'x{{ 1 }}\n'},
    {'name': 'tool_use', 'template': 'y'},
  ]
  made = helpers.bpe_tokenizer()
  _, _, found = through_gguf(
    made, tmp_path / 'hf', helpers, 320, chat_template=both
  )
  assert found.templates == {'': 'x{{ 1 }}\n', 'tool_use': 'y'}
  back = tmp_path / 'hf' / 'back'
  assert (back / 'chat_template.jinja').read_text() == 'x{{ 1 }}\n'
  assert (back / 'additional_chat_templates/tool_use.jinja').read_text() == 'y'
  assert (back / 'tokenizer_config.json').exists()


def test_phi3s_tokens_eat_the_space_after_them(make, tmp_path, helpers):
  """llama.cpp knows by the name, so the name says it, and is read again."""
  folder, _ = make('phi3')
  made = train_spm(helpers)
  for token in ('<|user|>', '</s>'):
    made.add_special_tokens(
      [
        tokenizers.AddedToken(
          token, special=True, rstrip=True, normalized=False
        )
      ]
    )
  state = json.loads(made.to_str())
  for token in state['added_tokens']:
    token['rstrip'] = token['content'] not in tokens.NOT_STRIPPED
  vocab = state['model']['vocab']
  assert len(vocab) < 2000
  made = tokenizers.Tokenizer.from_str(json.dumps(state))
  helpers.write_tokenizer(folder, made)
  found = vocabulary.of_folder(folder, made.get_vocab_size())
  assert found.is_phi3 and found.notes == []
  meta = {**found.meta, 'general.name': 'phi-3 x'}
  back = tokens.of_metadata(meta, {'max_position_embeddings': 9}).backend
  for text in ('<|user|>\n a', '<|user|>  a</s> b<s> c'):
    assert back.encode(text).ids == made.encode(text).ids
  meta['general.name'] = 'x'
  back = tokens.of_metadata(meta, {'max_position_embeddings': 9}).backend
  assert back.encode('<|user|>\n a').ids != made.encode('<|user|>\n a').ids


def test_whole_files_carry_the_tokenizer(make, tmp_path, nasty_texts, helpers):
  folder, _ = make('llama')
  write.write(folder, tmp_path / 'a.gguf', 'f16')
  fields = gguf.GGUFReader(tmp_path / 'a.gguf').fields
  assert fields['tokenizer.ggml.pre'].contents() == 'smollm'
  names = read.convert(tmp_path / 'a.gguf', tmp_path / 'back')
  assert 'chat_template.jinja' in names
  found = tokenizers.Tokenizer.from_file(str(tmp_path / 'back/tokenizer.json'))
  assert_encodes_alike(found, helpers.bpe_tokenizer(), nasty_texts)
