"""A trained state, and all that it takes to hand it over."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from tuner import adapt, sections
from tuner import mesh as mesh_lib
from tuner.artifacts import folders, prompts
from tuner.models import decoder, hub, linear, policy, weights

# What a served model needs beside its weights; copied as it is. A licence is
# to stay with what it is a licence of.
COMPANIONS = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'LICENSE',
  'LICENSE.txt',
  'NOTICE',
)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A state of a run, in memory, and what belongs to it.

  frozen, trainable: see tuner.adapt. record: of the commit, with its step, its
  facts and its sha256. prompts: held-out ones, to travel and to measure on.
  """

  config: sections.Config
  base_dir: pathlib.Path
  tokenizer: Any
  stop_ids: tuple[int, ...]
  model: decoder.Decoder
  adaptation: adapt.Adaptation
  mesh: jax.sharding.Mesh
  frozen: Mapping[str, Any]
  trainable: Mapping[str, Any]
  record: Mapping[str, Any]
  prompts: tuple[prompts.Prompt, ...]
  workdir: pathlib.Path

  @property
  def revision(self) -> str | None:
    """The hub's commit of the base, None for a local directory."""
    return hub.revision_of(self.base_dir)

  @property
  def is_base_local(self) -> bool:
    """A directory here, or a GGUF file."""
    return pathlib.Path(self.config.model.path).expanduser().exists()

  @property
  def base_name(self) -> str:
    """Where others find the base: a hub id or a directory."""
    if self.is_base_local:
      return str(self.base_dir.absolute())
    return self.config.model.path

  @property
  def dtype(self) -> str:
    """Of the weights in exports that hold all of them."""
    return self.config.export.dtype or self.config.model.dtype

  @property
  def rows(self) -> Mapping[str, weights.Row]:
    return self.adaptation.rows

  @functools.cached_property
  def attached(self) -> dict[str, Any]:
    """The weights as they are trained with: arrays and weight kinds."""
    return self.adaptation.attach(dict(self.frozen), dict(self.trainable))

  def merged(self, path: str) -> jax.Array:
    """One weight as a plain array."""
    return adapt.merge(self.rows, self.attached, path)

  def filled(self, values: Mapping[str, Any]) -> policy.Policy:
    """A policy of these weights, computing in config.model.dtype."""
    own = self.config.model
    values = linear.cast(values, own.dtype, self.rows)
    return policy.Policy(weights.fill(self.model, values), chunk=own.head_chunk)

  def load(self, path: pathlib.Path) -> dict[str, jax.Array]:
    """The weights of a directory of this model, in their shardings."""
    return load(path, self.model, self.mesh, self.config.model.dtype)

  def companions(self) -> dict[str, bytes]:
    """Files of every Hugging Face directory that is no weight's, by name."""
    found = {
      name: (self.base_dir / name).read_bytes()
      for name in COMPANIONS
      if (self.base_dir / name).is_file()
    }
    found['generation_config.json'] = self._generation_config()
    own = self.config.data
    if own.template is None and not own.template_args:
      return found  # The base's own, in the base's own files.
    template = self.tokenizer.chat_template
    found['chat_template.jinja'] = template.encode()
    name = 'tokenizer_config.json'
    if name in found:  # Older readers look for it there.
      config = {**json.loads(found[name]), 'chat_template': template}
      found[name] = folders.as_json(config)
    return found

  def _generation_config(self) -> bytes:
    """The base's, ending where this model was trained to end."""
    file = self.base_dir / 'generation_config.json'
    given = file.read_bytes() if file.is_file() else b'{}'
    config = json.loads(given)
    eos = config.get('eos_token_id')
    named = eos if isinstance(eos, list) else [eos]
    if set(named) == set(self.stop_ids):
      return given
    return folders.as_json({**config, 'eos_token_id': list(self.stop_ids)})


def load(path, model, mesh, dtype) -> dict[str, jax.Array]:
  """The weights of a directory in the shardings of a mesh."""
  sizes = model.config.sizes

  def place(row):
    return mesh_lib.sharding(mesh, row.dims, row.shape(sizes), row.path)

  return hub.load(path, model, place, dtype)
