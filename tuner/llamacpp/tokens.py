"""A tokenizer's files from the metadata of a GGUF file."""

import dataclasses
import json
import pathlib
import re
import typing

from tuner.llamacpp import bpe, library, spm

Json = typing.Any
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PREFIX = 'tokenizer.ggml.'
# config.json's name of a token and llama.cpp's.
NAMED = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}
STOPS = ('eos', 'eot', 'eom')  # llama.cpp stops at any of these.
TEMPLATE = 'tokenizer.chat_template'
KNOWN = {
  *(
    f'{PREFIX}{key}'
    for key in (
      'model pre tokens token_type scores merges add_bos_token add_eos_token '
      'add_space_prefix'
    ).split()
  ),
  *(f'{PREFIX}{name}_token_id' for name in (*NAMED.values(), *STOPS)),
  TEMPLATE,
  'tokenizer.chat_templates',
  # What an editor would fill in between, and what other tasks need.
  *(
    f'{PREFIX}{key}'
    for key in (
      'fim_pre_token_id fim_suf_token_id fim_mid_token_id fim_pad_token_id '
      'fim_rep_token_id fim_sep_token_id prefix_token_id suffix_token_id '
      'middle_token_id seperator_token_id mask_token_id cls_token_id '
      'add_sep_token token_type_count'
    ).split()
  ),
}
# llama.cpp finds Phi-3 by its name and lets its tokens eat the space after
# them, but for these.
NOT_STRIPPED = ('<unk>', '<s>', '<|endoftext|>')


PHI3 = re.compile('phi-?3', re.IGNORECASE)


def is_phi3(name: object) -> bool:
  return bool(PHI3.search(str(name)))


def fitting_name(name: str, strips: bool) -> str:
  """A general.name by which llama.cpp strips spaces as Phi-3 does, or not.

  By that name it also takes it that some tokens are there, and else ends.
  """
  if strips:
    return name if is_phi3(name) else f'phi-3 {name}'
  return PHI3.sub('phi 3', name)


@dataclasses.dataclass
class Tokenizer:
  """What a Hugging Face directory holds of a tokenizer."""

  backend: Json  # tokenizers.Tokenizer
  config: Json
  named: dict[str, str]
  ids: dict[str, int | None]
  stops: list[int]
  templates: dict[str, str]

  def write(self, folder: pathlib.Path) -> None:
    """tokenizer.json, its config, special tokens, templates, generation.

    The class `PreTrainedTokenizerFast` takes tokenizer.json as it is in
    transformers 4 and 5; a model's own may rebuild it and lose parts. The
    template stands in two places because 4 reads it from the config and 5
    writes it to a file.
    """
    self.backend.save(str(folder / 'tokenizer.json'))
    files: dict[str, Json] = {
      'tokenizer_config.json': self.config,
      'special_tokens_map.json': self.named,
      'generation_config.json': {**self.ids, 'eos_token_id': self.stops},
    }
    for name, value in files.items():
      text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
      (folder / name).write_text(text, encoding='utf-8')
    for name, text in self.templates.items():
      file = folder / 'chat_template.jinja'
      if name:
        file = folder / 'additional_chat_templates' / f'{name}.jinja'
        file.parent.mkdir(exist_ok=True)
      file.write_text(text, encoding='utf-8')


def of_metadata(fields: Json, config: Json) -> Tokenizer:
  """The tokenizer of a GGUF file; config: its config.json.

  Raises ValueError or KeyError for what is missing or not known.
  """
  _check_known(fields)
  tokens, types = (fields[PREFIX + k] for k in ('tokens', 'token_type'))
  if len(set(tokens)) != len(tokens):
    raise ValueError(f'{PREFIX}tokens: a token stands there twice.')
  if odd := sorted(set(types) - {*range(1, 7)}):
    raise ValueError(f'{PREFIX}token_type: {odd} are not known.')
  vocab = {t: i for i, t in enumerate(tokens) if types[i] != UNUSED}
  ids = {
    name: fields.get(f'{PREFIX}{key}_token_id') for name, key in NAMED.items()
  }
  ids = {name: None if i is None else int(i) for name, i in ids.items()}
  made, add_bos, prefix = _backend(fields, vocab, types, ids)
  added = _add_tokens(made, fields, tokens, types)
  _add_ends(made, fields, tokens, ids, add_bos)
  templates = _templates(fields)
  named = {f'{k}_token': tokens[i] for k, i in ids.items() if i is not None}
  stops = [
    fields[f'{PREFIX}{k}_token_id']
    for k in STOPS
    if k == 'eos' or f'{PREFIX}{k}_token_id' in fields
  ]
  adds = {'add_bos_token': True} if _adds(fields, 'bos', add_bos) else {}
  template = {'chat_template': templates['']} if '' in templates else {}
  return Tokenizer(
    made,
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'add_prefix_space': prefix,
      **adds,
      'added_tokens_decoder': added,
      **named,
      'model_max_length': config['max_position_embeddings'],
      'clean_up_tokenization_spaces': False,
      **template,
    },
    named,
    {f'{k}_token_id': ids[k] for k in ('bos', 'eos', 'pad')},
    [int(i) for i in dict.fromkeys(stops)],
    templates,
  )


