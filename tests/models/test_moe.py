"""Mixtures of experts equal those of `transformers`, on any mesh.

`python tests/models/test_moe.py` writes the golden logits anew, from
`transformers`, for the machines where torch is not installed.
"""

import functools
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

if __name__ == '__main__':
  sys.path[:0] = [str(path) for path in pathlib.Path(__file__).parents[1:3]]

import support

from tuner import adapt
from tuner import mesh as mesh_lib
from tuner.generate import greedy
from tuner.models import families, hub, moe, policy, weights
from tuner.objectives import sft

pytestmark = pytest.mark.usefixtures('quick_compiles')
GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'moe.npz'
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
T, KEPT, E = 24, 2, 8
# Not the pad token, whose embedding gets no gradient in torch.
TOKENS = np.random.default_rng(0).integers(3, 64, (2, T))

COMMON = dict(
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=64,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=1e4,
  tie_word_embeddings=False,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=2,
)
MIXTRAL = dict(
  COMMON,
  model_type='mixtral',
  architectures=['MixtralForCausalLM'],
  num_local_experts=E,
)
QWEN2 = dict(
  COMMON,
  model_type='qwen2_moe',
  architectures=['Qwen2MoeForCausalLM'],
  num_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  shared_expert_intermediate_size=12,
)
QWEN3 = dict(
  COMMON,
  model_type='qwen3_moe',
  architectures=['Qwen3MoeForCausalLM'],
  head_dim=8,
  num_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  norm_topk_prob=True,
)
GPT_OSS = dict(
  COMMON,
  model_type='gpt_oss',
  architectures=['GptOssForCausalLM'],
  head_dim=8,
  num_local_experts=E,
  num_experts_per_tok=3,
  sliding_window=5,
  swiglu_limit=0.5,  # So that it is met.
)
DEEPSEEK = dict(
  COMMON,
  model_type='deepseek_v3',
  architectures=['DeepseekV3ForCausalLM'],
  num_key_value_heads=4,
  n_routed_experts=E,
  num_experts_per_tok=3,
  moe_intermediate_size=8,
  first_k_dense_replace=1,
  n_shared_experts=2,
  n_group=4,
  topk_group=2,
  q_lora_rank=12,
  kv_lora_rank=10,
  qk_nope_head_dim=6,
  qk_rope_head_dim=4,
  v_head_dim=8,
)
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 0.7,
  'original_max_position_embeddings': 16,
}
FAMILIES = {
  'mixtral': MIXTRAL,
  'qwen2_moe': QWEN2,
  'qwen3_moe': QWEN3,
  'gpt_oss': GPT_OSS,
  'deepseek_v3': DEEPSEEK,
}
CASES = {
  **FAMILIES,
  'mixtral_windows': dict(MIXTRAL, sliding_window=7),
  'mixtral_long_windows': dict(MIXTRAL, sliding_window=100),
  'qwen2_moe_steps': dict(QWEN2, decoder_sparse_step=2, norm_topk_prob=True),
  'qwen2_moe_windows': dict(
    QWEN2, use_sliding_window=True, sliding_window=7, max_window_layers=1
  ),
  'qwen3_moe_dense': dict(QWEN3, mlp_only_layers=[0], norm_topk_prob=False),
  'qwen3_moe_windows': dict(QWEN3, use_sliding_window=True, sliding_window=7),
  'gpt_oss_long_windows': dict(GPT_OSS, sliding_window=100, swiglu_alpha=2.0),
  'gpt_oss_plain_rope': dict(
    GPT_OSS, rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}
  ),
  'deepseek_v3_direct': dict(
    DEEPSEEK, q_lora_rank=None, rope_interleave=False, n_group=1, topk_group=1
  ),
  'deepseek_v3_yarn': dict(DEEPSEEK, rope_scaling=YARN),
  # Biases, fused matrices and one body of layers, which compiles sooner.
  'mesh': dict(GPT_OSS, layer_types=['full_attention'] * 2),
}


