"""The config.json beside written weights says the same to every reader."""

import json

import pytest
from models import cases

from tuner.models import families, hub

OLD = {
  'llama-old': dict(
    cases.SMALL,
    model_type='llama',
    rope_theta=5e5,
    rope_scaling=dict(
      rope_type='llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  'llama-oldest': dict(
    cases.SMALL,
    model_type='llama',
    rope_scaling=dict(type='linear', factor=2.0),
  ),
  'gemma3-old': dict(
    cases.SMALL,
    model_type='gemma3_text',
    rope_theta=2e6,
    rope_local_base_freq=2e4,
    rope_scaling=dict(rope_type='linear', factor=8.0),
  ),
}
OLD['olmo3-thetas'] = dict(
  cases.CASES['olmo3-yarn'],
  rope_parameters=dict(
    full_attention=dict(rope_type='default', rope_theta=3e4),
    sliding_attention=dict(rope_type='default', rope_theta=2e4),
  ),
)
CONFIGS = {**cases.CASES, **OLD}


def declared(config):
  return families.decoder_of(config).config


@pytest.mark.parametrize('name', CONFIGS)
def test_it_declares_the_same_model(name):
  """Written, and written again, which changes nothing."""
  config = CONFIGS[name]
  found = hub.written_config(config, 'bfloat16')
  assert declared(found) == declared(config)
  assert hub.written_config(found, 'bfloat16') == found
  assert found['dtype'] == found['torch_dtype'] == 'bfloat16'
  kept = {k: v for k, v in config.items() if not k.startswith('rope_')}
  assert kept.items() <= found.items()


OLD_KEYS = ('rope_theta', 'rope_scaling', 'rope_local_base_freq')


@pytest.mark.parametrize('name', CONFIGS)
def test_newer_keys_are_enough(name):
  """For a reader that knows no older ones."""
  config = CONFIGS[name]
  assert declared(half(config, OLD_KEYS)) == declared(config)


# What only rope_parameters can say: windowed layers whose rope is stretched; in
# OLMo 3, any theta but its own, as readers take an older one in two ways.
UNSAID = ('gemma3_text-yarn', 'olmo3-yarn', 'olmo3-thetas')


@pytest.mark.parametrize('name', sorted(CONFIGS.keys() - set(UNSAID)))
def test_older_keys_are_enough(name):
  config = CONFIGS[name]
  assert declared(half(config, ['rope_parameters'])) == declared(config)


def half(config, hidden):
  """What a reader sees that does not know the hidden keys."""
  found = hub.written_config(config, 'float32')
  return {k: v for k, v in found.items() if k not in hidden}


@pytest.mark.parity
@pytest.mark.parametrize('name', CONFIGS)
def test_transformers_reads_the_same(name, tmp_path):
  import transformers

  config, found = CONFIGS[name], {}
  for key, one in (
    ('before', config),
    ('after', hub.written_config(config, 'float32')),
  ):
    path = tmp_path / key
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(one))
    found[key] = transformers.AutoConfig.from_pretrained(path).to_dict()
  skipped = ('dtype', 'torch_dtype', '_name_or_path', 'rope_theta')
  skipped += ('rope_scaling', 'rope_local_base_freq')
  before, after = (
    {k: v for k, v in one.items() if k not in skipped} for one in found.values()
  )
  for one in (before, after):  # The older name of a key that both have.
    for rope in (one['rope_parameters'], *one['rope_parameters'].values()):
      if isinstance(rope, dict):
        rope.pop('type', None)
  assert before == after
  assert str(found['after']['dtype']).endswith('float32')


def test_what_was_quantised_is_no_more():
  gone = {'quantization_config': {'bits': 4}, 'auto_map': {'AutoModel': 'a.B'}}
  config = {**CONFIGS['llama-base'], **gone}
  assert not gone.keys() & hub.written_config(config, 'float32').keys()
