"""Templates by file, by name, with arguments; bad ones are refused in time."""

import ast
import json
import pathlib
import re
import time

import pytest
import support

from tuner.data import mask, probe, rows, sandbox
from tuner.data import template as template_lib


def make_row(*contents, where='file:1'):
  roles = ('user', 'assistant')
  return rows.Row(
    tuple(
      {'role': roles[i % 2], 'content': content}
      for i, content in enumerate(contents)
    ),
    where,
  )


def test_load_tokenizer(tiny_tokenizer_dir, tmp_path):
  tokenizer = template_lib.load_tokenizer(tiny_tokenizer_dir)
  assert tokenizer.chat_template == support.CHATML
  missing = tmp_path / 'missing'
  text = f'{missing} is not a directory; wanted: a Hugging Face model'
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    template_lib.load_tokenizer(missing)


def test_load_tokenizer_without_template(tokenizer_with, tmp_path):
  tokenizer_with(template=None).save_pretrained(tmp_path)
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tmp_path)
  assert str(error.value) == (
    f'{tmp_path} has no chat template; wanted: chat_template.jinja, or '
    'chat_template in tokenizer_config.json, or config.data.template: a .jinja '
    'file, or one of chatml, plain'
  )


@pytest.mark.parametrize(
  'generation, config, expected',
  [
    ({'eos_token_id': [7, 3, 7]}, {'eos_token_id': 1}, (3, 7)),
    ({'eos_token_id': 5}, {'eos_token_id': 1}, (5,)),
    ({}, {'eos_token_id': 1}, (1,)),
    (None, {'eos_token_id': [1, 0]}, (0, 1)),
    (None, {}, (2,)),
    (None, None, (2,)),
  ],
)
def test_stop_ids(generation, config, expected, tokenizer, tmp_path):
  """generation_config.json, then config.json, then the tokenizer."""
  for name, content in (('generation_config', generation), ('config', config)):
    if content is not None:
      (tmp_path / f'{name}.json').write_text(json.dumps(content))
  assert template_lib.stop_ids(tmp_path, tokenizer) == expected


def test_stop_ids_faults(tokenizer_with, tmp_path):
  with pytest.raises(ValueError) as error:
    template_lib.stop_ids(tmp_path, tokenizer_with(eos_token=None))
  assert str(error.value) == (
    f'{tmp_path} names no stop token; wanted: eos_token_id in '
    'generation_config.json'
  )
  file = tmp_path / 'generation_config.json'
  file.write_text('{"eos_token_id": "2"}')
  with pytest.raises(ValueError) as error:
    template_lib.stop_ids(tmp_path, tokenizer_with())
  assert str(error.value) == (
    f"{file}: eos_token_id is '2'; wanted: an id, or a list of ids"
  )
  file.write_text('{"eos_token_id')
  with pytest.raises(ValueError) as error:
    template_lib.stop_ids(tmp_path, tokenizer_with())
  assert str(error.value).startswith(f'{file} is not JSON: Unterminated')


def test_a_tokenizer_that_is_not_there_or_broken_is_named(tmp_path):
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tmp_path)
  assert str(error.value) == (
    f'{tmp_path} has no tokenizer.json, which is what is read here'
  )
  (tmp_path / 'tokenizer.json').write_text('<!DOCTYPE html>')
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tmp_path)
  assert str(error.value).startswith(
    f'{tmp_path}: tokenizer.json or tokenizer_config.json cannot be read: '
  )


def test_prompt_fault_names_the_row(tokenizer_with):
  tokenizer = tokenizer_with("{{ raise_exception('never') }}")
  with pytest.raises(ValueError) as error:
    template_lib.prompt_ids(make_row('a', 'b', where='file:7'), tokenizer)
  assert str(error.value) == (
    'file:7: messages: the chat template refuses them: never'
  )


def test_the_day_changes_no_token(tokenizer_with):
  """Llama 3.2's template writes today's date into the system turn."""
  today = (
    '{% if not date_string is defined %}{% set date_string = '
    "strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
  )
  tokenizer = tokenizer_with(today + support.CHATML)
  prompt = template_lib.prompt_ids(make_row('hi', 'yes'), tokenizer)
  assert tokenizer.decode(prompt).startswith('26 Jul 2024')


def test_a_template_of_today_is_refused(tokenizer_with, tmp_path):
  template = "{{ strftime_now('%d %b %Y') }}" + support.CHATML
  tokenizer_with(template).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="writes today's date"):
    template_lib.load_tokenizer(tmp_path)


