"""The tokenizer, its chat template, and what they make of messages.

A conversation is rendered by the tokenizer's own template and tokenised once,
without special tokens beyond the template's.
"""

import json
import pathlib
import re

import jinja2

from tuner import named
from tuner.data import probe
from tuner.data import rows as rows_lib

# What Llama 3's templates take for today, and their own default: the day must
# change neither the tokens nor what a resumed run trains on.
DATE = '26 Jul 2024'
BUILT_IN = pathlib.Path(__file__).with_name('templates')
RESERVED = ('messages', 'tools', 'documents', 'add_generation_prompt')
GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')


def load_tokenizer(path, template=None, arguments=None):
  """The tokenizer of a local Hugging Face directory, with a chat template.

  template: None for its own; else a .jinja file, or the name of one of its own
  or of the built-in ones. arguments: variables of the template, such as
  enable_thinking=False. They become a part of it, so that all that renders with
  this tokenizer, here or elsewhere, gives the same text. Raises ValueError.
  """
  import transformers  # Takes a second; the rest of this file does not need it.

  path = pathlib.Path(path).expanduser()
  if not path.is_dir():
    raise ValueError(f'{path} is not a directory; wanted: a Hugging Face model')
  if not (path / 'tokenizer.json').is_file():
    raise ValueError(
      f'{path} has no tokenizer.json, which is what is read here'
    )
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      str(path), trust_remote_code=False, local_files_only=True
    )
  except Exception as error:  # Libraries raise anything, and name no file.
    reason = (str(error).splitlines() or [''])[0]
    raise ValueError(
      f'{path}: tokenizer.json or tokenizer_config.json cannot be read: '
      f'{reason}'
    ) from error
  text = _find(path, tokenizer.chat_template, template)
  try:
    tokenizer.chat_template = _checked(tokenizer, text, dict(arguments or {}))
  except ValueError as error:
    where = path if template is None else f'template {template!r}'
    raise ValueError(f'{where}: {error}') from None
  return tokenizer


def _find(path, own, template):
  """The text of the template of that name, or in that file."""
  own = own if isinstance(own, dict) else {'default': own} if own else {}
  built_in = {file.stem: file for file in BUILT_IN.glob('*.jinja')}
  names = ', '.join(sorted({*own, *built_in}))
  if template is None:
    if 'default' in own:
      return own['default']
    ways = f'or config.data.template: a .jinja file, or one of {names}'
    raise ValueError(
      f'{path} has no chat template; wanted: chat_template.jinja, or '
      f'chat_template in tokenizer_config.json, {ways}'
    )
  if template in own:
    return own[template]
  file = built_in.get(template) or pathlib.Path(template).expanduser()
  if template not in built_in and file.suffix != '.jinja':
    raise ValueError(
      f'template {template!r} is not known; wanted: a .jinja file, or one of '
      f'{names}'
    )
  try:
    return file.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'template {template!r} cannot be read: {error}') from None


def _checked(tokenizer, text, arguments):
  """The template with its arguments set. Raises ValueError."""
  if 'strftime_now' in text and 'date_string' not in text:
    raise ValueError(
      "the chat template writes today's date (strftime_now); wanted: the same "
      'tokens every day. Write a fixed date into the template.'
    )
  given = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
  given['date_string'] = DATE
  for name, value in arguments.items():
    if not name.isidentifier() or name in (*given, *RESERVED):
      raise ValueError(
        f'argument {name!r} cannot be set; wanted: a variable of the template'
      )
    try:
      arguments[name] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
      raise ValueError(
        f'argument {name!r} is {value!r}; wanted: a value that JSON can hold'
      ) from None
  # A line each: the newline is not part of the text. {% set %} alone would not
  # let whoever serves the model decide otherwise.
  prefix = ''.join(
    f'{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}'
    '{% endif %}\n'
    for name, value in arguments.items()
  )
  names = set(probe.check(text, prefix, given)) - {*given, *RESERVED}
  for name in arguments:
    if name not in names:
      listed = ', '.join(sorted(names)) or 'none'
      raise ValueError(
        f'argument {name!r} is not read by the template'
        f'{named.nearest(name, names)}; it reads {listed}'
      )
  return prefix + text


