"""What is exported holds what was trained, and all that serving it needs."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import support

from tuner import adapt
from tuner.artifacts import card, deliver, export, prompts
from tuner.data import template as template_lib
from tuner.models import hub, weights

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 16))
pytestmark = pytest.mark.usefixtures('quick_compiles')
LAYOUTS = {
  'all': {},
  'rslora': dict(scaling='rslora', rank=5, alpha=4.0),
  'names': dict(targets=['o_proj', 'q', 'blocks.0.mlp.down']),
  'letters': dict(targets='K'),
  'dora': dict(name='dora'),
}


def logits(model, values):
  return np.asarray(support.logits(weights.fill(model, values), TOKENS))


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def theirs(path, adapter=None):
  """Logits by transformers, and peft where there is an adapter."""
  import peft
  import torch
  import transformers

  torch.set_num_threads(1)  # Several spin while they wait for a core.
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  if adapter:
    model = peft.PeftModel.from_pretrained(model, adapter)
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize('name', LAYOUTS)
def test_adapter_and_merged_model_say_the_same_elsewhere(made, tmp_path, name):
  """base + adapter by peft, merged by transformers: our logits, attached."""
  state = made.make(adaptation={'rank': 3, 'alpha': 6.0, **LAYOUTS[name]})
  for kind in ('adapter', 'model'):
    (tmp_path / kind).mkdir()
    export.FORMATS[kind](tmp_path / kind, state, {})
  expected = logits(state.model, state.attached)
  assert_close(theirs(state.base_dir, tmp_path / 'adapter'), expected)
  assert_close(theirs(tmp_path / 'model'), expected)
  base = logits(state.model, state.frozen)
  assert np.abs(expected - base).max() > 0.1


@pytest.mark.parametrize('tied', [True, False])
def test_merging_an_untrained_lora_changes_no_bit(made, tmp_path, tied):
  base = tmp_path / 'base'
  base.mkdir()
  support.write_model(base, tie_word_embeddings=tied)
  state = made.make(base)
  zeros = {
    path: jnp.zeros_like(x) if path.endswith('.b') else x
    for path, x in state.trainable.items()
  }
  state.trainable.update(zeros)
  (tmp_path / 'model').mkdir()
  export.model(tmp_path / 'model', state, {})
  found, expected = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (tmp_path / 'model', base)
  )
  assert found.keys() == expected.keys()
  assert ('lm_head.weight' in found) != tied
  for name, x in expected.items():
    assert found[name].tobytes() == x.tobytes(), name


COMPANIONS = {
  'tokenizer.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'generation_config.json',
}
OURS = {'README.md', 'prompts.jsonl'}
OWN = {
  'adapter': {
    'adapter_config.json',
    'adapter_model.safetensors',
    'tuner.json',
  },
  'model': {'config.json', 'model.safetensors'},
  'orbax': {'config.json', 'weights.json', 'weights'},
}


@pytest.mark.parametrize('name', OWN)
def test_what_serving_needs_lies_beside(made, tmp_path, name):
  """Tokenizer, template and generation config byte for byte; nothing else."""
  state = made.state
  export.FORMATS[name](tmp_path, state, {})
  for file in COMPANIONS:
    expected = (state.base_dir / file).read_bytes()
    assert (tmp_path / file).read_bytes() == expected
  files = {file.name for file in tmp_path.iterdir()}
  assert files == COMPANIONS | OURS | OWN[name]
  for file in files - {'weights'}:
    assert (tmp_path / file).stat().st_mode & 0o444 == 0o444, file


def test_gguf_directory(made, tmp_path):
  pytest.importorskip('gguf')
  export.gguf(tmp_path, made.state, {})
  files = {file.name for file in tmp_path.iterdir()}
  assert files == {*OURS, 'model-f16.gguf', 'Modelfile'}
  assert 'FROM ./model-f16.gguf' in (tmp_path / 'Modelfile').read_text()


def test_what_llama_cpp_does_otherwise_is_told(made, tmp_path, capsys):
  """A line a note, under the format's own; none where there is none."""
  pytest.importorskip('gguf')
  base = tmp_path / 'base'
  shutil.copytree(made.state.base_dir, base)
  file = base / 'tokenizer.json'
  tokens = json.loads(file.read_text())
  tokens['added_tokens'][0]['lstrip'] = True
  file.write_text(json.dumps(tokens))
  name = tokens['added_tokens'][0]['content']
  for state, notes in ((made.state, []), (made.make(base), [name])):
    deliver.write(state, ['gguf'], tmp_path / 'out', is_verified=False)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line[2:7] == 'gguf ')
    told = ' '.join(' '.join(lines[at + 1 :]).split())
    assert told == ' '.join(
      'gguf: llama.cpp does not strip spaces around tokens as tokenizer.json '
      f'does for {note}'
      for note in notes
    )
    assert max(map(len, lines[at + 1 :]), default=0) <= 80