def _check_known(fields: Json) -> None:
  unknown = [
    key
    for key in fields
    if key.startswith('tokenizer.') and not key.startswith(TEMPLATE + '.')
    if key not in KNOWN
    if key != f'{PREFIX}remove_extra_whitespaces' or fields[key]
  ]
  if unknown:
    raise ValueError(f'not known: {library.quote(unknown)}.')


def _backend(fields: Json, vocab, types, ids) -> tuple[Json, bool, bool]:
  """(tokenizer, add_bos where a file is silent, whether a space is added)."""
  kind = fields[f'{PREFIX}model']
  if kind == 'gpt2':
    pre = bpe.by_name(fields.get(f'{PREFIX}pre'))
    made = bpe.backend(pre, vocab, fields[f'{PREFIX}merges'])
    return made, pre.add_bos, False
  if kind != 'llama':
    raise ValueError(
      f"{PREFIX}model {kind!r} is not known; known are 'gpt2' and 'llama'."
    )
  prefix = bool(fields.get(f'{PREFIX}add_space_prefix', True))
  all_scores = fields[f'{PREFIX}scores']
  scores = {t: all_scores[i] for t, i in vocab.items() if types[i] == NORMAL}
  unknown = [t for t, i in vocab.items() if types[i] == UNKNOWN]
  if len(unknown) != 1:
    raise ValueError(f'{len(unknown)} tokens of the type unknown; wanted: 1.')
  if ids['unk'] is None:
    ids['unk'] = vocab[unknown[0]]
  return spm.backend(vocab, scores, unknown[0], prefix), True, prefix


def _add_tokens(made: Json, fields: Json, tokens, types) -> Json:
  """Adds what is matched before text is split; its added_tokens_decoder."""
  import tokenizers

  strips = is_phi3(fields.get('general.name'))
  decoder, special, plain = {}, [], []  # type: Json, list, list
  for i, token in enumerate(tokens):
    if types[i] not in (CONTROL, USER_DEFINED, UNKNOWN):
      continue
    flags = dict.fromkeys(
      ['lstrip', 'normalized', 'rstrip', 'single_word'], False
    )
    flags['rstrip'] = strips and token not in NOT_STRIPPED
    is_special = types[i] != USER_DEFINED
    added = tokenizers.AddedToken(token, special=is_special, **flags)
    (special if is_special else plain).append(added)
    decoder[str(i)] = {'content': token, **flags, 'special': is_special}
  made.add_special_tokens(special)
  made.add_tokens(plain)
  return decoder


def _adds(fields: Json, name: str, default: bool) -> bool:
  return bool(fields.get(f'{PREFIX}add_{name}_token', default))


def _add_ends(made: Json, fields: Json, tokens, ids, add_bos: bool) -> None:
  """The post-processor that puts bos in front and eos behind, if told so."""
  from tokenizers import processors

  wanted = {
    'bos': _adds(fields, 'bos', add_bos),
    'eos': _adds(fields, 'eos', False),
  }
  for name, is_wanted in wanted.items():
    if is_wanted and ids[name] is None:
      raise ValueError(f'{PREFIX}add_{name}_token without a token id.')
  if not any(wanted.values()):
    return
  front, back = ([tokens[ids[k]]] if wanted[k] else [] for k in wanted)
  made.post_processor = processors.TemplateProcessing(
    single=[*front, '$A:0', *back],
    pair=[
      *front,
      '$A:0',
      *back,
      *(f'{t}:1' for t in front),
      '$B:1',
      *(f'{t}:1' for t in back),
    ],
    special_tokens=[(tokens[ids[k]], ids[k]) for k in wanted if wanted[k]],
  )


def _templates(fields: Json) -> dict[str, str]:
  """{'': the chat template, name: another}."""
  found = {'': fields[TEMPLATE]} if TEMPLATE in fields else {}
  for key, text in fields.items():
    name = key.removeprefix(f'{TEMPLATE}.')
    if name != key:
      if not re.fullmatch(r'[\w-]+', name):
        raise ValueError(f'{key}: not the name of a file.')
      found[name] = text
  return found