def write_case(path, name):
  """The random model directory of a case; the same seed for all."""
  config = CASES[name]
  (path / 'config.json').write_text(json.dumps(config))
  model = families.decoder_of(config)
  rng, values = np.random.default_rng(0), {}
  for row in weights.rows(model).values():
    noise = rng.standard_normal(row.shape(model.config.sizes), np.float32)
    values[row.path] = 1 + 0.1 * noise if row.init == 'ones' else 0.2 * noise
  hub.write(path, model, values.__getitem__)


def load_case(name):
  with tempfile.TemporaryDirectory() as folder:
    write_case(pathlib.Path(folder), name)
    return support.load_model(pathlib.Path(folder))


@functools.cache
def ours(name):
  """(logits, the sum of the weights' sizes) of a case by this package."""
  model, values = load_case(name)
  logits = support.logits(weights.fill(model, values), TOKENS)
  return np.asarray(logits), sum(np.abs(x).sum() for x in values.values())


def theirs(path):
  """The model of a directory as `transformers` loads it, in float32."""
  import torch

  torch.set_num_threads(1)
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation='eager'
  )


def their_logits(path):
  import torch

  with torch.no_grad():
    return theirs(path)(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize('name', CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
  write_case(tmp_path, name)
  np.testing.assert_allclose(ours(name)[0], their_logits(tmp_path), **TOLERANCE)


@pytest.mark.parametrize('name', CASES)
def test_logits_equal_the_golden_ones(name):
  """Where torch is not installed: what transformers gave when it was."""
  with np.load(GOLDEN) as golden:
    expected, weight = golden[name], golden[f'{name}.weights']
  again = (
    f'Where torch is installed run {pathlib.Path(__file__).name} as a script '
    'to write them anew from transformers, and commit them.'
  )
  logits, own_weight = ours(name)
  np.testing.assert_allclose(
    own_weight, weight, 1e-6, err_msg=f'The random weights changed. {again}'
  )
  np.testing.assert_allclose(
    logits[:, -KEPT:], expected, **TOLERANCE, err_msg=again
  )


@pytest.mark.parametrize(
  'name, other',
  [
    ('mixtral_windows', 'mixtral'),
    ('qwen2_moe_windows', 'qwen2_moe'),
    ('qwen3_moe_windows', 'qwen3_moe'),
    ('gpt_oss_long_windows', 'gpt_oss'),
    ('gpt_oss_plain_rope', 'gpt_oss'),
    ('deepseek_v3_yarn', 'deepseek_v3'),
  ],
)
def test_keys_with_an_effect_change_the_logits(name, other):
  """Otherwise both sides could agree by not reading the key."""
  assert np.abs(ours(name)[0] - ours(other)[0]).max() > 0.005


def test_a_window_longer_than_the_text_changes_nothing():
  long, none = ours('mixtral_long_windows')[0], ours('mixtral')[0]
  np.testing.assert_array_equal(long, none)


@functools.partial(jax.jit, static_argnums=2, compiler_options=support.QUICK)
def sft_of(model, batch, balance):
  tuned = policy.Policy(model, chunk=16)
  return sft.sft(tuned, None, batch, balance=balance)


def loss_and_gradients(model, values, batch, balance):
  @jax.value_and_grad
  def loss(values):
    tuned = policy.Policy(weights.fill(model, values), chunk=16)
    loss_sum, weight, _ = sft.sft(tuned, None, batch, balance=balance)
    return loss_sum / weight

  return jax.jit(loss, compiler_options=support.QUICK)(values)


@pytest.mark.parity
@pytest.mark.parametrize('name', FAMILIES)
def test_loss_and_gradients_equal_those_of_torch(name, tmp_path):
  """Mean NLL of the masked tokens and, where transformers has it, balance."""
  write_case(tmp_path, name)
  balance = 0.0 if name == 'deepseek_v3' else 0.5
  batch = support.pack([[(row, 9)] for row in TOKENS], T)
  model, values = support.load_model(tmp_path)
  own_loss, own = loss_and_gradients(model, values, batch, balance)
  loss, expected = their_gradients(tmp_path, batch['mask'], balance)
  np.testing.assert_allclose(own_loss, loss, **TOLERANCE)
  untrained = {'e_score_correction_bias'}
  seen = set()
  for row in weights.rows(model).values():
    grads = np.asarray(own[row.path])
    for key, grad in hub.hf_tensors(row, grads, model.config.sizes):
      seen.add(key)
      if key.rpartition('.')[2] in untrained:
        assert not grad.any()
        continue
      np.testing.assert_allclose(grad, expected[key], **TOLERANCE, err_msg=key)
    if row.path.rpartition('.')[2] != 'correction':
      assert np.abs(grads).max() > 1e-4, f'{row.path}: nothing was compared'
  assert seen == expected.keys()


def their_gradients(path, mask, balance):
  """(loss, gradients by name on disk) by torch's autograd."""
  import torch

  model = theirs(path)
  out = model(torch.from_numpy(TOKENS), output_router_logits=balance > 0)
  targets = torch.from_numpy(TOKENS)[:, 1:, None]
  logprobs = torch.log_softmax(out.logits[:, :-1], -1)
  wanted = torch.from_numpy(mask)[:, 1:]
  loss = -(logprobs.gather(-1, targets)[..., 0] * wanted).sum() / wanted.sum()
  if balance:
    loss = loss + balance * out.aux_loss
  loss.backward()
  with torch.no_grad():  # Saved as weights, they get the names on disk.
    for param in model.parameters():
      param.copy_(param.grad)
  model.save_pretrained(path / 'gradients')
  file = path / 'gradients' / 'model.safetensors'
  return loss.item(), safetensors.numpy.load_file(file)


@pytest.mark.parametrize('name', FAMILIES)
def test_load_then_export_is_the_identity(name, tmp_path):
  write_case(tmp_path, name)
  model, values = support.load_model(tmp_path)
  (tmp_path / 'again').mkdir()
  hub.write(tmp_path / 'again', model, values.__getitem__)
  same_files(tmp_path, tmp_path / 'again')


@pytest.mark.parity
@pytest.mark.parametrize('name', FAMILIES)
def test_transformers_writes_the_same_tensors(name, tmp_path):
  write_case(tmp_path, name)
  theirs(tmp_path).save_pretrained(tmp_path / 'theirs')
  same_files(tmp_path, tmp_path / 'theirs')
  config = hub.declare(tmp_path / 'theirs').config
  assert config == hub.declare(tmp_path).config


def same_files(one, other):
  a, b = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (one, other)
  )
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize('name', ['qwen2_moe', 'gpt_oss', 'deepseek_v3_yarn'])
def test_cached_decoding_equals_the_full_forward(name):
  """Each generated token is the full forward's most likely next one."""
  model, values = load_case(name)
  filled = weights.fill(model, values)
  prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :11].tolist()]
  answers = greedy.generate(filled, prompts, [], max_tokens=6)
  for prompt, answer in zip(prompts, answers, strict=True):
    whole = np.zeros((1, T), np.int32)
    whole[0, : len(prompt) + 6] = prompt + answer
    best = support.logits(filled, whole).argmax(-1)
    assert answer == best[0, len(prompt) - 1 : len(prompt) + 5].tolist()