def test_a_tokenizer_that_llama_cpp_lacks_is_named(made, tmp_path, tiny_dir):
  """By the base's own file; what can be written stays, with its record."""
  pytest.importorskip('gguf')
  state = made.make(tiny_dir)
  with pytest.raises(RuntimeError) as caught:
    deliver.write(state, ['gguf', 'model'], tmp_path, is_verified=False)
  text = str(caught.value)
  assert text.startswith(f'gguf was not written: {tiny_dir}: tokenizer.json')
  assert str(tmp_path) not in text
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'model', 'verify.json'}


@pytest.mark.parametrize('name', OWN)
def test_the_template_that_was_trained_with_travels(made, tmp_path, name):
  state = made.make(template='chatml')
  own = state.tokenizer.chat_template
  assert own != template_lib.load_tokenizer(state.base_dir).chat_template
  export.FORMATS[name](tmp_path, state, {})
  found = template_lib.load_tokenizer(tmp_path)
  assert found.chat_template == own
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert config['chat_template'] == own


def test_generation_ends_where_it_was_trained_to(made, tmp_path):
  """Of a base whose own file names no end, that of its config is written."""
  base = tmp_path / 'base'
  base.mkdir()
  support.write_model(base, eos_token_id=[0, 2])
  (base / 'generation_config.json').write_text('{"top_k": 5}')
  state = made.make(base)
  export.model(tmp_path, state, {})
  found = json.loads((tmp_path / 'generation_config.json').read_text())
  assert found == {'top_k': 5, 'eos_token_id': [0, 2]}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_config_names_the_dtype_written(made, tmp_path, dtype):
  export.model(tmp_path, made.make(export=dict(dtype=dtype)), {})
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['dtype'] == config['torch_dtype'] == dtype
  assert config['rope_theta'] == config['rope_parameters']['rope_theta']
  held = hub.Tensors(tmp_path)
  names = {held.slice_of(name).get_dtype() for name in held.names()}
  assert names == {
    {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[dtype]
  }


def test_shards(made, tmp_path):
  export.model(tmp_path, made.make(export=dict(max_shard_bytes=50_000)), {})
  files = sorted(tmp_path.glob('*.safetensors'))
  assert len(files) > 1
  assert all(file.stat().st_size < 60_000 for file in files)


def test_orbax_is_read_without_this_program(made, tmp_path):
  """A flat dict by path; weights.json makes Hugging Face tensors of it."""
  state = made.state
  export.orbax(tmp_path, state, {})
  found = ocp.PyTreeCheckpointer().restore(tmp_path / 'weights')
  said = json.loads((tmp_path / 'weights.json').read_text())
  assert found.keys() == said.keys() == state.rows.keys()
  sizes, held = state.model.config.sizes, {}
  for path, one in said.items():
    assert list(found[path].shape) == one['shape']
    assert len(one['dims']) == len(one['shape'])
    for index, name in one['hf_names']:
      held[name] = found[path][tuple(index)]
  for path, row in state.rows.items():
    merged = adapt.merge(state.rows, state.attached, path)
    np.testing.assert_array_equal(found[path], merged)
    names = [name for name, _ in hub.hf_tensors(row, found[path], sizes)]
    assert set(names) <= held.keys()


def test_full_fine_tuning_is_a_model(made, tmp_path):
  state = made.make(adaptation={'name': 'full'})
  export.model(tmp_path, state, {})
  _, values = support.load_model(tmp_path)
  for path, x in state.trainable.items():
    np.testing.assert_array_equal(values[path], x)


@pytest.mark.parametrize('name', ['adapter', 'model', 'gguf'])
def test_twice_is_the_same_bytes(made, tmp_path, name):
  if name == 'gguf':
    pytest.importorskip('gguf')
  found = []
  for i in range(2):
    place = tmp_path / str(i)
    place.mkdir()
    export.FORMATS[name](place, made.state, {})
    found.append({f.name: f.read_bytes() for f in place.iterdir()})
  assert found[0] == found[1]


@pytest.mark.parametrize('name', ['adapter', 'model', 'gguf', 'orbax'])
def test_no_place_of_this_machine(made, tmp_path, name):
  """But base_model_name_or_path, where `peft` looks for a local base."""
  if name == 'gguf':
    pytest.importorskip('gguf')
  export.FORMATS[name](tmp_path, made.state, {})
  for file in tmp_path.rglob('*'):
    if file.is_file() and file.name != 'adapter_config.json':
      content = file.read_bytes()
      for place in (made.state.base_dir, made.workdir, tmp_path):
        assert str(place).encode() not in content, file


def test_needed_bytes_are_enough(made, tmp_path):
  for name in OWN:
    (tmp_path / name).mkdir()
    export.FORMATS[name](tmp_path / name, made.state, {})
    used = sum(
      f.stat().st_size for f in (tmp_path / name).rglob('*') if f.is_file()
    )
    needed = export.needed_bytes(name, made.state)
    assert used <= needed <= used + 2 * export.OTHER_BYTES


def test_prompts_are_what_the_tokenizer_makes(made, tmp_path):
  export.adapter(tmp_path, made.state, {})
  found = prompts.read(tmp_path / 'prompts.jsonl')
  assert len(found) == prompts.SHOWN
  tokenizer = template_lib.load_tokenizer(tmp_path)
  for prompt in found:
    text = tokenizer.apply_chat_template(
      list(prompt.messages), tokenize=False, add_generation_prompt=True
    )
    assert text == prompt.text
    assert tuple(tokenizer(text)['input_ids']) == prompt.ids


def front_matter(text):
  return re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)[1].splitlines()


