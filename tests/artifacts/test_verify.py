"""Verification passes what is right, and fails whatever is changed."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
import support

from tuner.artifacts import (
  declared,
  deliver,
  export,
  outside,
  reread,
  room,
  table,
  verify,
)
from tuner.models import hub

pytestmark = pytest.mark.usefixtures('quick_compiles')

FORMATS = ('adapter', 'model', 'gguf', 'orbax')


@pytest.fixture(scope='module')
def wanted(made):
  return verify.reference(made.state)


@pytest.fixture(scope='module')
def written(made, tmp_path_factory):
  """A directory of each format."""
  folder = tmp_path_factory.mktemp('written')
  places = {}
  for name in FORMATS:
    if name == 'gguf':
      pytest.importorskip('gguf')
    places[name] = folder / name
    places[name].mkdir()
    export.FORMATS[name](places[name], made.state, dict(places))
  return places


@pytest.mark.parametrize('name', FORMATS)
def test_what_was_written_passes(made, wanted, written, name):
  found = reread.check(name, written[name], made.state, wanted)
  assert found.faults == []
  assert (found.weights, found.prompts) == (0, 4)
  if name == 'gguf':  # float16
    assert found.kl < 1e-3
  else:
    assert found.agree == 4 and found.difference < 5e-4


def flip(file, fraction):
  """Flips a byte range at that part of a file."""
  content = bytearray(file.read_bytes())
  start = int(len(content) * fraction)
  for i in range(start, start + 4):
    content[i] ^= 0x55
  file.write_bytes(content)


def replace(file, old, new):
  content = file.read_bytes()
  assert old in content and len(old) == len(new)
  file.write_bytes(content.replace(old, new))


def end_elsewhere(file):
  config = json.loads(file.read_text())
  file.write_text(json.dumps({**config, 'eos_token_id': [0]}))


def gguf_ends_elsewhere(file):
  content = bytearray(file.read_bytes())
  key = b'tokenizer.ggml.eos_token_id'
  at = content.index(key) + len(key) + 4  # the type stands before the value
  assert content[at] == 2
  content[at] = 0
  file.write_bytes(content)


def gguf_says(key, old, new):
  """A change of one number of the metadata; its type stands before it."""

  def change(folder):
    file = folder / GGUF
    content = bytearray(file.read_bytes())
    at = content.index(key.encode()) + len(key) + 4
    kind = '<f' if isinstance(old, float) else '<I'
    assert content[at : at + 4] == struct.pack(kind, old)
    content[at : at + 4] = struct.pack(kind, new)
    file.write_bytes(content)

  return change


GGUF = 'model-f16.gguf'
DOWN = 'weights/blocks.0.mlp.down/0.0.0'
HF = ('adapter', 'model', 'orbax')
ASKS = b'<|im_start|>assistant'
RETOLD = 'is tokenised otherwise'
MUTATIONS = {
  'adapter weight': (
    lambda d: flip(d / 'adapter_model.safetensors', 0.7),
    '1 weights are not what was to be written',
  ),
  'adapter scale': (
    lambda d: replace(d / 'adapter_config.json', b'"r": 3', b'"r": 4'),
    'adapter_config.json is not what was to be written',
  ),
  'model weight': (
    lambda d: flip(d / 'model.safetensors', 0.7),
    '1 weights are not what was to be written',
  ),
  'model config': (
    lambda d: replace(d / 'config.json', b'_eps": 1e-05', b'_eps": 2e-05'),
    'config.json is not what was to be written',
  ),
  'gguf weight': (
    lambda d: flip(d / GGUF, 0.7),
    '1 weights are not what was to be written',
  ),
  'gguf token': (lambda d: replace(d / GGUF, b'user', b'usre'), ''),
  'gguf template': (
    lambda d: replace(d / GGUF, ASKS, ASKS.replace(b'ant', b'ent')),
    RETOLD,
  ),
  'gguf stop': (
    lambda d: gguf_ends_elsewhere(d / GGUF),
    'generation does not end at 2',
  ),
  'orbax weight': (
    lambda d: flip(d / DOWN, 0.7),
    '',
  ),
  'orbax names': (
    lambda d: replace(d / 'weights.json', b'up_proj', b'pu_proj'),
    'weights.json is not what was to be written',
  ),
}
DECLARED = 'another model is declared: '
NUMBERS = {
  'attention.layer_norm_rms_epsilon': (1e-5, 2e-5, 'norm.eps: '),
  'rope.freq_base': (1e4, 2e4, 'ropes.0.theta: 20000.0, not 10000.0'),
  'context_length': (256, 128, 'max_positions: 128, not 256'),
}
for _key, (_old, _new, _fault) in NUMBERS.items():
  MUTATIONS[f'gguf {_key}'] = (
    gguf_says(f'llama.{_key}', _old, _new),
    DECLARED + _fault,
  )
for _name in HF:
  MUTATIONS[f'{_name} tokenizer'] = (
    lambda d: replace(d / 'tokenizer.json', b'"us"', b'"su"'),
    'tokenizer.json is not what was to be written',
  )
  MUTATIONS[f'{_name} template'] = (
    lambda d: replace(d / 'chat_template.jinja', b'ant', b'ent'),
    RETOLD,
  )
  MUTATIONS[f'{_name} stop'] = (
    lambda d: end_elsewhere(d / 'generation_config.json'),
    'generation does not end at 2, as it was trained to; it ends at 0',
  )
for _name in FORMATS:
  MUTATIONS[f'{_name} prompts'] = (
    lambda d: (d / 'prompts.jsonl').unlink(),
    'prompts.jsonl is missing',
  )


@pytest.mark.parametrize('case', MUTATIONS)
def test_a_change_fails(made, wanted, written, tmp_path, case):
  name = case.partition(' ')[0]
  change, fault = MUTATIONS[case]
  place = tmp_path / name
  shutil.copytree(written[name], place)
  change(place)
  found = reread.check(name, place, made.state, wanted)
  assert found.faults
  if fault:  # Else it depends on which library meets it first.
    assert any(fault in text for text in found.faults), found.faults


@pytest.mark.parametrize('name', ['model', 'gguf', 'orbax'])
@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('rms_norm_eps', 2e-5),
    ('rope_parameters', {'rope_type': 'default', 'rope_theta': 2e4}),
    ('max_position_embeddings', 128),
  ],
)
def test_a_writer_that_declares_another_model_fails(
  made, wanted, tmp_path, monkeypatch, name, key, value
):
  """What was written is not measured by what was written."""
  right = export.written_config
  if name == 'gguf':
    pytest.importorskip('gguf')

  def wrong(*args):
    found = {**right(*args), key: value}
    if key == 'rope_parameters':
      found['rope_theta'] = value['rope_theta']
    return found

  monkeypatch.setattr(export, 'written_config', wrong)
  export.FORMATS[name](tmp_path, made.state, {})
  found = reread.check(name, tmp_path, made.state, wanted)
  assert any(text.startswith(DECLARED) for text in found.faults), found.faults


def test_numbers_that_differ_by_their_dtype_are_the_same(made):
  config = made.state.model.config
  assert declared.differences(config, config) == []
  for value in (1e-5, float(np.float32(1e-5))):
    own = json.loads((made.state.base_dir / 'config.json').read_text())
    other = hub.families.decoder_of({**own, 'rms_norm_eps': value})
    assert declared.differences(other.config, config) == []


def test_a_window_as_long_as_any_text_is_none(made):
  own = json.loads((made.state.base_dir / 'config.json').read_text())
  own |= {'model_type': 'mistral'}  # 256 positions.
  none, whole, short = (
    hub.families.decoder_of({**own, 'sliding_window': window}).config
    for window in (None, 256, 255)
  )
  assert declared.differences(none, whole) == []
  assert declared.differences(none, short) == [
    f'layers.{i}.window: None, not 255' for i in range(2)
  ]


def test_a_tensor_too_many_or_too_few_fails(made, wanted, written, tmp_path):
  place = tmp_path / 'orbax'
  shutil.copytree(written['orbax'], place)
  shutil.rmtree(place / 'weights/norm')
  assert reread.check('orbax', place, made.state, wanted).faults
  import safetensors.numpy

  place = tmp_path / 'model'
  shutil.copytree(written['model'], place)
  file = place / 'model.safetensors'
  held = safetensors.numpy.load_file(file)
  extra = {**held, 'more.weight': np.zeros(2, np.float32)}
  few = dict(list(held.items())[1:])
  for tensors in (extra, few):
    safetensors.numpy.save_file(tensors, file)
    found = reread.check('model', place, made.state, wanted)
    assert '1 weights are not what was to be written' in found.faults


LONGROPE = {
  'model_type': 'phi3',
  'original_max_position_embeddings': 40,
  'rope_parameters': {
    'rope_type': 'longrope',
    'rope_theta': 1e4,
    'short_factor': [1.0, 1.1, 1.3, 1.2],
    'long_factor': [1.5, 2.0, 4.0, 6.0],
  },
}


def test_a_text_is_as_long_as_itself(made, tmp_path):
  """Not as its padding: some ropes stretch with the text."""
  support.write_model(tmp_path, **LONGROPE)
  state = made.make(tmp_path, adaptation={'name': 'full'})
  runner = state.filled(state.attached)
  rng = np.random.default_rng(0)
  texts = [rng.integers(3, 300, n).tolist() for n in (20, 40, 41, 60)]
  starts = [len(ids) - 8 for ids in texts]
  found = verify.predictions(runner, texts, starts)
  for ids, start, own in zip(texts, starts, found, strict=True):
    alone = np.asarray(support.logits(runner.model, np.array([ids])))[0]
    np.testing.assert_allclose(own, alone[start - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FORMATS)
def test_no_room_is_a_note_and_weights_are_compared_all_the_same(
  made, wanted, written, tmp_path, monkeypatch, name
):
  """Nothing but an adapter is then put on a device."""
  monkeypatch.setattr(room, 'lacking', lambda _: 'it takes 9 GB')
  if name != 'adapter':
    monkeypatch.setattr(jax, 'device_put', None)
    monkeypatch.setattr(type(made.state), 'load', None)
  found = reread.check(name, written[name], made.state, wanted)
  assert (found.faults, found.weights) == ([], 0)
  if name == 'adapter':  # It stands on the base that is there.
    assert found.notes == [] and found.difference is not None
    return
  assert found.notes == [f'{room.NOT_COMPARED} (it takes 9 GB)']
  assert found.difference is found.kl is found.agree is None
  place = tmp_path / name
  shutil.copytree(written[name], place)
  MUTATIONS[f'{name} weight'][0](place)
  assert reread.check(name, place, made.state, wanted).faults


def test_room_is_what_devices_say(made, monkeypatch):
  needed = room.device_bytes(made.state)
  file = made.state.base_dir / 'model.safetensors'
  assert 0 <= file.stat().st_size - needed < 4096
  assert room.lacking(made.state) == ''  # A CPU does not say.

  class Device:
    def __init__(self, free):
      self.free = free

    def memory_stats(self):
      return {'bytes_limit': 10**9, 'bytes_in_use': 10**9 - self.free}

  class Mesh:
    local_devices: list = []

  state = made.make()
  monkeypatch.setattr(room, 'device_bytes', lambda _: needed)
  object.__setattr__(state, 'mesh', Mesh)
  Mesh.local_devices = [Device(needed)]
  assert room.lacking(state) == ''
  Mesh.local_devices.append(Device(needed - 1))
  assert 'of a device' in room.lacking(state)


@pytest.mark.parametrize('said', ['RESOURCE_EXHAUSTED: no', 'INTERNAL: no'])
def test_what_runs_out_of_memory_is_not_wrong(
  made, wanted, written, tmp_path, monkeypatch, said
):
  """Any other failure is."""

  def fail(*_):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(verify, 'predictions', fail)
  found = reread.check('model', written['model'], made.state, wanted)
  assert found.weights == 0
  if said.startswith('RESOURCE'):
    assert (found.faults, found.notes) == ([], [room.NOT_COMPARED])
    found = deliver.check(made.state, {'orbax': written['orbax']})
    assert [one.faults for one in found] == [[]]
  else:
    assert found.notes == []
    assert found.faults == ['cannot be read: JaxRuntimeError: INTERNAL: no']


@pytest.mark.parametrize(
  ('own', 'dtype', 'told'),
  [
    ('float32', 'f16', 'f16: KL nats at most 0.002'),
    ('bfloat16', 'f16', 'f16: KL nats at most 0.05 (computing in bfloat16)'),
    ('float32', 'float32', 'float32: logits within 0.001 (the largest is 1)'),
  ],
)
def test_a_bound_says_where_it_is_from(own, dtype, told):
  wanted = verify.Reference([[1, 2]], [1], [np.ones((1, 3), np.float32)])
  found = verify.Check('gguf', 'tuner', dtype)
  assert table._bounds([found], wanted, own) == [told]


def test_what_was_not_compared_is_told(
  made, written, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(outside, '_is_installed', lambda name: False)
  state = made.make()
  object.__setattr__(state, 'prompts', ())
  place = tmp_path / 'orbax'
  shutil.copytree(written['orbax'], place)
  (place / 'prompts.jsonl').write_text('')
  (found,) = deliver.check(state, {'orbax': place})
  assert found.faults == [] and found.difference is None
  out = capsys.readouterr().out
  assert 'predictions were not compared: the run kept no prompts' in out
  assert 'logits within' not in out


def test_another_model_is_beyond_the_bound(made, wanted):
  """Logits of the base alone are not those of the tuned model."""
  state = made.state
  logits = verify.predictions(
    state.filled(state.frozen), wanted.sequences, wanted.starts
  )
  for dtype in ('float32', 'bfloat16', 'q8_0'):
    found = verify.Check('model', 'tuner', dtype)
    verify.compare(found, wanted, logits, 'float32')
    assert found.faults and 'at most' in found.faults[0]


def test_nan_is_beyond_every_bound(wanted):
  logits = [np.full_like(x, np.nan) for x in wanted.logits]
  for dtype in ('float32', 'bfloat16'):
    found = verify.Check('model', 'tuner', dtype)
    verify.compare(found, wanted, logits, 'float32')
    assert len(found.faults) == 1
    assert found.record()['difference'] == 'nan'


def test_the_first_token_that_differs(wanted):
  """Where a reader's best token is another, its own answer goes elsewhere."""
  logits = [x.copy() for x in wanted.logits]
  best = logits[1][5].argmax()
  logits[1][5, best] -= 100
  found = verify.Check('model', 'tuner', 'float32')
  verify.compare(found, wanted, logits, 'float32')
  assert (found.agree, found.first) == (len(logits) - 1, [5])


