"""The Modelfile with which Ollama serves a GGUF file.

Ollama renders conversations by a Go template. One is written only where it is
known to give the same text as the directory's own chat template: both render
the same conversations, the Go template by its twin in Python here. Else there
is none, and Ollama takes the one that it knows for the GGUF's chat template.
"""

import json
import os
import pathlib
import typing

from tuner.data import rows as rows_lib
from tuner.data import template as template_lib

Messages = list[dict[str, str]]


class Family(typing.NamedTuple):
  """A Go template and what it makes of messages, without bos."""

  name: str
  go: str
  render: typing.Callable[[Messages], str]


def _chatml(messages: Messages) -> str:
  turns = (
    f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n' for m in messages
  )
  return ''.join(turns) + '<|im_start|>assistant\n'


def _llama3(messages: Messages) -> str:
  def head(role: str) -> str:
    return f'<|start_header_id|>{role}<|end_header_id|>\n\n'

  turns = (head(m['role']) + m['content'] + '<|eot_id|>' for m in messages)
  return ''.join(turns) + head('assistant')


def _phi3(messages: Messages) -> str:
  turns = (f'<|{m["role"]}|>\n{m["content"]}<|end|>\n' for m in messages)
  return ''.join(turns) + '<|assistant|>\n'


def _split(messages: Messages) -> tuple[str, Messages]:
  """(the system message or '', the others)."""
  system = [m['content'] for m in messages if m['role'] == 'system']
  return ''.join(system), [m for m in messages if m['role'] != 'system']


def _gemma(messages: Messages) -> str:
  system, turns = _split(messages)
  text = ''
  for i, turn in enumerate(turns):
    role = {'assistant': 'model'}.get(turn['role'], turn['role'])
    lead = f'{system}\n\n' if system and i == 0 else ''
    text += f'<start_of_turn>{role}\n{lead}{turn["content"]}<end_of_turn>\n'
  return text + '<start_of_turn>model\n'


def _mistral(space: str) -> typing.Callable[[Messages], str]:
  def render(messages: Messages) -> str:
    system, turns = _split(messages)
    text = ''
    for i, turn in enumerate(turns):
      lead = f'{system}\n\n' if system and i == len(turns) - 1 else ''
      is_user = turn['role'] == 'user'
      words = lead + turn['content']
      text += (
        f'[INST]{space}{words}[/INST]' if is_user else f'{space}{words}</s>'
      )
    return text

  return render


def _mistral_go(space: str) -> str:
  return (
    '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
    f'[INST]{space}'
    '{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}'
    '{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]'
    '{{ else if eq .Role "assistant" }}'
    f'{space}'
    '{{ .Content }}</s>{{ end }}{{ end }}'
  )


FAMILIES = (
  Family(
    'ChatML',
    '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
    '{{ end }}<|im_start|>assistant\n',
    _chatml,
  ),
  Family(
    'Llama 3',
    '{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n'
    '{{ .Content }}<|eot_id|>{{ end }}'
    '<|start_header_id|>assistant<|end_header_id|>\n\n',
    _llama3,
  ),
  Family(
    'Phi-3',
    '{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}'
    '<|assistant|>\n',
    _phi3,
  ),
  # The first turn that is not the system's is found by what was written.
  Family(
    'Gemma',
    '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}'
    '<start_of_turn>user\n'
    '{{ if and $first $.System }}{{ $.System }}\n\n{{ end }}'
    '{{ $first = false }}{{ .Content }}<end_of_turn>\n'
    '{{ else if eq .Role "assistant" }}<start_of_turn>model\n'
    '{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}<start_of_turn>model\n',
    _gemma,
  ),
  Family('Mistral', _mistral_go(' '), _mistral(' ')),
  Family('Mistral with tekken', _mistral_go(''), _mistral('')),
)


