"""SentencePiece's BPE vocabularies, which llama.cpp encodes by scores.

Of two neighbours that are a token together, the pair with the highest score is
joined first. tokenizer.json has merges in order instead of scores; each makes
the other: a token's score is the less the later its merges come, and its merges
are its splits into two tokens, in the order of the scores.
"""

import json
import re
import typing

from tuner.llamacpp import bpe

Json = typing.Any
SPACE = '▁'
BYTE = re.compile(r'<0x[0-9A-F]{2}>')
BYTES = tuple(f'<0x{b:02X}>' for b in range(256))


def is_of(tokenizer: Json) -> bool:
  """Whether a tokenizer.json is of this kind and not of byte-level BPE."""
  return bool(tokenizer['model'].get('byte_fallback'))


def splits(vocab: typing.Mapping[str, float]) -> list[tuple[str, str]]:
  """All merges of a vocabulary {token: score}, first the one done first."""
  order = {token: i for i, token in enumerate(vocab)}
  found = []
  for token, score in vocab.items():
    for i in range(1, len(token)):
      left, right = token[:i], token[i:]
      if left in order and right in order:
        found.append((-score, order[token], -i, left, right))
  found.sort(key=lambda merge: merge[:3])
  return [merge[3:] for merge in found]


def scores_of(vocab: typing.Collection[str], merges: list[str]) -> list[float]:
  """A score for each token, by which llama.cpp joins as the merges do.

  Tokens that no merge makes come after all that one makes. Raises ValueError
  where merges of one token are apart, or a split of a token is no merge: then
  no scores do what the merges do.
  """
  order: dict[str, int] = {}
  last = ''
  for merge in merges:
    token = merge.replace(' ', '')
    if token != last and token in order:
      raise ValueError(
        f'tokenizer.json: the merges that make {token!r} do not follow one '
        'another; no SentencePiece scores give that order.'
      )
    order.setdefault(token, len(order))
    last = token
  rest = (token for token in vocab if token not in order)
  order |= {token: len(order) + i for i, token in enumerate(rest)}
  return [0.0 - order[token] for token in vocab]


def check_merges(vocab: typing.Collection[str], merges: list[str]) -> None:
  """Raises ValueError where llama.cpp would join what the merges do not."""
  given = set(merges)
  wanted = {' '.join(pair) for pair in splits(dict.fromkeys(vocab, 0.0))}
  both = (('missing', wanted - given), ('of no two tokens', given - wanted))
  for what, odd in both:
    if odd:
      raise ValueError(
        f'tokenizer.json: {len(odd)} merges {what}, such as {min(odd)!r}; '
        'SentencePiece joins any two tokens that are one together.'
      )


class Prefix(typing.NamedTuple):
  """add_space_prefix, and what llama.cpp will do differently."""

  is_added: bool
  note: str = ''


def prefix_of(tokenizer: Json) -> Prefix:
  """Whether text gets a space in front, by the structure of tokenizer.json.

  Raises ValueError with the structure where it is not known.
  """
  normalizer = bpe.flat(tokenizer.get('normalizer'), 'normalizers')
  pre = bpe.flat(tokenizer.get('pre_tokenizer'), 'pretokenizers')
  kinds = [n['type'] for n in normalizer]
  replaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  is_replaced = bool(normalizer) and normalizer[-1] == replaces
  # Gemma splits at spaces after all of them have been replaced.
  is_split = [p['type'] for p in pre] in ([], ['Split'])
  if kinds == ['Prepend', 'Replace'] and is_replaced and not pre:
    return Prefix(True)
  if kinds == ['Replace'] and is_replaced and is_split:
    return Prefix(False)
  if not normalizer and [p['type'] for p in pre] == ['Metaspace']:
    return _metaspace(pre[0])
  raise ValueError(
    'tokenizer.json: not a SentencePiece structure that is known here: '
    f'normalizer {json.dumps(tokenizer.get("normalizer"))}, pre_tokenizer '
    f'{json.dumps(tokenizer.get("pre_tokenizer"))}.'
  )


def _metaspace(part: Json) -> Prefix:
  scheme = part.get('prepend_scheme', 'always')
  if scheme == 'never':
    return Prefix(False)
  if scheme == 'always':
    return Prefix(
      True,
      'llama.cpp puts a space in front of text that begins with one, too; '
      'tokenizer.json does not',
    )
  return Prefix(
    False,
    'tokenizer.json puts a space in front of the text where no special token '
    'stands before it; llama.cpp, which can do so everywhere or nowhere, was '
    'told nowhere, as in a rendered conversation',
  )


def backend(
  vocab: dict[str, int], scores: dict[str, float], unknown: str, prefix: bool
) -> typing.Any:
  """The `tokenizers.Tokenizer` of a GGUF's vocabulary, without added tokens.

  scores: of the tokens that text is made of. Raises ValueError where they give
  no order.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers

  merges = splits(scores)
  joined = {left + right for left, right in merges}
  if len(joined) > 1 and len({scores[token] for token in joined}) == 1:
    raise ValueError('tokenizer.ggml.scores are all alike and give no order.')
  made = tokenizers.Tokenizer(
    models.BPE(
      vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
  )
  replace = normalizers.Replace(' ', SPACE)
  made.normalizer = (
    normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    if prefix
    else replace
  )
  parts = [decoders.Replace(SPACE, ' '), decoders.ByteFallback()]
  parts += [decoders.Fuse(), *([decoders.Strip(' ', 1, 0)] if prefix else [])]
  made.decoder = decoders.Sequence(parts)
  return made