def test_answers_are_those_of_decoding(wanted):
  """The model in memory agrees with its own answers along the whole of them."""
  for ids, start, logits in zip(
    wanted.sequences, wanted.starts, wanted.logits, strict=True
  ):
    assert logits.argmax(-1).tolist() == ids[start:]


def test_divergence_by_its_formula():
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, 3, 7))
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
  expected = (p * np.log(p / q)).sum(-1)
  np.testing.assert_allclose(verify.divergence(a, b), expected)
  assert verify.divergence(a, a).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
  ('dtypes', 'largest', 'bound'),
  [
    (('float32', 'float32'), 17.0, ('difference', 1e-3)),
    (('float32', 'float32'), 80.0, ('difference', 2e-3)),
    (('float32', 'bfloat16'), 17.0, ('kl', verify.KL_NATS['bfloat16'])),
    (('bfloat16', 'float16'), 17.0, ('kl', verify.KL_NATS['bfloat16'])),
    (('float32', 'float16'), 17.0, ('kl', verify.KL_NATS['float16'])),
  ],
)
def test_bounds(dtypes, largest, bound):
  assert verify.bound(dtypes, largest) == bound


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_other_dtypes_are_rounded_and_no_more(made, wanted, tmp_path, dtype):
  state = made.make(export=dict(dtype=dtype))
  export.model(tmp_path, state, {})
  found = reread.check('model', tmp_path, state, wanted)
  assert found.faults == [] and found.weights == 0
  assert 0 < found.kl < {'float16': 1e-3, 'bfloat16': 0.03}[dtype]
  flip(tmp_path / 'model.safetensors', 0.7)
  assert reread.check('model', tmp_path, state, wanted).weights == 1


