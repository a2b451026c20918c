"""What is exported loads in peft and transformers and says the same."""

import json

import numpy as np
import pytest
import safetensors.numpy
import support

from tuner import adapt
from tuner.artifacts import export
from tuner.models import hub, weights

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 16))
LAYOUTS = {
  'all': {},
  'rslora': dict(scaling='rslora', rank=5, alpha=4.0),
  'names': dict(targets=['o_proj', 'q', 'blocks.0.mlp.down']),
  'letters': dict(targets='K'),
}


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  return support.load_model(tiny_dir)


def tuned(model, seed=0, **kwargs):
  """(adaptation, random factors)."""
  rows = weights.rows(model)
  adaptation = adapt.lora(rows, **{'rank': 3, 'alpha': 6.0, **kwargs})
  sizes = model.config.sizes
  rng = np.random.default_rng(seed)
  return adaptation, {
    path: 0.05 * rng.standard_normal(shape, np.float32)
    for path, shape in adaptation.shapes(sizes).items()
  }


def write(path, tiny_dir, model, adaptation, trainable, **kwargs):
  export.write_adapter(
    path, tiny_dir, model, adaptation, trainable, str(tiny_dir), **kwargs
  )


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
def test_peft_loads_the_adapter(tiny_dir, tiny, tmp_path, name):
  """The logits of base + adapter by peft are ours, attached."""
  model, values = tiny
  adaptation, trainable = tuned(model, **LAYOUTS[name])
  write(tmp_path / 'adapter', tiny_dir, model, adaptation, trainable)
  found = theirs(tiny_dir, tmp_path / 'adapter')
  expected = logits(model, adaptation.attach(values, trainable))
  assert_close(found, expected)
  assert np.abs(expected - logits(model, values)).max() > 0.1


@pytest.mark.parity
def test_transformers_loads_the_merged_model(tiny_dir, tiny, tmp_path):
  model, values = tiny
  adaptation, trainable = tuned(model)
  attached = adaptation.attach(values, trainable)
  export.write_model(tmp_path / 'model', tiny_dir, model, attached)
  expected = logits(model, attached)
  assert_close(theirs(tmp_path / 'model'), expected)
  again, merged = support.load_model(tmp_path / 'model')
  assert_close(logits(again, merged), expected)


@pytest.mark.parametrize('name', LAYOUTS)
def test_scale_by_pefts_formula(tiny, name):
  """lora_alpha / r, or lora_alpha / sqrt(r) where use_rslora says so."""
  adaptation, _ = tuned(tiny[0], **LAYOUTS[name])
  config = export.adapter_config(adaptation, 'base', None)
  rank = config['r'] ** 0.5 if config['use_rslora'] else config['r']
  assert config['lora_alpha'] / rank == pytest.approx(adaptation.scale)


def test_adapter_tensors_are_those_of_the_formula(tiny):
  """lora_B @ lora_A x scale is what merging adds to each HF matrix."""
  model, values = tiny
  adaptation, trainable = tuned(model)
  attached = adaptation.attach(values, trainable)
  tensors = export.adapter_tensors(model, adaptation, trainable)
  rows, sizes = adaptation.rows, model.config.sizes
  seen = 0
  for path in adaptation.targets:
    delta = np.asarray(adapt.merge(rows, attached, path)) - values[path]
    named = hub.hf_tensors(rows[path], np.asarray(delta), sizes)
    for name, matrix in named.items():
      module = f'base_model.model.{name.removesuffix(".weight")}'
      a = tensors[f'{module}.lora_A.weight']
      b = tensors[f'{module}.lora_B.weight']
      assert a.shape == (3, matrix.shape[1]) and b.shape == (matrix.shape[0], 3)
      np.testing.assert_allclose(adaptation.scale * b @ a, matrix, atol=1e-6)
      seen += 2
  assert seen == len(tensors)


def test_adapter_config(tiny_dir, tiny, tmp_path):
  model, _ = tiny
  adaptation, trainable = tuned(model, targets=['q', 'down'], dropout=0.1)
  write(
    tmp_path / 'a', tiny_dir, model, adaptation, trainable, revision='abc123'
  )
  config = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  expected = {
    'base_model_name_or_path': str(tiny_dir),
    'revision': 'abc123',
    'target_modules': ['down_proj', 'q_proj'],
    'r': 3,
    'lora_dropout': 0.1,
    'bias': 'none',
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
  }
  assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize('tied', [True, False])
