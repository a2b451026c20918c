"""Chunked log-probabilities equal the plain ones, and never hold [B, T, V]."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

from tuner import adapt
from tuner.models import decoder, logprobs, policy, weights

B, T, D, V = 2, 21, 8, 13


def make(masked='some'):
  """(x, head_DV, tokens, wanted)."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, T, D), np.float32)
  head = rng.standard_normal((D, V), np.float32)
  tokens = rng.integers(0, V, (B, T))
  wanted = np.zeros((B, T), np.float32)
  if masked == 'some':  # Few: chunks of 4 without a target in either row.
    wanted[0, [0, 3, 17]], wanted[1, 20] = 1, 0.5
  elif masked == 'all':
    wanted[:] = 1
  return x, head, tokens, wanted


def plain(head, params, x, tokens, wanted):
  logits = jax.nn.log_softmax(head(params, x))
  chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return jnp.where(wanted != 0, chosen, 0.0)


def values_and_gradients(fn, head, params, x, tokens, wanted):
  """fn's values, and gradients by params and x of a weighted sum of them."""

  def total(params, x):
    out = fn(head, params, x, tokens, wanted)
    return (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum(), out

  run = jax.jit(
    jax.grad(total, (0, 1), has_aux=True), compiler_options=support.QUICK
  )
  return run(params, x)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('masked', ['some', 'all'])
@pytest.mark.parametrize('chunk', [4, 128])
def test_values_and_gradients_equal_the_plain_ones(tied, masked, chunk):
  """By hidden states and by a head DV and a tied head VD; 4 and 21 tokens."""
  x, params, tokens, wanted = make(masked)
  params = params.T if tied else params
  head = functools.partial(decoder.head_logits, tied=tied)
  chunked = functools.partial(logprobs.logprobs, chunk=chunk)
  found = values_and_gradients(chunked, head, params, x, tokens, wanted)
  expected = values_and_gradients(plain, head, params, x, tokens, wanted)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('chunk', [1, 8])
def test_frozen_head(chunk):
  """Only the hidden states are differentiated; the gradient is the same."""
  x, params, tokens, wanted = make()
  head = functools.partial(decoder.head_logits, tied=False)

  def total(fn, x):
    return fn(head, params, x, tokens, wanted).sum()

  chunked = functools.partial(logprobs.logprobs, chunk=chunk)
  np.testing.assert_allclose(
    jax.jit(jax.grad(functools.partial(total, chunked)))(x),
    jax.jit(jax.grad(functools.partial(total, plain)))(x),
    rtol=1e-5,
    atol=1e-6,
  )


def test_nothing_wanted_is_zero():
  """An empty mask: 0 and zero gradients, although the logits are infinite."""
  x, params, tokens, wanted = make('none')
  x[0, 0] = np.inf
  head = functools.partial(decoder.head_logits, tied=False)
  chunked = functools.partial(logprobs.logprobs, chunk=4)
  grads, out = values_and_gradients(chunked, head, params, x, tokens, wanted)
  assert not np.asarray(out).any()
  assert not any(np.asarray(grad).any() for grad in grads)


def test_unwanted_tokens_of_a_wanted_chunk_give_no_nan():
  """Padding beside a target, with hidden states that overflow."""
  x, params, tokens, wanted = make()
  x[0, 1] = np.inf
  head = functools.partial(decoder.head_logits, tied=False)
  chunked = functools.partial(logprobs.logprobs, chunk=128)
  (_, d_x), out = values_and_gradients(chunked, head, params, x, tokens, wanted)
  assert np.isfinite(out).all()
  assert np.isfinite(d_x).all()


@pytest.mark.parametrize('masked', ['none', 'some', 'all'])
@pytest.mark.parametrize('chunk', [4, 128])
def test_predictions_are_the_logprobs_and_their_argmax(masked, chunk):
  """Of equal logits the first counts; False where nothing is wanted."""
  x, params, tokens, wanted = make(masked)
  params[:, 7] = params[:, 3]
  head = functools.partial(decoder.head_logits, tied=False)
  top = np.asarray(head(params, x).argmax(-1))
  tokens[:, ::2] = top[:, ::2]
  tokens[top == 3] = 7
  fn = functools.partial(logprobs.predictions, head, chunk=chunk)
  found, is_top = jax.jit(fn)(params, x, tokens, wanted)
  expected = plain(head, params, x, tokens, wanted)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert is_top.dtype == bool
  np.testing.assert_array_equal(is_top, (top == tokens) & (wanted != 0))


@pytest.mark.parametrize('chunk', [4, 128])
def test_any_function_walks_the_chunks(chunk):
  """A tree of values and its gradients, by two arrays, equal those at once."""
  x, params, _, wanted = make()
  head = functools.partial(decoder.head_logits, tied=False)
  other = x[..., ::-1] * 2

  def one(params, x, other):
    p, q = (jax.nn.log_softmax(head(params, a)) for a in (x, other))
    return {'kl': (jnp.exp(p) * (p - q)).sum(-1), 'logits': p[..., :2]}

  def at_once(params, x, other):
    out = one(params, x, other)
    kl = jnp.where(wanted != 0, out['kl'], 0)
    return {
      'kl': kl,
      'logits': jnp.where(wanted[..., None] != 0, out['logits'], 0),
    }

  def walked(params, x, other):
    fn = jax.checkpoint(functools.partial(one, params))
    return logprobs.over_chunks(fn, wanted, x, other, chunk=chunk)

  def run(fn):
    def total(*args):
      out = fn(*args)
      kl = out['kl'] * jnp.arange(T)
      return kl.sum() + jnp.sin(out['logits']).sum(), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(params, x, other)

  found, expected = run(walked), run(at_once)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  return support.load_model(tiny_dir)


def examples(seed=0):
  """Ids and the first trained position of examples of 5 to 40 tokens."""
  rng = np.random.default_rng(seed)
  return [
    (rng.integers(0, 320, length), int(length) // 2)
    for length in (40, 5, 17, 26, 33, 40, 12, 30)
  ]


@pytest.mark.parametrize('kind', ['full', 'lora'])
def test_a_training_step_holds_no_logits_of_a_row(tiny, kind):
  """No buffer of [.., T, V] in the compiled program, forward or backward."""
  model, values = tiny
  batch = support.pack([examples()] * 2, 208)
  adaptation = {'full': adapt.full, 'lora': adapt.lora}[kind](
    weights.rows(model)
  )
  frozen, trainable = adaptation.split(values)
  trainable |= support.fresh_factors(model, adaptation)

  def loss(trainable):
    filled = weights.fill(model, adaptation.attach(frozen, trainable))
    tuned = policy.Policy(filled, remat='full', chunk=16)
    return -tuned.logprobs(batch).sum()

  step = jax.jit(jax.value_and_grad(loss), compiler_options=support.QUICK)
  text = step.lower(trainable).compile().as_text()
  shapes = {
    tuple(map(int, found.split(',')))
    for found in re.findall(r'\bf32\[([\d,]+)\]', text)
  }
  vocabulary = model.config.V
  sizes = [np.prod(s) // vocabulary for s in shapes if vocabulary in s]
  chunked = [s for s in shapes if vocabulary in s and 2 in s and 16 in s]
  assert chunked, f'the chunk of logits is not in the program: {shapes}'
  # Of a row's 208 tokens, 16 at a time; the embedding has 32 x V.
  assert max(sizes) <= 2 * 16


def test_packed_equals_unpacked(tiny):
  """Log-probabilities and gradients: a banded row of eight, eight rows."""
  model, values = tiny
  rows = examples()
  alone = support.pack([[row] for row in rows], 40)
  together = support.pack([rows], 208)

  def run(batch, reach):
    def total(values):
      tuned = policy.Policy(weights.fill(model, values), reach, chunk=16)
      out = tuned.logprobs(batch)
      return out.sum(), out

    grads, out = jax.grad(total, has_aux=True)(values)
    return out, grads

  run = jax.jit(run, static_argnums=1, compiler_options=support.QUICK)
  apart, grads_apart = run(alone, None)
  packed, grads_packed = run(together, 40)
  lengths = [len(ids) for ids, _ in rows]
  mask = together['mask'][0, : sum(lengths)]
  apart = np.concatenate(
    [row[:length] for row, length in zip(np.asarray(apart), lengths)]
  )
  packed = np.asarray(packed)[0, : sum(lengths)]
  np.testing.assert_allclose(packed, apart, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(packed < 0, mask > 0)
  for path, grad in grads_packed.items():
    # A leak between examples is an error of the gradient's own size.
    atol = 5e-5 * np.abs(grad).max()
    np.testing.assert_allclose(
      grad, grads_apart[path], rtol=0, atol=atol, err_msg=path
    )
