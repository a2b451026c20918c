"""A tiny trained state, made without training."""

import json
import shutil
import types

import jax
import ml_collections
import numpy as np
import pytest
import support

from tuner import adapt, dataset, sections
from tuner import mesh as mesh_lib
from tuner.artifacts import prompts
from tuner.artifacts import trained as trained_lib
from tuner.models import hub, weights

ASKED = ('hi', 'yes or no', '12 and 34', 'no')


def make(base, rows, workdir, adaptation=None, export=None, **data):
  """Random factors (or those of `adaptation`) on the base, as a Trained."""
  config = support.config(base, rows)
  config.export = export or {}
  config.data.update(data)
  own = sections.read(ml_collections.ConfigDict(config))
  model = hub.declare(base)
  adaptation = adaptation or {'rank': 3, 'alpha': 6.0}
  kind = {k: v for k, v in adaptation.items() if k != 'name'}
  method = getattr(adapt, adaptation.get('name', 'lora'))
  found = method(weights.rows(model), **kind)
  mesh = mesh_lib.make(devices=1)
  tokenizer, stop_ids = dataset.load_tokenizer(own, base)
  values = trained_lib.load(base, model, mesh, 'float32')
  if found.is_adapter:
    rng, sizes = np.random.default_rng(0), model.config.sizes
    trainable = {
      path: 0.05 * rng.standard_normal(shape, np.float32)
      for path, shape in found.shapes(sizes).items()
    }
    frozen = values
  else:
    trainable, frozen = values, {}
  places = {p: jax.numpy.asarray(x) for p, x in trainable.items()}
  asked = [
    prompts.rendered(({'role': 'user', 'content': a},), (), tokenizer)
    for a in ASKED
  ]
  record = {
    'step': 4,
    'sha256': 'c0ffee' * 8,
    'versions': {'tuner': '0.1.0'},
    'facts': {
      'steps': 4,
      'adapt': {'name': 'lora', 'rank': 3},
      'objective': {'name': 'sft'},
      'model': {'weights': hub.weights_hash(base)},
    },
  }
  return trained_lib.Trained(
    own, base, tokenizer, stop_ids, model, found, mesh, frozen, places, record,
    tuple(asked), workdir,
  )  # fmt: skip


@pytest.fixture(scope='session')
def made(tiny_dir, tiny_rows, tmp_path_factory):
  """A namespace with make(...) on the tiny model, and one made state."""
  workdir = tmp_path_factory.mktemp('run')
  base = tmp_path_factory.mktemp('base') / 'base'
  shutil.copytree(tiny_dir, base)
  file = base / 'tokenizer.json'
  text = file.read_text()
  assert '"use_regex": false' in text
  # llama.cpp has no pre-tokenizer like the tiny one's; it has GPT-2's.
  file.write_text(text.replace('"use_regex": false', '"use_regex": true'))
  (workdir / 'check.json').write_text(json.dumps({'rows': {'train': 42}}))

  def again(base=base, **kwargs):
    return make(base, tiny_rows, workdir, **kwargs)

  return types.SimpleNamespace(make=again, state=again(), workdir=workdir)
