"""A Go template is written only where it says what the chat template says."""

import json

import jinja2
import pytest

from tuner.llamacpp import modelfile

# Other templates' own words for the same text.
LLAMA3 = (
  '{{ bos_token }}{% for m in messages %}{{ "<|start_header_id|>" + m.role + '
  '"<|end_header_id|>\n\n" + m.content | trim + "<|eot_id|>" }}{% endfor %}'
  '{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}'
)
PHI3 = (
  "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + "
  "'<|end|>\n' }}"
  "{% endfor %}{{ '<|assistant|>\n' }}"
)
GEMMA2 = (
  '{{ bos_token }}{% if messages[0].role == "system" %}{{ raise("no") }}'
  '{% endif %}{% for m in messages %}{{ "<start_of_turn>" + '
  '("model" if m.role == "assistant" else m.role) + "\n" + m.content | trim + '
  '"<end_of_turn>\n" }}{% endfor %}{{ "<start_of_turn>model\n" }}'
)
MISTRAL = (
  '{{ bos_token }}{% if messages[0].role == "system" %}{% set s = '
  'messages[0].content %}{% set rest = messages[1:] %}{% else %}'
  '{% set rest = messages %}{% endif %}{% for m in rest %}'
  '{% if m.role == "user" %}{% if loop.last and s is defined %}'
  '{{ "[INST] " + s + "\n\n" + m.content + "[/INST]" }}{% else %}'
  '{{ "[INST] " + m.content + "[/INST]" }}{% endif %}{% else %}'
  '{{ " " + m.content + "</s>" }}{% endif %}{% endfor %}'
)


def renders(template):
  def refuse(text):
    raise modelfile.rows_lib.Refused('messages', text)

  compiled = jinja2.Environment().from_string(template)
  return lambda messages: compiled.render(
    messages=messages,
    bos_token='<s>',
    add_generation_prompt=True,
    **{'raise': refuse},
  )


@pytest.mark.parametrize(
  ('template', 'name'),
  [
    (LLAMA3, 'Llama 3'),
    (PHI3, 'Phi-3'),
    (GEMMA2, 'Gemma'),
    (MISTRAL, 'Mistral'),
  ],
)
def test_families_are_found_by_what_they_render(template, name):
  found = modelfile.family_of(renders(template), '<s>')
  assert found.family.name == name and found.default_system == ''


def test_chatml_with_a_system_message_of_its_own(helpers):
  plain = modelfile.family_of(renders(helpers.CHATML), '')
  assert plain.family.name == 'ChatML' and plain.default_system == ''
  lead = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nI am S.<|im_end|>"
    '\n{% endif %}'
  )
  compiled = jinja2.Environment(keep_trailing_newline=True)
  assert compiled.from_string(lead).render(messages=[{'role': 'x'}])
  own = "{{ '<|im_start|>system\nI am S.<|im_end|>\n' "
  own += "if messages[0].role != 'system' else '' }}"
  found = modelfile.family_of(renders(own + helpers.CHATML), '')
  assert found.family.name == 'ChatML' and found.default_system == 'I am S.'


@pytest.mark.parametrize(
  'template',
  [
    PHI3.replace('<|end|>\n', '<|end|>'),
    LLAMA3.replace('{{ bos_token }}', '{{ "<x>" }}'),
    # Thoughts of earlier turns left out, as Qwen 3 does.
    PHI3.replace('m.content', "m.content.split('</think>')[-1]"),
    '{{ raise("never") }}',
  ],
)
def test_what_renders_otherwise_is_of_no_family(template):
  assert modelfile.family_of(renders(template), '<s>') is None


def test_bos_that_only_the_template_writes_is_another_text():
  assert modelfile.family_of(renders(LLAMA3), '') is None


@pytest.mark.parametrize(
  'family', modelfile.FAMILIES, ids=[f.name for f in modelfile.FAMILIES]
)
def test_go_templates_render_as_their_twins(family):
  """Go's templates are read here by the few forms that are used."""
  for probe in modelfile.PROBES:
    assert go(family.go, probe) == family.render(probe)


def go(template, messages):
  """What Ollama makes of a template: translated to Jinja, form by form."""
  forms = {
    '{{ $first := true }}': '{% set ns = namespace(first=true) %}',
    '{{ $first = false }}': '{% set ns.first = false %}',
    '{{ range .Messages }}': '{% for m in messages %}',
    '{{ range $i, $_ := .Messages }}': '{% for m in messages %}',
    '{{ if eq .Role "user" }}': '{% if m.role == "user" %}',
    '{{ else if eq .Role "assistant" }}': '{% elif m.role == "assistant" %}',
    '{{ if and $first $.System }}': '{% if ns.first and system %}',
    '{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}': (
      '{% if system and loop.last %}'
    ),
    '{{ $.System }}': '{{ system }}',
    '{{ .Role }}': '{{ m.role }}',
    '{{ .Content }}': '{{ m.content }}',
  }
  # What closes a block does not say which.
  out, blocks, rest = '', [], template
  while rest:
    if not rest.startswith('{{'):
      text, mark, rest = rest.partition('{{')
      out, rest = out + text, mark + rest
      continue
    end = rest.index('}}') + 2
    form, rest = rest[:end], rest[end:]
    if form == '{{ end }}':
      out += '{% end' + blocks.pop() + ' %}'
      continue
    if form.startswith('{{ range'):
      blocks.append('for')
    elif form.startswith('{{ if'):
      blocks.append('if')
    out += forms[form]
  assert not blocks
  system = ''.join(m['content'] for m in messages if m['role'] == 'system')
  environment = jinja2.Environment(keep_trailing_newline=True)
  return environment.from_string(out).render(messages=messages, system=system)


def test_a_modelfile(make):
  folder, _ = make('llama')
  assert modelfile.text(folder, 'tiny.gguf') == (
    'FROM ./tiny.gguf\n'
    '# ChatML\n'
    'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n'
    '{{ .Content }}<|im_end|>\n'
    '{{ end }}<|im_start|>assistant\n'
    '"""\n'
    'PARAMETER stop "<|im_end|>"\n'
  )
  found = modelfile.text(folder, 'tiny.gguf', 'Say "so".')
  assert 'SYSTEM """Say "so"."""\n' in found


def test_a_modelfile_without_a_template_says_why(make):
  folder, _ = make('llama')
  path = folder / 'tokenizer_config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps({**config, 'chat_template': PHI3 + 'x'}))
  lines = modelfile.text(folder, 'a.gguf').splitlines()
  assert lines[0] == 'FROM ./a.gguf' and lines[-1].startswith('PARAMETER stop')
  assert lines[1].startswith('# No TEMPLATE') and 'ChatML' in lines[1]
  del config['chat_template']
  path.write_text(json.dumps(config))
  lines = modelfile.text(folder, 'a.gguf').splitlines()
  assert lines[1].startswith('# No TEMPLATE')
  assert not any(line.startswith('TEMPLATE') for line in lines)


def test_three_quotes_are_refused(make):
  folder, _ = make('llama')
  with pytest.raises(ValueError, match='three quotes'):
    modelfile.text(folder, 'a.gguf', 'a """ b')


def test_stop_tokens_must_be_named(make):
  folder, _ = make('llama')
  (folder / 'generation_config.json').write_text('{"eos_token_id": [2, 9999]}')
  with pytest.raises(ValueError, match='9999'):
    modelfile.text(folder, 'a.gguf')
  (folder / 'generation_config.json').unlink()
  with pytest.raises(ValueError, match='names the stop tokens'):
    modelfile.text(folder, 'a.gguf')