@pytest.mark.parametrize('dtype', ['f32', 'bf16', 'q8_0'])
def test_gguf_dtypes(made, wanted, tmp_path, dtype):
  pytest.importorskip('gguf')
  state = made.make(export=dict(gguf_dtype=dtype))
  export.gguf(tmp_path, state, {})
  found = reread.check('gguf', tmp_path, state, wanted)
  assert found.faults == [] and found.weights == 0
  flip(tmp_path / f'model-{dtype}.gguf', 0.7)
  assert reread.check('gguf', tmp_path, state, wanted).faults


@pytest.mark.parity
def test_transformers_and_peft_agree_or_say_so(made, wanted, written, tmp_path):
  """What is right passes, and a change fails, in one process of theirs."""
  changed = tmp_path / 'model'
  shutil.copytree(written['model'], changed)
  replace(changed / 'chat_template.jinja', b'assistant', b'assistent')
  flip(changed / 'model.safetensors', 0.7)
  libraries, notes = outside.readers(('adapter', 'model', 'orbax'), made.state)
  assert libraries == {'adapter': 'peft', 'model': 'transformers'}
  assert notes == []
  places = {'adapter': written['adapter'], 'model': changed}
  right, wrong = outside.check(places, libraries, made.state, wanted)
  assert right.faults == [] and right.prompts == 4
  assert right.difference < 5e-4
  assert wrong.prompts == 0
  assert any('tokenised otherwise' in text for text in wrong.faults)
  assert any('difference of logits' in text for text in wrong.faults)


def test_a_reader_that_is_not_there_is_named(made, monkeypatch):
  monkeypatch.setattr(outside, '_is_installed', lambda name: name != 'torch')
  found, notes = outside.readers(('adapter', 'model'), made.state)
  assert found == {}
  assert notes == [
    'adapter: peft was not asked; no torch here',
    'model: transformers was not asked; no torch here',
  ]


def test_a_model_beyond_memory_is_not_loaded_twice(made, monkeypatch):
  monkeypatch.setattr(outside, '_is_installed', lambda name: True)
  monkeypatch.setattr(outside, 'free_bytes', lambda: 1000)
  found, notes = outside.readers(('model',), made.state)
  assert found == {} and 'of memory are free' in notes[0]
