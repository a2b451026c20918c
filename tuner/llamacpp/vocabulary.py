"""A GGUF file's tokenizer metadata from a Hugging Face directory's files."""

import json
import pathlib
import typing

from tuner.llamacpp import bpe, library, spm
from tuner.llamacpp import tokens as tokens_lib

Json = typing.Any
PREFIX = tokens_lib.PREFIX


class Vocabulary(typing.NamedTuple):
  """meta: whole keys and values; notes: what llama.cpp will do differently.

  is_phi3: llama.cpp must be told by the model's name to strip as Phi-3 does.
  """

  meta: dict[str, Json]
  notes: list[str]
  is_phi3: bool


def read_json(path: pathlib.Path, required: bool = True) -> Json:
  """The object in a file, {} without one. Raises ValueError."""
  if not path.is_file():
    if required:
      raise ValueError(f'{path} is missing.')
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None


def of_folder(folder: pathlib.Path, vocab_size: int) -> Vocabulary:
  """The metadata of a directory whose embedding has `vocab_size` rows.

  Raises ValueError naming what is missing or cannot be said to llama.cpp.
  """
  tokenizer = read_json(folder / 'tokenizer.json')
  own = read_json(folder / 'tokenizer_config.json', required=False)
  own = {**read_json(folder / 'special_tokens_map.json', False), **own}
  if (kind := tokenizer['model'].get('type', 'BPE')) != 'BPE':
    raise ValueError(
      f"{folder}/tokenizer.json: model.type: {kind!r}; GGUF has 'BPE'."
    )
  added = {t['id']: t for t in tokenizer.get('added_tokens', [])}
  tokens = _tokens(tokenizer, added, vocab_size)
  notes: list[str] = []
  make = _spm if spm.is_of(tokenizer) else _bpe
  meta = make(tokenizer, tokens, added, notes)
  ids = {token: i for i, token in enumerate(tokens) if token is not None}
  meta |= _special(folder, own, ids, notes)
  meta |= _ends(folder, own, meta)
  meta |= _templates(folder, own)
  return Vocabulary(meta, notes, _stripping(added, notes))


def _tokens(tokenizer: Json, added: Json, vocab_size: int) -> list[str | None]:
  """Each id's token as tokenizer.json has it, None where it has none."""
  by_id = {i: token for token, i in tokenizer['model']['vocab'].items()}
  by_id |= {i: t['content'] for i, t in added.items()}
  if by_id and (most := max(by_id)) >= vocab_size:
    raise ValueError(
      f'tokenizer.json has a token {most}, config.json vocab_size {vocab_size}.'
    )
  if odd := [token for token in by_id.values() if '\0' in token]:
    raise ValueError(
      f'tokenizer.json: {library.quote(map(repr, odd))}: llama.cpp ends a '
      'token at a zero byte.'
    )
  return [by_id.get(i) for i in range(vocab_size)]


def _filled(tokens: list[str | None]) -> list[str]:
  return [f'[PAD{i}]' if t is None else t for i, t in enumerate(tokens)]


def _type(i: int, token: str | None, added: Json) -> int:
  if token is None:
    return tokens_lib.UNUSED
  if i in added:
    is_special = added[i]['special']
    return tokens_lib.CONTROL if is_special else tokens_lib.USER_DEFINED
  return tokens_lib.NORMAL


def _bpe(tokenizer: Json, tokens, added: Json, notes: list[str]) -> Json:
  pre = bpe.by_structure(tokenizer)
  if pre.normalizer:
    notes.append(
      f'llama.cpp does not normalise text to {pre.normalizer} as '
      'tokenizer.json does'
    )
  if pre.names[0] in ('tekken', 'gpt-4o'):
    notes.append(
      'llama.cpp splits combining marks from their letters, tokenizer.json '
      'does not'
    )
  return {
    f'{PREFIX}model': 'gpt2',
    f'{PREFIX}pre': pre.names[0],
    f'{PREFIX}tokens': _filled(tokens),
    f'{PREFIX}token_type': [_type(i, t, added) for i, t in enumerate(tokens)],
    f'{PREFIX}merges': bpe.merges_of(tokenizer),
  }