@functools.partial(jax.jit, compiler_options=support.QUICK)
def routed(model, batch):
  """How a batch is routed."""
  return policy.Policy(model).routed_logprobs(batch)[1]


@pytest.mark.parametrize('name', ['qwen2_moe_steps', 'deepseek_v3'])
def test_balance_does_not_see_padding_and_packing(name):
  filled = weights.fill(*load_case(name))
  first, second = (TOKENS[0, :9], 2), (TOKENS[1, :15], 2)
  alone = routed(filled, support.pack([[first], [second]], 15))
  packed = routed(filled, support.pack([[first, second]], 32))
  for key, value in alone.items():
    np.testing.assert_allclose(value, packed[key], 1e-5, err_msg=key)
  assert 1 / E < alone['busiest'] < 1
  assert abs(alone['balance'] - 3) > 0.01


def test_an_indifferent_router_has_a_balance_of_k():
  model, values = load_case('qwen3_moe')
  values['blocks.0.mlp.router'] = np.zeros((2, 16, E), np.float32)
  batch = support.pack([[(TOKENS[0], 2)]], T)
  even = routed(weights.fill(model, values), batch)
  np.testing.assert_allclose(even['balance'], 3, 1e-6)


def test_balance_of_a_dense_model_is_refused(tiny_dir):
  model, values = support.load_model(tiny_dir)
  tuned = policy.Policy(weights.fill(model, values))
  batch = support.pack([[(TOKENS[0], 2)]], T)
  with pytest.raises(ValueError, match='this model has no experts'):
    sft.sft(tuned, None, batch, balance=0.1)


