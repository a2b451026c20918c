"""DoRA: where it starts, what it is a rescaling of, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import support

from tuner import adapt
from tuner.adapters import low_rank
from tuner.models import linear, policy, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')
QUICK = functools.partial(jax.jit, compiler_options=support.QUICK)


@pytest.fixture(scope='module')
def made(bases):
  model, values = small.load(bases('tied'))
  adaptation = adapt.dora(weights.rows(model), rank=3, alpha=6.0)
  return model, values, adaptation


def started(model, values, adaptation):
  initial = functools.partial(adaptation.initial, model.config.sizes)
  return QUICK(initial)(jax.random.key(0), values)


def all_merged(adaptation, values, tree):
  """The plain arrays of every weight, compiled as one."""

  def merge(values, tree):
    attached = adaptation.attach(values, tree)
    rows = adaptation.rows
    return {path: adapt.merge(rows, attached, path) for path in rows}

  return QUICK(merge)(values, tree)


def test_it_starts_as_the_base(made):
  """m is |W| and b zero: m / |W| is 1 to the last bits."""
  model, values, adaptation = made
  start = started(*made)
  for path in adaptation.targets:
    row = adaptation.rows[path]
    axes = tuple(row.dims.index(d) for d in row.inputs)
    own = np.asarray(values[path], np.float64)
    lengths = np.sqrt((own**2).sum(axes))
    np.testing.assert_allclose(start[f'{path}.m'], lengths, rtol=1e-6)
    assert not np.asarray(start[f'{path}.b']).any()
  found = small.logits(model, adaptation.attach(values, start))
  expected = small.logits(model, values)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_base_in_bfloat16(made):
  """Its magnitudes stay float32, so that m / |W| stays 1."""
  model, values, adaptation = made
  half = linear.cast(values, 'bfloat16', adaptation.rows)
  start = started(model, half, adaptation)
  attached = adaptation.attach(half, start)
  attached = linear.cast(attached, 'bfloat16', adaptation.rows)
  weight = attached['blocks.0.mlp.up']
  assert weight.m_O.dtype == jnp.float32 and weight.a_RI.dtype == jnp.bfloat16
  row = adaptation.rows['blocks.0.mlp.up']
  np.testing.assert_array_equal(
    np.asarray(linear.merged(weight, row), np.float32),
    np.asarray(weight.base, np.float32),
  )


def test_each_output_has_the_length_m(made):
  """Of the merged matrix, whatever a and b are."""
  model, values, adaptation = made
  tree = small.factors(model, adaptation, values)
  rows = adaptation.rows
  found = all_merged(adaptation, values, tree)
  for path in adaptation.targets:
    row = rows[path]
    merged = np.asarray(found[path], np.float64)
    axes = tuple(row.dims.index(d) for d in row.inputs)
    lengths = np.sqrt((merged**2).sum(axes))
    np.testing.assert_allclose(lengths, abs(tree[f'{path}.m']), rtol=1e-5)


def test_merged_equals_attached(made):
  model, values, adaptation = made
  tree = small.factors(model, adaptation, values)
  attached = adaptation.attach(values, tree)
  merged = all_merged(adaptation, values, tree)
  found = small.logits(model, attached)
  assert np.abs(found - small.logits(model, values)).max() > 0.1
  expected = small.logits(model, merged)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_length_is_no_part_of_the_gradient():
  """d/dm and d/db of y = m / |V| (x V), |V| a constant, by hand."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  x, base, a, b, m = draw(1, 4, 6), draw(6, 5), draw(2, 6), draw(2, 5), draw(5)

  def loss(b, m):
    weight = linear.Dora(base, a, b, m, None, 0.5)
    return jnp.sin(linear.project('BTD,DF->BTF', x, weight)).sum()

  length = jnp.linalg.norm(base + 0.5 * a.T @ b, axis=0)

  def stated(b, m):
    return jnp.sin(x @ (base + 0.5 * a.T @ b) * (m / length)).sum()

  np.testing.assert_allclose(loss(b, m), stated(b, m), rtol=1e-5)
  both = (jax.grad(f, (0, 1))(b, m) for f in (loss, stated))
  for found, expected in zip(*both, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def gradients(model, adaptation, values, tree):
  """Of the mean loss over every token but the first."""
  batch = support.pack([[(row, 1)] for row in small.TOKENS], 16)

  def loss(tree):
    filled = weights.fill(model, adaptation.attach(values, tree))
    found = policy.Policy(filled, chunk=8).logprobs(batch)
    return -found.sum() / batch['mask'].sum()

  return QUICK(jax.grad(loss))(tree)


@pytest.mark.parity
def test_a_step_of_sgd_is_that_of_peft(made, bases, tmp_path):
  """Every tensor of the adapter after one step, theirs and ours."""
  import peft
  import torch

  from tuner.adapters import peft as writer

  model, values, adaptation = made
  base = bases('tied')
  tree = small.factors(model, adaptation, values)
  small.write_adapter(tmp_path / 'a', base, model, adaptation, tree)
  theirs = peft.PeftModel.from_pretrained(
    small.torch_base(base), tmp_path / 'a', is_trainable=True
  )
  tokens = torch.from_numpy(small.TOKENS)
  theirs(tokens, labels=tokens).loss.backward()
  with torch.no_grad():
    for weight in theirs.parameters():
      if weight.requires_grad:
        weight -= 0.1 * weight.grad
  grads = gradients(model, adaptation, values, tree)
  stepped = {path: tree[path] - 0.1 * grads[path] for path in tree}
  ours = writer.tensors(model, adaptation, stepped)
  before = writer.tensors(model, adaptation, tree)
  found = peft.get_peft_model_state_dict(theirs)
  assert found.keys() == ours.keys()
  for name, tensor in ours.items():
    np.testing.assert_allclose(
      found[name].numpy(), tensor, rtol=1e-4, atol=1e-4, err_msg=name
    )
    assert np.abs(tensor - before[name]).max() > 1e-4, name


def test_layers_without_an_adapter_keep_the_base(made):
  """Whatever their stored magnitude is, and no gradient reaches it."""
  model, values, _ = made
  rows = weights.rows(model)
  size = low_rank.Size((2, 0), (4.0, 4.0))
  adaptation = low_rank.LowRank(rows, {'blocks.0.mlp.up': size}, kind='dora')
  tree = small.factors(model, adaptation, values)
  tree = {path: x.at[1].set(0.0) for path, x in tree.items()}
  attached = adaptation.attach(values, tree)
  row = rows['blocks.0.mlp.up']
  merged = linear.merged(attached['blocks.0.mlp.up'], row)
  np.testing.assert_allclose(merged[1], values[row.path][1], rtol=1e-6)
  assert np.abs(merged[0] - values[row.path][0]).max() > 0.01
  grads = gradients(model, adaptation, values, tree)
  for path, grad in grads.items():
    assert not np.asarray(grad[1]).any(), path
    assert np.asarray(grad[0]).any(), path


@pytest.mark.parametrize(
  'kwargs, message',
  [
    (
      dict(targets='experts'),
      'config.adapt: dora on experts (blocks.0.mlp.down, blocks.0.mlp.gate, '
      'blocks.0.mlp.up), which `peft` does not know; use lora without '
      'dropout for them.',
    ),
    (
      dict(targets='q', modules_to_save=['q_proj']),
      'config.adapt: blocks.0.attention.q in targets and in modules_to_save; '
      'a matrix has an adapter or trains whole.',
    ),
  ],
)
def test_errors(bases, kwargs, message):
  model, _ = small.load(bases('mixtral'))
  with pytest.raises(ValueError) as error:
    adapt.dora(weights.rows(model), **kwargs)
  assert str(error.value) == message