def stop_ids(path, tokenizer):
  """Ids that end a turn, ascending: generation_config.json's eos_token_id.

  Where it names none, config.json's; then the tokenizer's own.
  """
  for name in ('generation_config.json', 'config.json'):
    file = pathlib.Path(path).expanduser() / name
    if not file.is_file():
      continue
    try:
      config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
      raise ValueError(f'{file} is not JSON: {error}') from error
    found = config.get('eos_token_id')
    if found is None:
      continue
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
      raise ValueError(
        f'{file}: eos_token_id is {found!r}; wanted: an id, or a list of ids'
      )
    return tuple(sorted(set(ids)))
  if tokenizer.eos_token_id is None:
    raise ValueError(
      f'{path} names no stop token; wanted: eos_token_id in '
      'generation_config.json'
    )
  return (tokenizer.eos_token_id,)


def prompt_ids(row, tokenizer):
  """The ids generation starts from: the row's prompt, up to its last turn."""
  try:
    text = renderer(tokenizer)(row.prompt, True, row.tools)
  except rows_lib.Refused as refused:
    raise ValueError(f'{row.where}: {refused}') from None
  return backend(tokenizer).encode(text, add_special_tokens=False).ids


def identity(tokenizer):
  """All that renderings follow from: the template, its arguments, the date."""
  return [tokenizer.chat_template, DATE]


def backend(tokenizer):
  """The tokenizer's own backend, which neither cuts nor pads."""
  own = tokenizer.backend_tokenizer
  own.no_truncation()  # tokenizer.json may ask for both, and a row would be
  own.no_padding()  # cut without a word.
  return own


def renderer(tokenizer):
  """render(messages, add_generation_prompt=False, tools=()) -> text.

  That is what `tokenizer.apply_chat_template` gives. Raises rows.Refused.
  """
  plain = _plain_renderer(tokenizer)

  def render(messages, add_generation_prompt=False, tools=()):
    try:
      shown = _shown(messages)
      if plain and not tools and {*map(len, shown)} == {2}:
        return plain(shown, add_generation_prompt)
      return tokenizer.apply_chat_template(
        shown,
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        date_string=DATE,
      )
    except Exception as error:  # A template may raise anything.
      raise _refused(error) from None

  return render


def _plain_renderer(tokenizer):
  """The same for messages of role and content alone, in half the time.

  apply_chat_template copies and renames fields that such messages lack. None
  where its compiled template cannot be had.
  """
  import transformers.utils.chat_template_utils as templates

  compile_template = getattr(templates, '_compile_jinja_template', None)
  if compile_template is None:
    return None
  template = compile_template(tokenizer.chat_template)
  given = {
    'tools': None,
    'documents': None,
    **tokenizer.special_tokens_map,
    'date_string': DATE,
  }
  return lambda messages, add_generation_prompt: template.render(
    messages=messages, add_generation_prompt=add_generation_prompt, **given
  )


def block_renderer(tokenizer):
  """render(messages, tools) -> (text, blocks), None without {% generation %}.

  A block is (start, end): the characters that one {% generation %} wrote.
  """
  import transformers.utils.chat_template_utils as templates

  if not GENERATION.search(tokenizer.chat_template):
    return None

  def render(messages, tools=()):
    try:
      (text,), (blocks,) = templates.render_jinja_template(
        [_shown(messages)],
        tools=list(tools) or None,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, 'date_string': DATE},
      )
    except Exception as error:
      raise _refused(error) from None
    return text, blocks

  return render


def _shown(messages):
  """The messages as a template may see them."""
  return [
    {k: v for k, v in message.items() if k != 'train'}
    if 'train' in message
    else message
    for message in messages
  ]


def _refused(error):
  if isinstance(error, jinja2.TemplateError):
    text = f'the chat template refuses them: {error}'
  else:
    text = f'the chat template fails on them: {type(error).__name__}: {error}'
  return rows_lib.Refused('messages', text)