def test_a_date_that_is_given_is_no_date_of_today(tokenizer_with, tmp_path):
  text = (
    '{% if not date_string is defined %}{% set date_string = '
    "strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
  )
  tokenizer_with(text + support.CHATML).save_pretrained(tmp_path)
  tokenizer = template_lib.load_tokenizer(tmp_path)
  assert tokenizer.chat_template == text + support.CHATML


def test_the_prompt_tells_of_the_tools(tokenizer_with):
  tokenizer = tokenizer_with('{{ tools[0].name }}')
  row = rows.Row(make_row('hi', 'yes').messages, tools=({'name': 'yes'},))
  prompt = template_lib.prompt_ids(row, tokenizer)
  assert tokenizer.decode(prompt) == 'yes'


def test_a_template_from_a_file(tiny_tokenizer_dir, tmp_path):
  file = tmp_path / 'mine.jinja'
  file.write_text('{{ messages[0].content }}é')
  tokenizer = template_lib.load_tokenizer(tiny_tokenizer_dir, str(file))
  assert tokenizer.chat_template == '{{ messages[0].content }}é'
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tiny_tokenizer_dir, 'none.jinja')
  assert str(error.value).startswith("template 'none.jinja' cannot be read: ")
  file.write_bytes(b'\xff')
  with pytest.raises(ValueError, match="mine.jinja' cannot be read: 'utf-8'"):
    template_lib.load_tokenizer(tiny_tokenizer_dir, str(file))


def test_a_template_by_name(tokenizer_with, tmp_path):
  """The tokenizer's own names come first, then the built-in ones."""
  named = {'default': support.CHATML, 'rag': 'b', 'plain': 'c'}
  named = {name: text + '{# #}' for name, text in named.items()}
  tokenizer_with(named).save_pretrained(tmp_path)
  for name, text in {None: named['default'], **named}.items():
    tokenizer = template_lib.load_tokenizer(tmp_path, name)
    assert tokenizer.chat_template == text
  built_in = (template_lib.BUILT_IN / 'chatml.jinja').read_text()
  tokenizer = template_lib.load_tokenizer(tmp_path, 'chatml')
  assert tokenizer.chat_template == built_in
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tmp_path, 'chatlm')
  assert str(error.value) == (
    "template 'chatlm' is not known; wanted: a .jinja file, or one of chatml, "
    'default, plain, rag'
  )


def test_built_in_templates(tokenizer_with, tmp_path):
  """Each gives a base model what it needs to be trained on a conversation."""
  tokenizer_with(None).save_pretrained(tmp_path)
  row = make_row('hi', 'yes', 'hi', 'no')
  texts = {
    'chatml': (
      '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n'
      '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n'
    ),
    'plain': (
      '<|im_start|>User: hi\n\nAssistant: yes<|im_end|>\n\n'
      'User: hi\n\nAssistant: no<|im_end|>\n\n'
    ),
  }
  assert texts.keys() == {f.stem for f in template_lib.BUILT_IN.iterdir()}
  for name, text in texts.items():
    tokenizer = template_lib.load_tokenizer(tmp_path, name)
    (((ids, bits),),) = mask.encoder(tokenizer, (2,), 99)([row])
    assert tokenizer.decode(ids) == text
    trained = tokenizer.decode(ids[bits == 1])
    assert trained.replace(' ', '') == 'yes<|im_end|>no<|im_end|>'


READS = (
  '{% macro f() %}{{ enable_thinking is defined and enable_thinking == false }}'
  '{% endmacro %}\n{{ f() }}{{ style }}\n'
)


def test_arguments_become_a_part_of_the_template(tokenizer_with, tmp_path):
  """Whoever renders with this tokenizer sees them, and may decide otherwise."""
  tokenizer_with(READS + support.CHATML).save_pretrained(tmp_path)
  style = 'a\'"\\é😀{{ 1 }}%}\n'
  given = {'enable_thinking': False, 'style': style}
  tokenizer = template_lib.load_tokenizer(tmp_path, None, given)
  row = make_row('hi', 'yes')
  prompt = tokenizer.decode(template_lib.prompt_ids(row, tokenizer))
  assert prompt.startswith(f'True{style}\n<|im_start|>user\nhi')
  tokenizer.save_pretrained(tmp_path / 'saved')
  saved = template_lib.load_tokenizer(tmp_path / 'saved')
  assert template_lib.identity(saved) == template_lib.identity(tokenizer)
  other = template_lib.load_tokenizer(tmp_path)
  assert template_lib.identity(other) != template_lib.identity(tokenizer)
  text = tokenizer.apply_chat_template(
    list(row.messages), tokenize=False, enable_thinking=True
  )
  assert text.startswith(f'False{style}')