def test_balance_is_a_mean_over_micro_batches():
  """loss_sum / weight gains balance * the loss of Switch Transformers."""
  model, values = load_case('mixtral')
  filled = weights.fill(model, values)
  batch = support.pack([[(row, 9)] for row in TOKENS], T)
  plain, weight, _ = sft_of(filled, batch, 0.0)
  loss_sum, again, metrics = sft_of(filled, batch, 0.1)
  assert weight == again
  expected = plain + 0.1 * metrics['balance']
  np.testing.assert_allclose(loss_sum, expected, 1e-6)
  assert 1 / E < metrics['busiest'] / weight < 1


def test_all_tokens_may_choose_the_same_experts():
  """Nothing is dropped, and the others have no token: a plain mixture."""
  model, values = load_case('mixtral')
  values['blocks.0.mlp.router'] = np.zeros((2, 16, E), np.float32)
  logits = support.logits(weights.fill(model, values), TOKENS)
  halves = dict(values)  # The first two by halves are any two by halves.
  for part in ('gate', 'up', 'down'):
    value = np.asarray(values[f'blocks.0.mlp.{part}'])
    halves[f'blocks.0.mlp.{part}'] = value[:, [1, 0, 1, 0, 1, 0, 1, 0]]
  swapped = support.logits(weights.fill(model, halves), TOKENS)
  np.testing.assert_allclose(logits, swapped, rtol=1e-5, atol=1e-5)
  one = support.logits(weights.fill(model, values), TOKENS[:1, :1])
  np.testing.assert_allclose(one[:, 0], logits[:1, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss', 'deepseek_v3'])
def test_adapters_of_experts_merged_equal_attached(name):
  model, values = load_case(name)
  rows = weights.rows(model)
  parts = [p for p, row in rows.items() if 'E' in row.lead and row.is_matrix]
  adaptation = adapt.lora(rows, rank=2, alpha=4.0, targets=parts)
  factors = support.fresh_factors(model, adaptation)
  rng = np.random.default_rng(1)
  factors = {
    path: 0.3 * rng.standard_normal(x.shape, np.float32)
    for path, x in factors.items()
  }
  attached = adaptation.attach(values, factors)
  merged = {path: adapt.merge(rows, attached, path) for path in rows}
  found = support.logits(weights.fill(model, attached), TOKENS)
  expected = support.logits(weights.fill(model, merged), TOKENS)
  np.testing.assert_allclose(found, expected, **TOLERANCE)
  plain = support.logits(weights.fill(model, values), TOKENS)
  assert np.abs(found - plain).max() > 0.05


MESHES = {
  'fsdp': dict(data=1, fsdp=8),
  'tensor': dict(data=4, tensor=2),
  'expert': dict(data=2, expert=4),
}


@functools.cache
def on_one_device():
  """(model, weights, batch, loss, gradients), each row another text."""
  model, values = load_case('mesh')
  rows = [[(np.roll(TOKENS[i % 2], i), 3)] for i in range(8)]
  batch = support.pack(rows, T)
  return model, values, batch, *loss_and_gradients(model, values, batch, 0.5)


@pytest.mark.parametrize('name', MESHES)
def test_eight_devices_equal_one(name):
  """Loss with balance and gradients, each weight divided by its letters."""
  model, values, batch, expected, grads = on_one_device()
  mesh = mesh_lib.make(**MESHES[name], devices=8)
  placed = {}
  for path, row in weights.rows(model).items():
    shape = row.shape(model.config.sizes)
    there = mesh_lib.sharding(mesh, row.dims, shape)
    placed[path] = jax.device_put(values[path], there)
  by_rows = jax.sharding.NamedSharding(mesh, mesh_lib.spec('BT'))
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, by_rows)
    loss, found = loss_and_gradients(model, placed, batch, 0.5)
  np.testing.assert_allclose(loss, expected, 1e-6)
  for path, grad in found.items():
    np.testing.assert_allclose(
      grad, grads[path], rtol=1e-4, atol=1e-6, err_msg=path
    )


@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('mixtral', dict(router_jitter_noise=0.1), 'router_jitter_noise: 0.1'),
    ('deepseek_v3', dict(norm_topk_prob=False), 'norm_topk_prob: False'),
    ('deepseek_v3', dict(scoring_func='softmax'), "scoring_func: 'softmax'"),
    ('deepseek_v3', dict(n_group=3), 'n_group: 3'),
    ('deepseek_v3', dict(attention_bias=True), 'attention_bias: True'),
    ('gpt_oss', dict(layer_types=['full_attention']), 'layer_types has 1'),
  ],
)
def test_what_a_family_does_not_do_is_refused(name, changes, message):
  with pytest.raises(ValueError, match=f'config.json: .*{message}'):
    families.decoder_of({**FAMILIES[name], **changes})