def test_merging_an_untrained_lora_changes_no_bit(tmp_path, tied):
  base = tmp_path / 'base'
  base.mkdir()
  support.write_model(base, tie_word_embeddings=tied)
  model, values = support.load_model(base)
  adaptation = adapt.lora(weights.rows(model), rank=4)
  attached = adaptation.attach(values, support.fresh_factors(model, adaptation))
  export.write_model(tmp_path / 'model', base, model, attached)
  found, expected = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (tmp_path / 'model', base)
  )
  assert found.keys() == expected.keys()
  assert ('lm_head.weight' in found) != tied
  for name, x in expected.items():
    assert found[name].tobytes() == x.tobytes(), name


COMPANIONS = (
  'tokenizer.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'generation_config.json',
)


def test_companions_lie_beside_both(tiny_dir, tiny, tmp_path):
  """Tokenizer, template and generation config, byte for byte; no weights."""
  model, values = tiny
  adaptation, trainable = tuned(model)
  write(tmp_path / 'adapter', tiny_dir, model, adaptation, trainable)
  export.write_model(tmp_path / 'model', tiny_dir, model, values)
  for name in COMPANIONS:
    expected = (tiny_dir / name).read_bytes()
    assert (tmp_path / 'adapter' / name).read_bytes() == expected
    assert (tmp_path / 'model' / name).read_bytes() == expected
  files = {file.name for file in (tmp_path / 'adapter').iterdir()}
  assert files == {
    *COMPANIONS,
    'adapter_config.json',
    'adapter_model.safetensors',
  }
  files = {file.name for file in (tmp_path / 'model').iterdir()}
  assert files == {*COMPANIONS, 'config.json', 'model.safetensors'}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_config_keeps_both_spellings_of_rope(tiny_dir, tiny, tmp_path, dtype):
  """All of the base's config.json, and the dtype written."""
  model, values = tiny
  export.write_model(tmp_path / 'model', tiny_dir, model, values, dtype)
  config = json.loads((tmp_path / 'model' / 'config.json').read_text())
  assert config == {**support.LLAMA, 'dtype': dtype}
  assert config['rope_theta'] == config['rope_parameters']['rope_theta']
  held = safetensors.numpy.load_file(tmp_path / 'model' / 'model.safetensors')
  assert {str(x.dtype) for x in held.values()} == {dtype}


@pytest.mark.parametrize('what', ['adapter', 'model'])
def test_an_interrupted_export_leaves_what_was(
  tiny_dir, tiny, tmp_path, monkeypatch, what
):
  """An exception in the middle: no file of the new one, all of the old one."""
  model, values = tiny
  adaptation, trainable = tuned(model)

  def write_it(values, trainable):
    if what == 'model':
      export.write_model(tmp_path / what, tiny_dir, model, values)
    else:
      write(tmp_path / what, tiny_dir, model, adaptation, trainable)

  last = {
    'adapter': (export, '_write_companions'),
    'model': (hub, '_name_shards'),
  }

  def full_disk(*_):
    assert list(tmp_path.glob('.*/*.safetensors')), 'nothing was written yet'
    raise OSError('no space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(*last[what], full_disk)
    with pytest.raises(OSError, match='no space left'):
      write_it(values, trainable)
  assert list(tmp_path.iterdir()) == []

  write_it(values, trainable)
  old = contents(tmp_path / what)
  changed = {name: x + 1 for name, x in values.items()}
  other = {name: x + 1 for name, x in trainable.items()}
  with monkeypatch.context() as patch:
    patch.setattr(*last[what], full_disk)
    with pytest.raises(OSError, match='no space left'):
      write_it(changed, other)
  assert contents(tmp_path / what) == old
  assert [p.name for p in tmp_path.iterdir()] == [what]

  write_it(changed, other)
  assert contents(tmp_path / what) != old
  assert [p.name for p in tmp_path.iterdir()] == [what]


def contents(path):
  return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_a_killed_export_left_is_swept(tiny_dir, tiny, tmp_path):
  model, values = tiny
  (tmp_path / '.model.tmp').mkdir()
  (tmp_path / '.model.tmp' / 'half.safetensors').write_bytes(b'x')
  export.write_model(tmp_path / 'model', tiny_dir, model, values)
  assert [p.name for p in tmp_path.iterdir()] == ['model']
  assert not (tmp_path / 'model' / 'half.safetensors').exists()