def _message(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


ASK, ANSWER = _message('user', 'One?\nTwo?'), _message('assistant', 'Three.')
SYSTEM = _message('system', 'Be brief.')
THOUGHT = _message('assistant', '<think>\nSo.\n</think>\n\nFour.')
PLAIN = ([ASK], [ASK, ANSWER, ASK], [ASK, THOUGHT, ASK, ANSWER, ASK])
PROBES = (*PLAIN, *([SYSTEM, *messages] for messages in PLAIN))


class Found(typing.NamedTuple):
  """A family, and the system message of a conversation that has none."""

  family: Family
  default_system: str


def family_of(
  render: typing.Callable[[Messages], str], bos: str
) -> Found | None:
  """The family that renders as `render` does, which may raise rows.Refused.

  bos: what llama.cpp puts in front by itself, taken off where render wrote it.
  A probe that is refused (Gemma 2 takes no system message) says nothing, but
  one without a system message must be rendered.
  """
  texts = []
  for probe in PROBES:
    try:
      texts.append(render(probe).removeprefix(bos))
    except rows_lib.Refused:
      texts.append('')
  if not all(texts[: len(PLAIN)]):
    return None
  for family in FAMILIES:
    default = _default_system(family, texts[0])
    lead = [_message('system', default)] if default else []
    probes = [
      [*lead, *p] if i < len(PLAIN) else p for i, p in enumerate(PROBES)
    ]
    if all(not t or t == family.render(p) for t, p in zip(texts, probes)):
      return Found(family, default)
  return None


def _default_system(family: Family, text: str) -> str:
  """What the text of PLAIN[0] says where the family has its system message."""
  mark = '\0'
  before, after = family.render([_message('system', mark), *PLAIN[0]]).split(
    mark
  )
  is_there = text.startswith(before) and text.endswith(after)
  return text[len(before) : -len(after)] if is_there and after else ''


def text(
  hf_dir: str | os.PathLike[str],
  gguf_name: str,
  system: str | None = None,
) -> str:
  """The Modelfile for `gguf_name`, a file beside it, of a model in `hf_dir`.

  system: the system message of conversations that have none; that of the chat
  template when None. Raises ValueError.
  """
  folder = pathlib.Path(hf_dir)
  lines = [f'FROM ./{gguf_name}']
  found = None
  try:
    tokenizer = template_lib.load_tokenizer(folder)
  except ValueError as error:
    lines.append(f'# No TEMPLATE: {" ".join(str(error).split())}')
  else:
    found = family_of(_prompt(tokenizer), _own_bos(tokenizer))
    if found is None:
      lines.append(
        "# No TEMPLATE: the model's chat template is none of "
        f'{", ".join(f.name for f in FAMILIES)}; Ollama takes the one it knows '
        'for it.'
      )
    else:
      lines += [
        f'# {found.family.name}',
        f'TEMPLATE {_quoted(found.family.go)}',
      ]
  if system is None and found:
    system = found.default_system
  if system:
    lines.append(f'SYSTEM {_quoted(system)}')
  lines += [f'PARAMETER stop {_quoted(stop)}' for stop in _stops(folder)]
  return '\n'.join(lines) + '\n'


def _prompt(tokenizer) -> typing.Callable[[Messages], str]:
  render = template_lib.renderer(tokenizer)
  return lambda messages: render(messages, add_generation_prompt=True)


def _own_bos(tokenizer) -> str:
  """bos, where the tokenizer puts it in front of every text."""
  ids = tokenizer.backend_tokenizer.encode('a').ids
  is_put = ids[:1] == [tokenizer.bos_token_id]
  return tokenizer.bos_token if is_put and tokenizer.bos_token else ''


def _quoted(value: str) -> str:
  if '"""' in value or value.endswith('"'):
    raise ValueError(f'{value!r} cannot stand in a Modelfile: three quotes.')
  return f'"""{value}"""' if '\n' in value or '"' in value else f'"{value}"'


def _stops(folder: pathlib.Path) -> list[str]:
  """The texts of the stop tokens in generation_config.json."""
  import tokenizers

  file = folder / 'generation_config.json'
  if not file.is_file():
    raise ValueError(f'{file} is missing: it names the stop tokens.')
  ids = json.loads(file.read_text(encoding='utf-8')).get('eos_token_id')
  ids = ids if isinstance(ids, list) else [ids]
  made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  stops: list = [made.id_to_token(i) for i in ids if i is not None]
  if not stops or None in stops:
    raise ValueError(f'{file}: eos_token_id: {ids}; wanted: ids of tokens.')
  return stops