@pytest.mark.parametrize('value', [None, True, 1, -0.5, 1e-9, [1, [None]], {}])
def test_any_value_is_itself(value, tokenizer_with, tmp_path):
  tokenizer_with('  {% if x %}{% endif %}{{ x | tojson }}').save_pretrained(
    tmp_path
  )
  tokenizer = template_lib.load_tokenizer(tmp_path, None, {'x': value})
  render = template_lib.renderer(tokenizer)
  assert render([{'role': 'user', 'content': 'hi'}]) == json.dumps(value)


@pytest.mark.parametrize(
  'name, value, text',
  [
    (
      'enable_thinkin',
      True,
      "argument 'enable_thinkin' is not read by the template; did you mean "
      "'enable_thinking'?; it reads enable_thinking, style",
    ),
    (
      'a b',
      True,
      "argument 'a b' cannot be set; wanted: a variable of the template",
    ),
    (
      'messages',
      [],
      "argument 'messages' cannot be set; wanted: a variable of the template",
    ),
    (
      'bos_token',
      'a',
      "argument 'bos_token' cannot be set; wanted: a variable of the template",
    ),
    (
      'style',
      {1, 2},
      "argument 'style' is {1, 2}; wanted: a value that JSON can hold",
    ),
    (
      'style',
      float('nan'),
      "argument 'style' is nan; wanted: a value that JSON can hold",
    ),
  ],
)
def test_bad_arguments(name, value, text, tokenizer_with, tmp_path):
  tokenizer_with(READS).save_pretrained(tmp_path)
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tmp_path, None, {name: value})
  assert str(error.value) == f'{tmp_path}: {text}'


