"""A random directory of any config.json, run by us and by `transformers`."""

import dataclasses
import json
import pathlib
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import support
import transformers

from tuner.models import families, hub, policy, weights
from tuner.objectives import sft

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
LEAST = 1e-3


@dataclasses.dataclass(frozen=True)
class Run:
  """What a model made of a batch: logits_BTV, mean NLL of the masked tokens.

  grads: the loss's gradients by Hugging Face name.
  size: the sum of the weights' sizes, by which goldens know their weights.
  """

  logits: np.ndarray
  loss: float
  grads: dict[str, np.ndarray]
  size: float = 0.0


@dataclasses.dataclass(frozen=True)
class Seen(policy.Policy):
  """A policy whose hidden states are known: logits and loss of one pass."""

  x_BTD: jax.Array | None = None

  def hidden(self, batch):
    del batch
    return self.x_BTD


def write(path: pathlib.Path, config: dict) -> float:
  """Writes a random model directory. Returns the sum of its weights' sizes.

  A tensor depends on its name alone, so that variants differ in nothing else.
  Attention is not uniform, and a wrong norm shows; larger norms would bring
  the float32 rounding of `transformers` itself near the tolerance.
  """
  (path / 'config.json').write_text(json.dumps(config))
  model = families.decoder_of(config)
  tensors = {}
  for row in weights.rows(model).values():
    mean = 1 - model.config.norm.offset if row.init == 'ones' else 0.0
    for name in row.names(model.config.sizes).values():
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      noise = rng.standard_normal(row.hf_shape(model.config.sizes), np.float32)
      tensor = 0.2 * noise + np.float32(mean)
      tensors[name] = tensor.astype(jnp.dtype(config.get('dtype', 'float32')))
  safetensors.numpy.save_file(tensors, path / 'model.safetensors')
  exact = (tensor.astype(np.float32) for tensor in tensors.values())
  return float(sum(np.abs(tensor).sum() for tensor in exact))


def ours(config: dict, batch: dict, compiled: bool) -> Run:
  """This package's run over a batch, from a directory.

  compiled: as it runs; else operation by operation, at a tenth of the time
    where other configs have the same shapes.
  """
  with tempfile.TemporaryDirectory() as folder:
    size = write(pathlib.Path(folder), config)
    model, values = support.load_model(pathlib.Path(folder))

  def loss(values):
    filled = weights.fill(model, values)
    x_BTD = policy.Policy(filled).hidden(batch)
    tuned = Seen(filled, chunk=16, x_BTD=x_BTD)
    loss_sum, weight, _ = sft.sft(tuned, None, batch)
    return loss_sum / weight, tuned.logits(batch)

  run = jax.jit(
    jax.value_and_grad(loss, has_aux=True), compiler_options=support.QUICK
  )
  with jax.disable_jit(not compiled):
    (mean, logits), grads = run(values)
  return Run(np.asarray(logits), float(mean), hf_arrays(model, grads), size)


def hf_arrays(model, values) -> dict[str, np.ndarray]:
  """Declared arrays by Hugging Face name."""
  found = {}
  for row in weights.rows(model).values():
    value = np.asarray(values[row.path])
    found.update(hub.hf_tensors(row, value, model.config.sizes))
  return found


def load_theirs(path: pathlib.Path, dtype: str = 'float32'):
  """The model of a directory as `transformers` loads it."""
  import torch

  torch.set_num_threads(1)  # Several spin while they wait for a core.
  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=getattr(torch, dtype), attn_implementation='eager'
  )


def theirs(path: pathlib.Path, batch: dict) -> Run:
  """The same by `transformers` and torch's autograd."""
  import torch

  model = load_theirs(path)
  tokens, mask = (torch.from_numpy(batch[k]).long() for k in ('tokens', 'mask'))
  logits = model(tokens).logits
  logprobs = torch.log_softmax(logits[:, :-1], -1)
  picked = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
  loss = -(picked * mask[:, 1:]).sum() / mask[:, 1:].sum()
  loss.backward()
  grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
  return Run(logits.detach().numpy(), loss.item(), grads)


def assert_equal(own: Run, expected: Run, flat: tuple[str, ...] = ()) -> None:
  """Logits, loss and every gradient within the tolerance, none left out.

  flat: the weights that change nothing, whose gradients are 0.
  """
  np.testing.assert_allclose(own.logits, expected.logits, **TOLERANCE)
  np.testing.assert_allclose(own.loss, expected.loss, **TOLERANCE)
  assert own.grads.keys() == expected.grads.keys()
  for key, grad in own.grads.items():
    assert_gradient(grad, expected.grads[key], key)
    assert (np.abs(grad).max() > 1e-3) == (key not in flat), key


def assert_gradient(own: np.ndarray, expected: np.ndarray, name: str) -> None:
  """Within 1e-4 of the tensor's own largest element, or of LEAST.

  What cancels out to 0 is as near to it as the rounding of what cancels.
  """
  assert own.shape == expected.shape, name
  largest = max(np.abs(expected).max(), LEAST)
  difference = np.abs(own - expected).max() / largest
  assert difference <= 1e-4, f'{name}: {difference:.1e} of its largest'
