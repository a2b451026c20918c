"""Byte-level BPE vocabularies, whose pre-tokenizer llama.cpp keeps as a name.

llama.cpp has each pre-tokenizer built in and finds a model's by hashing a text
that it encoded. Here a name is found from the structure of tokenizer.json, and
the structure from the name. A wrong one still encodes, only differently, so
what the table does not hold is an error.
"""

import json
import typing

Json = typing.Any
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r' ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_START = r'[^\r\n\p{L}\p{N}]?'
_UPPER, _LOWER = (
  r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]',
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]',
)


def _words(digits: str) -> str:
  letters = _START + r'\p{L}+'
  return f'{_CONTRACTIONS}|{letters}|{digits}|' + _TAIL % ''


def _cased(digits: str, contractions: str) -> str:
  some, more = f'{_UPPER}*{_LOWER}+', f'{_UPPER}+{_LOWER}*'
  words = '|'.join(_START + form + contractions for form in (some, more))
  return f'{words}|{digits}|' + _TAIL % '/'


class Pre(typing.NamedTuple):
  """names: llama.cpp's, which encode alike; the first is written.

  parts: as `_part` has them. add_bos: what llama.cpp does where a file is
  silent.
  """

  names: tuple[str, ...]
  parts: tuple[tuple, ...]
  normalizer: str | None = None
  ignores_merges: bool = False
  add_bos: bool = False


BYTES = ('ByteLevel', False, False)
BYTES_OF_WORDS = ('ByteLevel', False, True)
THREE_DIGITS, DIGIT = r'\p{N}{1,3}', r'\p{N}'

ALL = (
  Pre(
    ('smollm', 'refact', 'starcoder', 'codeshell'),
    (('Digits', True), BYTES_OF_WORDS),
  ),
  Pre(('gpt-2', 'phi-2'), (BYTES_OF_WORDS,)),
  Pre(
    ('llama-bpe', 'llama3', 'llama-v3'),
    (('Split', _words(THREE_DIGITS)), BYTES),
    ignores_merges=True,
    add_bos=True,
  ),
  # OLMo 2 and Phi-4, too: whatever has cl100k's words.
  Pre(('dbrx', 'smaug-bpe'), (('Split', _words(THREE_DIGITS)), BYTES)),
  Pre(('qwen2',), (('Split', _words(DIGIT)), BYTES), 'NFC'),
  Pre(
    ('tekken',),
    (('Split', _cased(DIGIT, '')), BYTES),
    ignores_merges=True,
    add_bos=True,
  ),
  Pre(
    ('gpt-4o',),
    (('Split', _cased(THREE_DIGITS, f'{_CONTRACTIONS}?')), BYTES),
  ),
)


def by_name(name: object) -> Pre:
  """Raises ValueError listing what is known."""
  for pre in ALL:
    if name in pre.names:
      return pre
  known = ', '.join(n for pre in ALL for n in pre.names)
  raise ValueError(
    f"tokenizer.ggml.model 'gpt2' with pre-tokenizer {name!r} is not known; "
    f'known pre-tokenizers: {known}.'
  )


def by_structure(tokenizer: Json) -> Pre:
  """The entry that encodes as this tokenizer.json does.

  Raises ValueError with the structure where there is none.
  """
  model = tokenizer['model']
  for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
    if model.get(key):
      raise ValueError(
        f'tokenizer.json: model.{key}: {model[key]!r}; llama.cpp has none.'
      )
  pre_tokenizer, normalizer = (
    tokenizer.get(k) for k in ('pre_tokenizer', 'normalizer')
  )
  parts = tuple(_part(p) for p in flat(pre_tokenizer, 'pretokenizers'))
  kinds = [n['type'] for n in flat(normalizer, 'normalizers')]
  ignores = bool(model.get('ignore_merges'))
  for pre in ALL:
    own = [pre.normalizer] if pre.normalizer else []
    if (parts, kinds, ignores) == (pre.parts, own, pre.ignores_merges):
      return pre
  raise ValueError(
    'tokenizer.json: no pre-tokenizer of llama.cpp that is known here has '
    f'this structure: pre_tokenizer '
    f'{json.dumps(pre_tokenizer, ensure_ascii=False)}, '
    f'normalizer {json.dumps(normalizer, ensure_ascii=False)}, ignore_merges '
    f'{ignores}.'
  )


def flat(part: Json, inner: str) -> list[Json]:
  """The parts of a Sequence, or the one that stands without."""
  if not part:
    return []
  if part['type'] != 'Sequence':
    return [part]
  return [leaf for p in part[inner] for leaf in flat(p, inner)]


def _part(part: Json) -> tuple:
  """What of a pre-tokenizer decides how it splits; offsets do not."""
  if part['type'] == 'Digits':
    return ('Digits', part['individual_digits'])
  if part['type'] == 'ByteLevel':
    return ('ByteLevel', part['add_prefix_space'], part.get('use_regex', True))
  how = (part.get('behavior'), part.get('invert', False))
  # Matches kept, or all but the matches removed: alike where all is matched.
  if part['type'] == 'Split' and how in (
    ('Isolated', False),
    ('Removed', True),
  ):
    return ('Split', part['pattern'].get('Regex'))
  return (part['type'], json.dumps(part, sort_keys=True))


def pre_tokenizer(pre: Pre) -> typing.Any:
  """The `tokenizers` pre-tokenizer of an entry."""
  import tokenizers
  from tokenizers import pre_tokenizers

  def make(kind: str, *own: typing.Any) -> typing.Any:
    if kind == 'Digits':
      return pre_tokenizers.Digits(individual_digits=own[0])
    if kind == 'Split':
      return pre_tokenizers.Split(tokenizers.Regex(own[0]), 'isolated')
    return pre_tokenizers.ByteLevel(
      add_prefix_space=own[0], trim_offsets=True, use_regex=own[1]
    )

  parts = [make(*part) for part in pre.parts]
  return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def backend(pre: Pre, vocab: dict[str, int], merges: list[str]) -> typing.Any:
  """The `tokenizers.Tokenizer` of a GGUF's vocabulary, without added tokens."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  pairs = [_pair(merge) for merge in merges]
  kwargs = {'ignore_merges': True} if pre.ignores_merges else {}
  made = tokenizers.Tokenizer(
    models.BPE(vocab, pairs, fuse_unk=False, **kwargs)
  )
  if pre.normalizer == 'NFC':
    made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizer(pre)
  made.decoder = decoders.ByteLevel()
  return made


def _pair(merge: str) -> tuple[str, str]:
  split = merge.find(' ', 1)
  if split < 0:
    raise ValueError(f'tokenizer.ggml.merges: {merge!r} is not two tokens.')
  return merge[:split], merge[split + 1 :]


def merges_of(tokenizer: Json) -> list[str]:
  """'left right' for each merge of a tokenizer.json, in either spelling."""
  found = []
  for merge in tokenizer['model']['merges']:
    pair = merge.split(' ') if isinstance(merge, str) else merge
    if len(pair) != 2 or ' ' in ''.join(pair):
      raise ValueError(f'tokenizer.json: merge {merge!r}: tokens hold a space.')
    found.append(' '.join(pair))
  return found