def test_a_licence_is_the_bases_own_word(made, tmp_path):
  base = tmp_path / 'base'
  base.mkdir()
  support.write_model(base)
  state = made.make(base)
  assert not any(
    'license' in x for x in front_matter(card.text(state, 'model'))
  )
  (base / 'README.md').write_text(
    '---\nlicense: apache-2.0\ntags:\n- x\nlicense_link: "a\\nb: [c"\n---\nhi'
  )
  lines = front_matter(card.text(state, 'model'))
  assert lines[0] == 'license: "apache-2.0"'
  assert not any('license_link' in line for line in lines)


HOSTILE = '| a <b>`x`</b> [l](http://e) ![i](u) \x1b[31m\u202e\n# h'


def test_names_in_a_card_are_inert(made, tmp_path):
  """Text of data and models makes no markup, no row and no heading."""
  folder = tmp_path / 'eval'
  folder.mkdir()
  score = {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 4}
  record = {'metrics': {HOSTILE: score}}
  (folder / 'test.4.json').write_text(json.dumps(record))
  (tmp_path / 'config.json').write_text(json.dumps({'adapt': '```\n# h'}))
  state = made.state
  object.__setattr__(state, 'workdir', tmp_path)
  try:
    text = card.text(state, 'model')
  finally:
    object.__setattr__(state, 'workdir', made.workdir)
  row = next(line for line in text.splitlines() if '0.500' in line)
  assert len(re.findall(r'(?<!\\)\|', row)) == 5
  assert not re.search(r'(?<!\\)[<>\[\]`!]', row.split('0.500')[0])
  assert '\x1b' not in text and '\u202e' not in text
  assert '0.500 [0.250, 0.750] | 4 |' in row
  assert not re.search('^# h', text, re.MULTILINE)
  assert '````json' in text


def test_a_warning_of_peft_is_explained(made, tmp_path):
  """Of adapters on experts, gate and up have twice the rank of the others."""
  support.write_model(
    tmp_path, model_type='mixtral', num_local_experts=4, num_experts_per_tok=2
  )
  experts = {'rank': 3, 'targets': ['q', 'gate', 'up', 'down']}
  state = made.make(tmp_path, adaptation=experts)
  told = '`peft` warns that keys of `rank_pattern`'
  assert told in card.text(state, 'adapter')
  assert told not in card.text(state, 'model')
  assert told not in card.text(made.state, 'adapter')
  names = made.make(adaptation={**LAYOUTS['names'], 'rank': 3})
  assert told not in card.text(names, 'adapter')


def test_scores_of_another_step_are_not_claimed(made):
  state = made.state
  state.record['step'] = 2
  try:
    text = card.text(state, 'model')
  finally:
    state.record['step'] = 4
  assert 'Not measured: this is step 2 of 4.' in text
