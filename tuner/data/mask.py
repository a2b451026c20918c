"""Which tokens of a conversation are trained: the assistant's and its stops.

What is trained follows from the messages: the part that turn i adds to the
rendering of the messages before it, from the end of the generation prompt to
the stop token. Character offsets of one tokenisation of the whole rendering
carry it over to tokens.

Nothing is found by searching for markers and nothing is assumed about the
template: the rendering must be prefix-stable, keep the text of every message,
and end each trained turn with a stop token; the tokens up to a trained turn
must be the tokens that generation starts from. A row that breaks this is
refused by name.
"""

import re

from tuner.data import rows as rows_lib

REMEMBERED = 1024


def text_checker(tokenizer):
  """A function that refuses a row whose text the tokenizer would not keep.

  That is a special token spelled out, or an ASCII character without a token: a
  byte-level vocabulary may lack some, and drops them without a word.
  """
  specials = {
    token.content
    for token in tokenizer.added_tokens_decoder.values()
    if token.special and token.content
  }
  special = re.compile('|'.join(map(re.escape, sorted(specials))) or '(?!)')
  lost = [c for c in map(chr, range(128)) if _is_lost(c, tokenizer)]
  dropped = re.compile(f'[{re.escape("".join(lost))}]' if lost else '(?!)')

  def check_text(row):
    for i, message in enumerate(row.messages):
      if found := special.search(message['content']):
        raise rows_lib.Refused(
          f'messages[{i}].content',
          f'found the special token {ascii(found[0])} in the text; '
          'wanted: text without it',
        )
      if found := dropped.search(message['content']):
        raise rows_lib.Refused(
          f'messages[{i}].content',
          f'found {ascii(found[0])}, which has no token and would be lost; '
          'wanted: text without it',
        )

  return check_text


def _is_lost(character, tokenizer):
  """Whether the character leaves no trace between two letters."""
  if character in ' \t\n\r':  # Some vocabularies do without white space.
    return False

  def ids(text):
    encode = tokenizer.backend_tokenizer.encode
    return encode(text, add_special_tokens=False).ids

  return ids(f'a{character}a') in (ids('a') * 2, ids('aa'))


def render_turns(row, render):
  """(text, turns), a turn being (message, start, answer end, end).

  From start to end is what an assistant turn adds to the rendering, without
  the generation prompt; the text of its message ends at `answer end`.
  """
  text = render(row.messages)
  turns, seen, last = [], 0, len(row.messages) - 1
  for i, message in enumerate(row.messages):
    if message['role'] != 'assistant':
      continue
    before = render(row.messages[:i], add_generation_prompt=True)
    after = text if i == last else render(row.messages[: i + 1])
    if not (text.startswith(after) and after.startswith(before)):
      raise rows_lib.Refused(
        f'messages[{i}]',
        'the chat template renders the messages before this turn otherwise '
        'when more follow, so what to train cannot be told; wanted: a template '
        'that only appends',
      )
    for k in range(i - 1, -1, -1):
      if row.messages[k]['role'] == 'assistant':
        break
      _find(row, k, text, seen, len(before))
    end = _find(row, i, text, len(before), len(after))
    turns.append((i, len(before), end, len(after)))
    seen = len(after)
  return text, turns


def _find(row, i, text, start, end):
  """Where message i ends in text[start:end]; outer whitespace may be gone."""
  content = row.messages[i]['content'].strip()
  found = text.find(content, start, end)
  if found < 0:
    raise rows_lib.Refused(
      f'messages[{i}].content',
      'the chat template lost this text or changed it; wanted: a template that '
      'keeps it',
    )
  return found + len(content)


def check_bos(ids, bos):
  """Two BOS side by side: two owners. ChatML's own BOS opens every turn."""
  is_bos = ids == bos
  if (is_bos[1:] & is_bos[:-1]).any():
    raise rows_lib.Refused(
      'messages', f'the chat template gives BOS (id {bos}) twice; wanted: once'
    )


def masker(tokenizer, stop_ids):
  """mask(text, encoding, turns): bytes [tokens], 1 on what is trained."""
  follows_prompt = _prompt_checker(tokenizer)
  names = ', '.join(
    f'{i} {ascii(tokenizer.convert_ids_to_tokens(i))}' for i in stop_ids
  )

  def mark(bits, text, encoding, turn):
    i, start, answer_end, end = turn
    field = f'messages[{i}]'
    first = _first_token(encoding, start, end)
    if not follows_prompt(text, encoding, first, start):
      raise rows_lib.Refused(
        field,
        'the answer changes the tokens of the prompt, which ends with '
        f'{ascii(text[:start][-20:])}; wanted: an answer, or a template, that '
        'leaves them as generation will have them',
      )
    ids = encoding.ids
    stop = next((k for k in range(first, len(ids)) if ids[k] in stop_ids), -1)
    stop_start, stop_end = (
      encoding.token_to_chars(stop) if stop > 0 else (end, 0)
    )
    if stop_start >= end:
      raise rows_lib.Refused(
        field,
        'the chat template ends this turn with '
        f'{ascii(text[start:end][-20:])} and no stop token; wanted: one of '
        f'{names}',
      )
    if stop_start < answer_end:
      raise rows_lib.Refused(
        f'{field}.content',
        f'the stop token {ids[stop]} is inside the answer; wanted: after it',
      )
    if stop_end > end:
      raise rows_lib.Refused(
        field, 'a token lies across the end of this turn; wanted: none'
      )
    bits[first : stop + 1] = b'\1' * (stop + 1 - first)

  def mask(text, encoding, turns):
    bits = bytearray(len(encoding.ids))
    for turn in turns:
      mark(bits, text, encoding, turn)
    if 1 not in bits:
      raise rows_lib.Refused(
        'messages', 'no token is trained; wanted: an assistant turn'
      )
    return bits

  return mask

  return mask


def _first_token(encoding, start, end):
  """Index of the first token that covers text[start:end], or part of it."""
  for char in range(start, end):  # A token's offsets may leave out a space.
    token = encoding.char_to_token(char)
    if token is not None:
      return token
  return 0


def _prompt_checker(tokenizer):
  """Whether the tokens before `first` are what text[:start] alone gives.

  Tokenisation starts afresh at a special token, so only what comes after the
  last one is looked at; that is mostly '<|im_start|>assistant' and remembered.
  """
  backend = tokenizer.backend_tokenizer
  added = tokenizer.added_tokens_decoder
  special = {i for i, token in added.items() if token.special}
  known: dict[str, list[int]] = {}

  def follows_prompt(text, encoding, first, start):
    if not first or encoding.token_to_chars(first)[0] < start:
      return False
    ids = encoding.ids
    last = first - 1
    while last and ids[last] not in special:
      last -= 1
    piece = text[encoding.token_to_chars(last)[0] if last else 0 : start]
    if piece not in known:
      if len(known) > REMEMBERED:
        known.clear()
      known[piece] = backend.encode(piece, add_special_tokens=False).ids
    return known[piece] == ids[last:first]

  return follows_prompt
