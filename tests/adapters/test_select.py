"""What names in a config mean, in models of several shapes."""

import pytest
import small
import support

from tuner.adapters import select
from tuner.models import families, weights


@pytest.fixture(scope='module')
def rows():
  """family -> its declared weights, without writing any."""

  def of(family):
    config = {**support.LLAMA, **small.FAMILIES[family]}
    return weights.rows(families.decoder_of(config))

  return of


ATTENTION = ('q', 'k', 'v', 'o')
MLP = ('gate', 'up', 'down')


def names(paths):
  return {path.rpartition('.')[2] for path in paths}


@pytest.mark.parametrize(
  'family, wanted, expected',
  [
    ('tied', 'all-linear', {*ATTENTION, *MLP}),
    ('phi3', 'all-linear', {'qkv', 'o', 'gate_up', 'down'}),
    ('phi3', 'qkv_proj', {'qkv'}),
    ('qwen3_moe', 'all-linear', {*ATTENTION}),
    ('qwen3_moe', 'experts', {*MLP}),
    ('qwen3_moe', 'up_proj', {'up'}),
    ('qwen3_moe', 'router', {'router'}),
    ('mixtral', 'w2', {'down'}),
    ('mixtral', 'experts.w2', {'down'}),
    (
      'qwen2_moe',
      'all-linear',
      {*ATTENTION, 'shared_gate', 'shared_up', 'shared_down'},
    ),
    ('qwen2_moe', 'up_proj', {'up', 'shared_up'}),
    ('qwen2_moe', 'experts.up_proj', {'up'}),
    ('qwen2_moe', 'shared_expert.up_proj', {'shared_up'}),
    ('gpt_oss', 'experts', {'gate_up', 'down'}),
  ],
)
def test_targets(rows, family, wanted, expected):
  assert names(select.targets(rows(family), wanted)) == expected


def test_a_name_reaches_every_body_and_a_path_one(rows):
  """Gemma 3's local and global layers are bodies of their own."""
  found = select.targets(rows('gemma3'), 'q')
  assert len(found) > 1
  assert select.targets(rows('gemma3'), 'attention.q') == found
  assert select.targets(rows('gemma3'), 'self_attn.q_proj') == found
  for path in found:
    assert select.targets(rows('gemma3'), path) == (path,)


@pytest.mark.parametrize(
  'family, wanted, expected',
  [
    ('tied', ('embed_tokens',), ('embed',)),
    ('tied', ('lm_head',), ('embed',)),
    ('untied', ('lm_head', 'embed'), ('embed', 'head')),
    ('untied', ('model.norm',), ('norm',)),
    ('untied', ('input_layernorm',), ('blocks.0.attention_norm',)),
    ('untied', ('mlp_norm',), ('blocks.0.mlp_norm',)),
    ('qwen2', ('k',), ('blocks.0.attention.k', 'blocks.0.attention.k_bias')),
    ('mixtral', ('block_sparse_moe.gate',), ('blocks.0.mlp.router',)),
  ],
)
def test_saved(rows, family, wanted, expected):
  """A module is whole: its bias comes with it."""
  assert select.saved(rows(family), wanted) == expected


@pytest.mark.parametrize(
  'family, wanted, message',
  [
    (
      'tied',
      ['lm_heat'],
      "config.adapt.modules_to_save: 'lm_heat' names no weight of the model. "
      'Names are attention_norm, down, embed, gate, k, mlp_norm, norm, o, q, '
      'up, v; letters are those of their dims.',
    ),
    (
      'mixtral',
      ['experts'],
      'config.adapt.modules_to_save: blocks.0.mlp.down, blocks.0.mlp.gate, '
      'blocks.0.mlp.up: experts cannot be saved whole; adapt them by '
      'config.adapt.targets.',
    ),
  ],
)
def test_saved_errors(rows, family, wanted, message):
  with pytest.raises(ValueError) as error:
    select.saved(rows(family), wanted)
  assert str(error.value) == message