PUBLISHED = {  # Parameters, in 10^9: what differs from the defaults.
  'mixtral': (46.7, dict(intermediate_size=14336, vocab_size=32000)),
  'qwen3_moe': (
    30.5,
    dict(
      hidden_size=2048,
      num_hidden_layers=48,
      vocab_size=151936,
      head_dim=128,
      num_key_value_heads=4,
    ),
  ),
  'qwen2_moe': (
    14.3,
    dict(
      hidden_size=2048,
      num_hidden_layers=24,
      num_attention_heads=16,
      vocab_size=151936,
    ),
  ),
  'gpt_oss': (
    20.9,
    dict(
      hidden_size=2880,
      intermediate_size=2880,
      num_hidden_layers=24,
      num_attention_heads=64,
      vocab_size=201088,
      num_local_experts=32,
    ),
  ),
  'deepseek_v3': (
    671.0,
    dict(
      hidden_size=7168,
      intermediate_size=18432,
      num_hidden_layers=61,
      num_attention_heads=128,
      vocab_size=129280,
    ),
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_models_are_as_large_as_published(name):
  """Nothing is allocated: what is declared is counted."""
  expected, changes = PUBLISHED[name]
  usual = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
  config = {**COMMON, 'model_type': name, **usual, **changes}
  if 'num_key_value_heads' not in changes:
    del config['num_key_value_heads']
  model = families.decoder_of(config)
  found = weights.count(weights.rows(model), model.config.sizes)
  assert round(found / 1e9, 1) == expected


@pytest.mark.parity
@pytest.mark.parametrize('name', FAMILIES)
def test_defaults_are_those_of_transformers(name):
  """A config.json may leave keys out, and transformers reads them so."""
  needed = set(COMMON) - {'num_key_value_heads', 'tie_word_embeddings'}
  short = {k: FAMILIES[name][k] for k in {*needed, 'model_type'}}
  kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
  whole = kind.from_dict(short).to_dict()
  own, full = (families.decoder_of(c).config for c in (short, whole))
  assert own == full
  assert jnp.isfinite(own.attention_scale) and isinstance(
    own.experts, moe.Experts
  )


def write_golden():
  """Writes GOLDEN from `transformers`."""
  arrays = {}
  for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
      write_case(pathlib.Path(folder), name)
      arrays[name] = their_logits(pathlib.Path(folder))[:, -KEPT:]
      arrays[f'{name}.weights'] = ours(name)[1]
  np.savez_compressed(GOLDEN, **arrays)
  print(f'{GOLDEN}: {GOLDEN.stat().st_size} bytes')


if __name__ == '__main__':
  write_golden()