LOOPS = '{% for i in range(99999) %}'
STOPS = '{% endfor %}'
TIME = (
  'was not done with a few short conversations after 5 s; wanted: one that ends'
)
MEMORY = (
  'takes more than 512 MiB of memory for a short conversation; wanted: one '
  'that writes what it is given'
)
OUTPUT = (
  'writes more than 500000 characters for a conversation of 43; wanted: one '
  'that writes what it is given'
)
DATE = (
  "writes today's date (strftime_now); wanted: the same tokens every day. "
  'Write a fixed date into the template.'
)
ONLY = '; wanted: one that only renders messages'
RENDERS = '; wanted: one that renders messages'
BAD = {
  'loops in loops': (LOOPS * 3 + STOPS * 3, TIME),
  'a power': ('{{ 10 ** (10 ** 9) }}', TIME),
  'much from loops': (LOOPS + "{{ 'a' * 1000 }}" + STOPS, OUTPUT),
  'a giant string': ("{{ 'a' * 10 ** 10 }}", MEMORY),
  'doubled': (
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    '{% set ns.s = ns.s ~ ns.s %}{% endfor %}',
    MEMORY,
  ),
  'a format width': ("{{ '%0999999999d' % 5 }}", MEMORY),
  'a smaller format width': ("{{ '%9999999d' % 5 }}", OUTPUT),
  'a date': (
    "{% if 0 %}{{ date_string }}{% endif %}{{ strftime_now('%d %b %Y') }}",
    DATE,
  ),
  'a class': (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches for '__class__' of 'str'" + ONLY,
  ),
  'globals': (
    '{{ raise_exception.__globals__ }}',
    "reaches for '__globals__' of 'function'" + ONLY,
  ),
  'an attribute by a filter': (
    "{{ (messages | attr('__class__')).mro() }}",
    "reaches for '__class__' of 'list'" + ONLY,
  ),
  'a change of the messages': (
    "{{ messages.append('a') }}",
    "reaches for 'append' of 'list'" + ONLY,
  ),
  'no Jinja': (
    "{{ messages\n}}{{ 'a' }",
    "is no Jinja: line 2: unexpected '}'; wanted: a Jinja template",
  ),
  'a file': (
    "{% include '/etc/passwd' %}",
    'renders none of the conversations that it was tried with: TypeError: no '
    'loader for this environment specified' + RENDERS,
  ),
  'without an end': (
    '{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}',
    'renders none of the conversations that it was tried with: RecursionError: '
    'maximum recursion depth exceeded' + RENDERS,
  ),
  'nested': (
    '{{ ' + '(' * 99999 + '1' + ')' * 99999 + ' }}',
    'is nested too deeply; wanted: one that can be read',
  ),
  'refuses everything': (
    "{{ raise_exception('a \x1b[31m') }}",
    'renders none of the conversations that it was tried with: TemplateError: '
    'a  [31m' + RENDERS,
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_template(name):
  """Refused in time, by what it does; this process is not the one at risk."""
  template, text = BAD[name]
  start = time.monotonic()
  with pytest.raises(ValueError) as error:
    probe.check(template)
  assert time.monotonic() - start < 10
  assert re.sub(r'exceeded while.*?;', 'exceeded;', str(error.value)) == (
    f'the chat template {text}'
  )


def test_the_time_is_the_processors(monkeypatch):
  """Long before the patience by the clock is at its end."""
  monkeypatch.setattr(probe, 'SECONDS', 1)
  start = time.monotonic()
  with pytest.raises(ValueError, match='conversations after 1 s'):
    probe.check(LOOPS * 3 + STOPS * 3)
  assert time.monotonic() - start < 0.8 * probe.PATIENCE_S


def test_a_bad_template_is_named(tiny_tokenizer_dir, tmp_path):
  """Where it is from, before anything is rendered with it."""
  file = tmp_path / 'bad.jinja'
  file.write_text("{{ 'a' * 10 ** 10 }}")
  with pytest.raises(ValueError) as error:
    template_lib.load_tokenizer(tiny_tokenizer_dir, str(file))
  assert (
    str(error.value) == f'template {str(file)!r}: the chat template {MEMORY}'
  )
  file.write_text(' ' * (probe.MAX_CHARACTERS + 1))
  with pytest.raises(ValueError, match='has 1048577 characters; wanted: at mo'):
    template_lib.load_tokenizer(tiny_tokenizer_dir, str(file))


def test_a_crash_is_only_the_childs(monkeypatch, tmp_path):
  """Whatever ends the child, its parent lives and says so."""
  crash = tmp_path / 'sandbox.py'
  crash.write_text('import os\nos.abort()')
  monkeypatch.setattr(probe, '__file__', str(tmp_path / 'probe.py'))
  with pytest.raises(ValueError, match=r'ended the process .*\(-6: '):
    probe.check('crash')
  crash.write_text('import time\ntime.sleep(60)')
  monkeypatch.setattr(probe, 'PATIENCE_S', 0.2)
  with pytest.raises(ValueError, match='was not done'):
    probe.check('sleep')


def test_a_verdict_is_remembered(monkeypatch):
  """A template costs one process, however many tokenizers have it."""
  assert probe.check('{{ messages }}{{ bos_token }}') == [
    'bos_token',
    'messages',
  ]
  monkeypatch.setattr(probe.subprocess, 'run', None)
  assert probe.check('{{ messages }}{{ bos_token }}') == [
    'bos_token',
    'messages',
  ]


def test_the_child_imports_little():
  """It starts anew for each template: no numpy, no transformers, no tuner."""
  imported = {
    alias.name.partition('.')[0]
    for node in ast.walk(ast.parse(pathlib.Path(sandbox.__file__).read_text()))
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
  }
  assert imported == {'datetime', 'jinja2', 'json', 'resource', 'sys'}


@pytest.mark.parametrize('messages, tools, add', sandbox.PROBES)
def test_the_child_renders_as_transformers_does(messages, tools, add):
  """Every kind of white space control, blocks, loop controls and filters."""
  text = (template_lib.BUILT_IN / 'chatml.jinja').read_text() + (
    '\n  {% for m in messages %}\n  {% if loop.index > 2 %}{% break %}'
    '{% endif %}\n{{ m | tojson(indent=1) }}\n{% endfor %}\n'
    '{% generation %}\n a\n {% endgeneration %}\n{{ dict(a=1) }}'
  )
  tokenizer = support.make_tokenizer(text)
  own = sandbox.environment().from_string(text)
  aliased = [  # transformers gives a thought every name that it has.
    {**m, 'thinking': m['reasoning_content']} if 'reasoning_content' in m else m
    for m in messages
  ]
  assert own.render(
    messages=aliased,
    tools=tools,
    documents=None,
    add_generation_prompt=add,
    **tokenizer.special_tokens_map,
  ) == tokenizer.apply_chat_template(
    messages, tools=tools, add_generation_prompt=add, tokenize=False
  )


def test_marked_renderings_are_of_the_same_day(tokenizer_with):
  tokenizer = tokenizer_with(
    '{{ date_string }}{% generation %}{{ tools[0].name }}{% endgeneration %}'
  )
  render = template_lib.block_renderer(tokenizer)
  messages = [{'role': 'user', 'content': 'hi', 'train': True}]
  assert render(messages, ({'name': 'yes'},)) == ('26 Jul 2024yes', [(11, 14)])