def _spm(tokenizer: Json, tokens, added: Json, notes: list[str]) -> Json:
  prefix = spm.prefix_of(tokenizer)
  notes += [prefix.note] if prefix.note else []
  unknown = tokenizer['model'].get('unk_token')
  missing = [b for b in spm.BYTES if b not in tokens]
  if unknown not in tokens or missing:
    raise ValueError(
      f'tokenizer.json: unk_token {unknown!r} or byte tokens '
      f'{library.quote(missing)} are not in the vocabulary.'
    )
  types = [_type(i, t, added) for i, t in enumerate(tokens)]
  merges = bpe.merges_of(tokenizer)
  # These are never made of others.
  whole = {None, unknown, *spm.BYTES, *(t['content'] for t in added.values())}
  plain = [token for token in tokens if token not in whole]
  made = set(plain)
  own = [
    m
    for m in merges
    if m.replace(' ', '') in made and made.issuperset(m.split(' '))
  ]
  spm.check_merges(plain, own)
  scores = dict(zip(_filled(tokens), spm.scores_of(_filled(tokens), merges)))
  for i, token in enumerate(tokens):
    if token == unknown:
      types[i] = tokens_lib.UNKNOWN
    elif token in spm.BYTES:
      types[i] = tokens_lib.BYTE
  return {
    f'{PREFIX}model': 'llama',
    f'{PREFIX}pre': 'default',
    f'{PREFIX}tokens': [
      # llama.cpp looks for these in text that has its spaces still.
      t.replace(spm.SPACE, ' ') if kind == tokens_lib.USER_DEFINED else t
      for t, kind in zip(_filled(tokens), types)
    ],
    f'{PREFIX}scores': list(scores.values()),
    f'{PREFIX}token_type': types,
    f'{PREFIX}add_space_prefix': prefix.is_added,
  }


def _special(folder: pathlib.Path, own: Json, ids, notes: list[str]) -> Json:
  """Ids of bos, eos, padding and unknown, and of the other stop tokens."""
  config = read_json(folder / 'config.json')
  generation = read_json(folder / 'generation_config.json', required=False)
  found = {}
  for name in tokens_lib.NAMED:
    token = own.get(f'{name}_token')
    token = token.get('content') if isinstance(token, dict) else token
    if token is not None and token not in ids:
      raise ValueError(
        f'tokenizer_config.json: {name}_token {token!r} is not a token.'
      )
    given = config.get(f'{name}_token_id') if token is None else ids[token]
    if isinstance(given, int):
      found[name] = given
  stops = generation.get('eos_token_id', config.get('eos_token_id'))
  stops = stops if isinstance(stops, list) else [stops]
  stops = [
    i for i in dict.fromkeys([found.get('eos'), *stops]) if i is not None
  ]
  if not stops:
    raise ValueError(
      f'{folder}: no eos_token: neither tokenizer_config.json nor '
      'generation_config.json names one.'
    )
  found |= dict(zip(tokens_lib.STOPS, stops))
  if left := stops[len(tokens_lib.STOPS) :]:
    notes.append(f'a GGUF file has no place for the stop tokens {left}')
  named = {**tokens_lib.NAMED, 'eot': 'eot', 'eom': 'eom'}
  return {f'{PREFIX}{named[k]}_token_id': i for k, i in found.items()}


def _ends(folder: pathlib.Path, own: Json, meta: Json) -> Json:
  """add_bos_token and add_eos_token, by what the tokenizer does to a text."""
  import tokenizers

  made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  made.no_truncation()
  made.no_padding()
  bare = made.encode('a', add_special_tokens=False).ids
  full = made.encode('a').ids
  at = next(
    (i for i in range(len(full)) if full[i : i + len(bare)] == bare), None
  )
  if at is None:
    raise ValueError(
      f'{folder}/tokenizer.json: post_processor: not understood.'
    )
  ends = {'bos': full[:at], 'eos': full[at + len(bare) :]}
  found = {}
  for name, there in ends.items():
    if there not in ([], [meta.get(f'{PREFIX}{name}_token_id')]):
      raise ValueError(
        f'{folder}/tokenizer.json: post_processor puts {there} at the end '
        f'where llama.cpp can put {name}.'
      )
    given = own.get(f'add_{name}_token')
    found[name] = bool(there) if given is None else bool(given)
  return {f'{PREFIX}add_{name}_token': is_put for name, is_put in found.items()}


def _templates(folder: pathlib.Path, own: Json) -> Json:
  """The chat template, and others by their names."""
  given = own.get('chat_template')
  named = (
    {t['name']: t['template'] for t in given}
    if isinstance(given, list)
    else {'default': given}
  )
  file = folder / 'chat_template.jinja'
  if file.is_file():
    named['default'] = file.read_text(encoding='utf-8')
  others = folder / 'additional_chat_templates'
  named |= {
    p.stem: p.read_text(encoding='utf-8')
    for p in sorted(others.glob('*.jinja'))
  }
  template = tokens_lib.TEMPLATE
  return {
    template if name == 'default' else f'{template}.{name}': text
    for name, text in named.items()
    if text
  }


def _stripping(added: Json, notes: list[str]) -> bool:
  """Whether added tokens eat spaces as Phi-3's; notes them if otherwise."""
  odd = [
    t['content']
    for t in added.values()
    if t.get('lstrip') or t.get('rstrip') or t.get('single_word')
  ]
  if not odd:
    return False
  stripped = {t['content'] for t in added.values() if t.get('rstrip')}
  all_but = {t['content'] for t in added.values()} - {*tokens_lib.NOT_STRIPPED}
  has_all = {'</s>', *tokens_lib.NOT_STRIPPED} <= {
    t['content'] for t in added.values()
  }
  if has_all and stripped == all_but and {*odd} == stripped:
    return True
  notes.append(
    'llama.cpp does not strip spaces around tokens as tokenizer.json does for '
    f'{library.quote(odd)}'
  )
  return False
