"""Adapter directories that cannot go on here, word by word, and the base."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import small

from tuner import adapt
from tuner.adapters import base as base_lib
from tuner.models import hub, weights

Q = 'base_model.model.model.layers.0.self_attn.q_proj'
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


@pytest.fixture(scope='module')
def good(bases, tmp_path_factory):
  """(base, an adapter's directory): q of two layers, rank 3."""
  base = bases('tied')
  model, values = small.load(base)
  adaptation = adapt.lora(weights.rows(model), 3, 6.0, 'q')
  tree = small.factors(model, adaptation, values)
  path = tmp_path_factory.mktemp('good') / 'adapter'
  small.write_adapter(path, base, model, adaptation, tree)
  return base, path


@pytest.fixture
def copy(good, tmp_path):
  """(base, a copy of the adapter to spoil)."""
  path = tmp_path / 'adapter'
  shutil.copytree(good[1], path)
  return good[0], path


def read(base, path, **kwargs):
  return small.read_adapter(path, base, small.load(base)[0], **kwargs)


def error_of(base, path, **kwargs):
  with pytest.raises(ValueError) as error:
    read(base, path, **kwargs)
  return str(error.value).replace(str(path), 'ADAPTER')


def set_config(path, **changes):
  config = json.loads((path / CONFIG).read_text()) | changes
  (path / CONFIG).write_text(json.dumps(config))


def set_tensors(path, changes):
  """None removes a tensor."""
  tensors = safetensors.numpy.load_file(path / WEIGHTS) | changes
  kept = {name: x for name, x in tensors.items() if x is not None}
  safetensors.numpy.save_file(kept, path / WEIGHTS)


def test_the_good_one_is_read(good):
  adaptation = read(*good)
  assert adaptation.targets == ('blocks.0.attention.q',)
  assert adaptation.scale == 2.0


REFUSED = {
  'unknown type': (
    dict(peft_type='LOHA'),
    "peft_type: 'LOHA'; 'LORA' alone can go on here.",
  ),
  'IA3': (
    dict(peft_type='IA3'),
    "peft_type: 'IA3'; 'LORA' alone can go on here.",
  ),
  'prompts': (
    dict(peft_type='PROMPT_TUNING'),
    "peft_type: 'PROMPT_TUNING'; 'LORA' alone can go on here.",
  ),
  'biases': (
    dict(bias='all'),
    "bias: 'all': trained biases cannot go on here.",
  ),
  'transposed, and tokens': (
    dict(fan_in_fan_out=True, trainable_token_indices=[1, 2]),
    'fan_in_fan_out: True: transposed weights cannot go on here; '
    'trainable_token_indices: [1, 2]: trained rows of the embedding cannot go '
    'on here.',
  ),
  'no rank': (dict(r=None), 'r: None, wanted a whole number above 0.'),
  'dropout': (
    dict(lora_dropout=1.5),
    'lora_dropout: 1.5, wanted a number in [0, 1).',
  ),
  'unknown keys': (
    dict(use_foo=True, use_bar=False, bar_config={}, foo_scale=0),
    'foo_scale: 0: this key is not known here; use_foo: True: this key is not '
    'known here.',
  ),
  'a rank below 0': (
    dict(rank_pattern={'q_proj': -2}),
    "rank_pattern: {'q_proj': -2}, wanted an object of whole numbers above 0.",
  ),
  'a rank that is true': (
    dict(r=True),
    'r: True, wanted a whole number above 0.',
  ),
  'no alpha': (
    dict(alpha_pattern={'q_proj': None}, lora_alpha=float('inf')),
    'lora_alpha: inf, wanted a number above 0; alpha_pattern: '
    "{'q_proj': None}, wanted an object of numbers above 0.",
  ),
  'types': (
    dict(
      target_modules=5,
      exclude_modules=[1],
      target_parameters='q',
      layers_to_transform='1',
      layers_pattern='h',
      use_dora='no',
      revision=1,
    ),
    "use_dora: 'no', wanted true or false; revision: 1, wanted a string; "
    "target_parameters: 'q', wanted a list of names; layers_to_transform: '1', "
    "wanted numbers of layers; layers_pattern: 'h', wanted 'layers'; "
    'target_modules: 5, wanted names or a regular expression; '
    'exclude_modules: [1], wanted names or a regular expression.',
  ),
  'no regular expressions': (
    dict(rank_pattern={'[': 3, 'a)|(b': 2}, target_modules='[('),
    "target_modules: '[(': no regular expression: unterminated character set "
    "at position 0; rank_pattern: '[': no regular expression: unterminated "
    "character set at position 0; rank_pattern: 'a)|(b': no regular "
    'expression: unbalanced parenthesis at position 1.',
  ),
  'pissa': (
    dict(init_lora_weights='pissa'),
    "init_lora_weights: 'pissa' changes the base itself; convert the adapter "
    'to plain LoRA with `peft` (path_initial_model_for_weight_conversion).',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_settings_that_cannot_go_on(copy, name):
  base, path = copy
  changes, message = REFUSED[name]
  set_config(path, **changes)
  assert error_of(base, path) == f'ADAPTER/{CONFIG}: {message}'


def test_no_config(copy):
  base, path = copy
  (path / CONFIG).unlink()
  assert error_of(base, path) == (
    'config.adapt.path: ADAPTER has no adapter_config.json; wanted the '
    "directory that `peft`'s save_pretrained wrote."
  )


def test_a_web_page_for_a_config(copy):
  base, path = copy
  (path / CONFIG).write_text('<html>404</html>')
  assert error_of(base, path) == (
    f'ADAPTER/{CONFIG} is not JSON: it is an HTML page, as a failed download '
    'leaves; fetch it again'
  )


def test_a_web_page_for_weights(copy):
  base, path = copy
  (path / WEIGHTS).write_text('<html>404</html>')
  assert error_of(base, path).startswith(
    f'ADAPTER/{WEIGHTS}: not a readable safetensors file: it is an HTML page'
  )


def test_a_pickle_is_not_opened(copy):
  base, path = copy
  (path / WEIGHTS).rename(path / 'adapter_model.bin')
  assert error_of(base, path) == (
    'config.adapt.path: ADAPTER has no adapter_model.safetensors, only '
    'adapter_model.bin, a pickle, which runs code when it is read; save it '
    'again with safe_serialization=True.'
  )


def test_no_such_directory(good):
  base, path = good
  message = error_of(base, path.with_name('adaptr'))
  assert message.startswith('config.adapt.path: ')
  assert message.endswith("did you mean 'adapter'?")


A3, B3 = np.ones((3, 32), np.float32), np.ones((32, 3), np.float32)
TENSORS = {
  'rank': (
    {f'{Q}.lora_A.weight': np.ones((4, 32), np.float32)},
    [
      f'{Q}.lora_A.weight: shape (4, 32); rank 3 of {CONFIG} and the model '
      'imply (3, 32)'
    ],
  ),
  'missing and misshapen': (
    {
      f'{Q}.lora_B.weight': None,
      f'{Q.replace("0", "1")}.lora_B.weight': A3,
    },
    [
      f'{Q}.lora_B: is missing',
      f'{Q.replace("0", "1")}.lora_B.weight: shape (3, 32); rank 3 of {CONFIG} '
      'and the model imply (32, 3)',
    ],
  ),
  'missing layer': (
    {f'{Q}.lora_A.weight': None, f'{Q}.lora_B.weight': None},
    [f'{Q}: named as a target, not there'],
  ),
  'not named': (
    {
      f'{Q.replace("q_", "k_")}.lora_A.weight': A3,
      f'{Q.replace("q_", "k_")}.lora_B.weight': B3[:16],
    },
    [f'{Q.replace("q_", "k_")}: there, but no target of {CONFIG}'],
  ),
  'another family': (
    {
      'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight': A3,
      'base_model.model.transformer.h.0.attn.c_attn.lora_B.weight': B3,
    },
    [
      'base_model.model.transformer.h.0.attn.c_attn: the model has no such '
      'matrix; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, '
      'v_proj'
    ],
  ),
  'magnitude': (
    {f'{Q}.lora_magnitude_vector': A3[0]},
    [f'{Q}.lora_magnitude_vector: has no use_dora in the config'],
  ),
  'not finite': (
    {f'{Q}.lora_A.weight': A3 * np.nan},
    [f'{Q}.lora_A.weight: holds values that are not finite'],
  ),
  'embedding': (
    {'base_model.model.model.embed_tokens.lora_embedding_A': A3},
    [
      'base_model.model.model.embed_tokens.lora_embedding_A: adapters of this '
      'kind cannot go on here'
    ],
  ),
  'prefix': (
    {'q.weight': A3},
    ["q.weight: names begin with 'base_model.model.'"],
  ),
  'untied': (
    {'base_model.model.lm_head.weight': A3},
    [
      'base_model.model.lm_head.weight: trained without embed_tokens, to which '
      'the model ties it; train with ensure_weight_tying=True'
    ],
  ),
  'a norm of one layer': (
    {
      'base_model.model.model.layers.1.input_layernorm.weight': np.ones(
        32, np.float32
      )
    },
    [
      'base_model.model.model.layers.0.input_layernorm.weight: missing; other '
      'layers have it'
    ],
  ),
}


@pytest.mark.parametrize('name', TENSORS)
def test_tensors_that_do_not_fit(copy, name):
  """All of them at once, by name."""
  base, path = copy
  changes, faults = TENSORS[name]
  set_tensors(path, changes)
  expected = '\n  '.join([f'ADAPTER/{WEIGHTS}:', *faults])
  assert error_of(base, path) == expected


def test_integers_are_not_cast(copy):
  base, path = copy
  set_tensors(path, {f'{Q}.lora_A.weight': A3.astype(np.int32)})
  message = error_of(base, path)
  assert f'{Q}.lora_A.weight is I32; allowed are F32, BF16, F16.' in message


@pytest.mark.parametrize('layers', [(1,), (0, 1)])
def test_experts_that_are_missing_are_named(bases, tmp_path, layers):
  """Said one by one, as of older `transformers`; of one layer or of both."""
  base = bases('mixtral')
  path = tmp_path / 'adapter'
  path.mkdir()
  config = dict(peft_type='LORA', r=3, lora_alpha=6, target_modules=['w1'])
  (path / CONFIG).write_text(json.dumps(config))
  start = 'base_model.model.model.layers.{}.block_sparse_moe.experts.{}.w1'
  tensors = {}
  for layer in (0, 1):
    for expert in range(1 if layer in layers else 4):
      module = start.format(layer, expert)
      tensors[f'{module}.lora_A.weight'] = A3
      tensors[f'{module}.lora_B.weight'] = np.ones((48, 3), np.float32)
  safetensors.numpy.save_file(tensors, path / WEIGHTS)
  faults = [
    f'base_model.model.model.layers.{layer}.block_sparse_moe.experts.{{E}}.w1'
    '.weight: experts [1, 2, 3] have none'
    for layer in layers
  ]
  expected = '\n  '.join([f'ADAPTER/{WEIGHTS}:', *faults])
  assert error_of(base, path) == expected


def test_another_base_is_named(copy):
  """A name alone is all that `peft` says of a base."""
  base, path = copy
  set_config(path, base_model_name_or_path='org/name', revision='abc')
  assert error_of(base, path) == (
    "config.adapt.path: the adapter in ADAPTER was trained on 'org/name' at "
    f"'abc'; config.model.path is {str(base)!r}. Train on the base of the "
    'adapter, or, if it is the same under another name, say '
    "config.adapt.trained_on='org/name'."
  )
  assert read(base, path, trained_on='org/name').targets


def test_another_revision_is_named(copy):
  base, path = copy
  set_config(path, base_model_name_or_path='org/name', revision='0' * 40)
  model = small.load(base)[0]
  with pytest.raises(ValueError) as error:
    adapt.peft(
      weights.rows(model),
      str(path),
      sizes=model.config.sizes,
      base=base_lib.Base('org/name', '1' * 40, base),
    )
  assert str(error.value).endswith(
    f"was trained on 'org/name' at '{'0' * 40}'; config.model.path is "
    f"'org/name' at '{'1' * 40}': another revision."
  )


def test_a_directory_with_the_same_weights_is_the_same_base(
  copy, bases, tmp_path
):
  base, path = copy
  shutil.copytree(base, tmp_path / 'same')
  set_config(path, base_model_name_or_path=str(tmp_path / 'same'))
  assert read(base, path).targets
  set_config(path, base_model_name_or_path=str(bases('untied')))
  assert 'was trained on' in error_of(base, path)


def test_the_recorded_hash_decides(copy):
  """Whatever the name is: a base may move, and a name may be taken."""
  base, path = copy
  record = path / base_lib.RECORD
  set_config(path, base_model_name_or_path='elsewhere/name')
  record.write_text(json.dumps({base_lib.KEY: hub.weights_hash(base)}))
  assert read(base, path).targets
  set_config(path, base_model_name_or_path=str(base))
  record.write_text(json.dumps({base_lib.KEY: 'f' * 64}))
  ours = hub.weights_hash(base)[:12]
  assert error_of(base, path).endswith(
    f'whose weights differ: {ours}, not ffffffffffff as in tuner.json.'
  )


def test_a_hash_that_was_kept_is_asked_for(copy):
  """And only where a record or another name calls for it."""
  base, path = copy
  asked = []
  model = small.load(base)[0]

  def go_on():
    own = base_lib.Base(str(base), None, base, lambda d: asked.append(d) or 'f')
    rows, sizes = weights.rows(model), model.config.sizes
    return adapt.peft(rows, str(path), sizes=sizes, base=own)

  assert go_on().targets and not asked
  (path / base_lib.RECORD).write_text(json.dumps({base_lib.KEY: 'f'}))
  assert go_on().targets and asked == [base]
