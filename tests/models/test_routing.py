"""What holds for any mixture of experts: balance, meshes, adapters, caches."""

import functools

import jax
import jax.numpy as jnp
import moe_cases
import numpy as np
import pytest
import support

from tuner import adapt
from tuner import mesh as mesh_lib
from tuner.generate import greedy
from tuner.models import moe, policy, weights
from tuner.objectives import sft

pytestmark = pytest.mark.usefixtures('quick_compiles')
E, T = moe_cases.E, 24


@functools.partial(jax.jit, compiler_options=support.QUICK)
def routed(model, batch):
  """How a batch is routed."""
  return policy.Policy(model).routed_logprobs(batch)[1]


@pytest.mark.parametrize('name', ['qwen2_moe_steps', 'deepseek_v3'])
def test_balance_does_not_see_padding_and_packing(name):
  filled = weights.fill(*moe_cases.load_case(name))
  first, second = (moe_cases.TOKENS[0, :9], 2), (moe_cases.TOKENS[1, :15], 2)
  alone = routed(filled, support.pack([[first], [second]], 15))
  packed = routed(filled, support.pack([[first, second]], 32))
  for key, value in alone.items():
    np.testing.assert_allclose(value, packed[key], 1e-5, err_msg=key)
  assert 1 / E < alone['busiest'] < 1
  assert abs(alone['balance'] - 3) > 0.01


def test_an_indifferent_router_has_a_balance_of_k():
  model, values = moe_cases.load_case('qwen3_moe')
  values['blocks.0.mlp.router'] = np.zeros((2, 16, E), np.float32)
  batch = support.pack([[(moe_cases.TOKENS[0], 2)]], T)
  even = routed(weights.fill(model, values), batch)
  np.testing.assert_allclose(even['balance'], 3, 1e-6)


def test_balance_of_a_dense_model_is_refused(tiny_dir):
  model, values = support.load_model(tiny_dir)
  tuned = policy.Policy(weights.fill(model, values))
  batch = support.pack([[(moe_cases.TOKENS[0], 2)]], T)
  with pytest.raises(ValueError, match='this model has no experts'):
    sft.sft(tuned, None, batch, balance=0.1)


@functools.partial(jax.jit, static_argnums=2, compiler_options=support.QUICK)
def sft_of(model, batch, balance):
  tuned = policy.Policy(model, chunk=16)
  return sft.sft(tuned, None, batch, balance=balance)


def test_balance_is_a_mean_over_micro_batches():
  """loss_sum / weight gains balance * the loss of Switch Transformers."""
  model, values = moe_cases.load_case('mixtral')
  filled = weights.fill(model, values)
  batch = support.pack([[(row, 9)] for row in moe_cases.TOKENS], T)
  plain, weight, _ = sft_of(filled, batch, 0.0)
  loss_sum, again, metrics = sft_of(filled, batch, 0.1)
  assert weight == again
  expected = plain + 0.1 * metrics['balance']
  np.testing.assert_allclose(loss_sum, expected, 1e-6)
  assert 1 / E < metrics['busiest'] / weight < 1


def test_all_tokens_may_choose_the_same_experts():
  """Nothing is dropped, and the others have no token: a plain mixture."""
  model, values = moe_cases.load_case('mixtral')
  values['blocks.0.mlp.router'] = np.zeros((2, 16, E), np.float32)
  logits = support.logits(weights.fill(model, values), moe_cases.TOKENS)
  halves = dict(values)  # The first two by halves are any two by halves.
  for part in ('gate', 'up', 'down'):
    value = np.asarray(values[f'blocks.0.mlp.{part}'])
    halves[f'blocks.0.mlp.{part}'] = value[:, [1, 0, 1, 0, 1, 0, 1, 0]]
  swapped = support.logits(weights.fill(model, halves), moe_cases.TOKENS)
  np.testing.assert_allclose(logits, swapped, rtol=1e-5, atol=1e-5)
  one = support.logits(weights.fill(model, values), moe_cases.TOKENS[:1, :1])
  np.testing.assert_allclose(one[:, 0], logits[:1, 0], rtol=1e-5, atol=1e-5)


def test_rows_of_no_expert_add_nothing_whatever_is_in_them():
  """Padding, and on a mesh the tokens of other devices' experts."""
  x_BTD = jnp.ones((1, 2, 4))
  chosen_BTK = jnp.array([[[0, 1], [2, 2]]])  # Of two experts; 2 is none.
  gates_BTK = jnp.full(chosen_BTK.shape, 0.5)

  def expert(parts, x_ND, sizes_E):
    is_own_N1 = jnp.arange(len(x_ND))[:, None] < sizes_E.sum()
    return jnp.where(is_own_N1, parts['by'] * x_ND, jnp.nan)

  def total(by):
    out = moe.meet(expert, {'by': by}, x_BTD, gates_BTK, chosen_BTK, 2)
    return out.sum(), out

  (_, out), grad = jax.value_and_grad(total, has_aux=True)(3.0)
  np.testing.assert_array_equal(out[0], [[3.0] * 4, [0.0] * 4])
  assert grad == 4.0


@pytest.mark.parametrize('name', ['qwen2_moe', 'gpt_oss', 'deepseek_v3_yarn'])
def test_cached_decoding_equals_the_full_forward(name):
  """Each generated token is the full forward's most likely next one."""
  model, values = moe_cases.load_case(name)
  filled = weights.fill(model, values)
  prompts = [
    moe_cases.TOKENS[0, :5].tolist(),
    moe_cases.TOKENS[1, :11].tolist(),
  ]
  answers = greedy.generate(filled, prompts, [], max_tokens=6)
  for prompt, answer in zip(prompts, answers, strict=True):
    whole = np.zeros((1, T), np.int32)
    whole[0, : len(prompt) + 6] = prompt + answer
    best = support.logits(filled, whole).argmax(-1)
    assert answer == best[0, len(prompt) - 1 : len(prompt) + 5].tolist()


@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss', 'deepseek_v3'])
def test_adapters_of_experts_merged_equal_attached(name):
  model, values = moe_cases.load_case(name)
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
  found = support.logits(weights.fill(model, attached), moe_cases.TOKENS)
  expected = support.logits(weights.fill(model, merged), moe_cases.TOKENS)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  plain = support.logits(weights.fill(model, values), moe_cases.TOKENS)
  assert np.abs(found - plain).max() > 0.05


MESHES = {
  'fsdp': dict(data=1, fsdp=8),
  'tensor': dict(data=4, tensor=2),
  'expert': dict(data=2, expert=4),
}


@functools.cache
def on_one_device():
  """(model, weights, batch, loss, gradients), each row another text."""
  model, values = moe_cases.load_case('mesh')
  rows = [[(np.roll(moe_cases.TOKENS[i % 2], i), 3)] for i in range(8)]
  batch = support.pack(rows, T)
  return (
    model,
    values,
    batch,
    *moe_cases.loss_and_gradients(model, values, batch, 0.5),
  )


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
    loss, found = moe_cases.loss_and_gradients(model, placed, batch, 0.5)
  np.testing.assert_allclose(loss, expected, 1e-6)
  for path, grad in found.items():
    np.testing.assert_allclose(
      grad, grads[path], rtol=1e-4, atol=1e-6, err_msg=path
    )
