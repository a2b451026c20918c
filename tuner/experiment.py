"""A config -> all that a command needs, in the order in which things fail.

The config is checked first, then the data is read, split, rendered, masked and
packed, and only then is a weight loaded.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import tuner.objectives
from tuner import (
  adapt,
  basedir,
  batches,
  dataset,
  named,
  optim,
  sections,
  train,
)
from tuner import mesh as mesh_lib
from tuner.adapters import base as base_lib
from tuner.data import chat
from tuner.data import split as split_lib
from tuner.data import template as template_lib
from tuner.models import decoder, hub, linear, policy, weights


@dataclasses.dataclass(frozen=True)
class Declared:
  """What a config says of the model; neither data nor weights are read.

  adapt: config.adapt with its defaults filled in.
  """

  base_dir: pathlib.Path
  model: decoder.Decoder
  adaptation: adapt.Adaptation
  adapt: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config brought to life. `frozen` is the base as far as it is frozen."""

  config: sections.Config
  resolved: dict[str, Any]
  declared: Declared
  tokenizer: Any
  stop_ids: tuple[int, ...]
  data: dataset.Data
  source: Any
  objective: Callable
  optimizer: optim.Optimizer
  total_steps: int
  mesh: jax.sharding.Mesh

  @property
  def base_dir(self) -> pathlib.Path:
    """The base's directory."""
    return self.declared.base_dir

  @property
  def model(self) -> decoder.Decoder:
    """The base as it is declared, without weights."""
    return self.declared.model

  @property
  def adaptation(self) -> adapt.Adaptation:
    """What is trained of it."""
    return self.declared.adaptation

  @property
  def revision(self) -> str | None:
    """The hub's commit of the base, None for a local directory."""
    return hub.revision_of(self.base_dir)

  @property
  def split(self) -> split_lib.Split:
    """The rows to train on, to choose by, and to measure on in the end."""
    return self.data.split

  @functools.cached_property
  def facts(self) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint."""
    keys = ('seed', 'objective', 'optimizer', 'schedule')
    batch = {k: self.resolved['batch'][k] for k in ('rows', 'tokens')}
    model = model_facts(self.config, self.declared, self.tokenizer)
    if model['adapt'].get('dropout'):  # Each micro-batch has its own.
      batch['accumulate'] = self.config.batch.accumulate
    return {
      **{key: self.resolved[key] for key in keys},
      **model,
      'batch': batch,
      'steps': self.total_steps,
      'clip_norm': self.config.train.clip_norm,
      'data': self.source.fingerprint,
      'test': split_lib.digest(self.split.test),
    }

  def filled(self, values: Mapping[str, Any], reach=None) -> policy.Policy:
    """A policy whose weights are `values`, computing in config.model.dtype."""
    own = self.config.model
    values = linear.cast(values, own.dtype, self.adaptation.rows)
    return policy.Policy(
      weights.fill(self.model, values), reach, own.remat, own.head_chunk
    )

  def tuned(self, frozen, trainable, key=None, reach=None) -> policy.Policy:
    """The model being trained."""
    return self.filled(self.adaptation.attach(frozen, trainable, key), reach)

  def policies(self, frozen, trainable, key):
    """(policy, reference) for the objective; the reference is made on use."""
    reach = self.source.longest
    reference = _Lazy(lambda: self.filled(self.adaptation.base(frozen), reach))
    return self.tuned(frozen, trainable, key, reach), reference

  def step(self) -> Callable:
    """The pure training step, see train.make_step."""
    return train.make_step(
      self.policies, self.objective, self.optimizer, self.config.seed
    )

  def untuned(self, frozen) -> policy.Policy:
    """The base as it was.

    Adapters have it beside them. Full fine-tuning moved it: it is read anew,
    and takes its own memory, in config.model.dtype, for as long as it is held.
    """
    if self.adaptation.is_adapter:
      return self.filled(self.adaptation.base(frozen))
    return self.filled(self._load(self.config.model.dtype))

  def load_base(self) -> dict[str, jax.Array]:
    """The base's weights, each read straight into its sharding."""
    own = self.config.model
    is_frozen = self.adaptation.is_adapter
    return self._load(own.dtype if is_frozen else own.master)

  def _load(self, dtype: str) -> dict[str, jax.Array]:
    return hub.load(
      self.base_dir,
      self.model,
      lambda row: mesh_lib.sharding(
        self.mesh, row.dims, row.shape(self.model.config.sizes), row.path
      ),
      dtype,
    )

  def shardings(self) -> dict[str, jax.sharding.NamedSharding]:
    """Where each trainable array lives."""
    dims = self.adaptation.dims
    shapes = self.adaptation.shapes(self.model.config.sizes)
    return {
      path: mesh_lib.sharding(self.mesh, dims[path], shapes[path])
      for path in dims
    }

  def start(self, base: dict[str, jax.Array]):
    """(frozen, state before step 0); the optimizer lives beside its weights."""
    frozen, trainable = self.adaptation.split(base)
    places, master = self.shardings(), self.config.model.master
    key = jax.random.key(self.config.seed)

    def fresh(key, frozen):
      tree = self.adaptation.initial(self.model.config.sizes, key, frozen)
      return {p: x.astype(master) for p, x in tree.items()}

    names = jax.eval_shape(fresh, key, frozen)
    fresh = jax.jit(fresh, out_shardings={name: places[name] for name in names})
    given = {
      path: jax.device_put(value.astype(master), places[path])
      for path, value in self.adaptation.given.items()
    }
    trainable = {**trainable, **fresh(key, frozen), **given}
    first = functools.partial(
      train.initial_state, transform=self.optimizer.transform
    )
    shardings = self.state_shardings(jax.eval_shape(first, trainable))
    # Donated: full fine-tuning would hold its weights twice.
    first = jax.jit(first, donate_argnums=0, out_shardings=shardings)
    return frozen, first(trainable)

  def state_shardings(self, state: Any) -> Any:
    """A sharding for each leaf: moments as their weight, others replicated."""
    replicated = jax.sharding.NamedSharding(
      self.mesh, jax.sharding.PartitionSpec()
    )
    places = self.shardings()
    shapes = self.adaptation.shapes(self.model.config.sizes)

    def place(keys, leaf):
      names = [getattr(key, 'key', None) for key in keys]
      path = next((name for name in names if name in places), None)
      if path is None or leaf.shape != shapes[path]:
        return replicated
      return places[path]

    return jax.tree_util.tree_map_with_path(place, state)

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A process's rows [A, B, T] as its part of the global batch."""
    return {
      name: jax.make_array_from_process_local_data(
        mesh_lib.batch_sharding(self.mesh, rows.ndim), rows
      )
      for name, rows in batch.items()
    }


class _Lazy:
  """A policy made when it is first asked for something."""

  def __init__(self, make: Callable[[], policy.Policy]):
    self._make = make

  def __getattr__(self, name):
    return getattr(self._make(), name)


def prepare(given: Mapping[str, Any]) -> Experiment:
  """Checks the config, reads the data, declares the model; loads no weight.

  Raises ValueError for what the user can mend.
  """
  config = sections.read(given)
  declared = declare(config)
  model, adaptation = declared.model, declared.adaptation
  mesh = mesh_lib.make(**dataclasses.asdict(config.mesh))
  objective = named.bind(
    config.objective,
    tuner.objectives,
    where='config.objective',
    takes=('policy', 'reference', 'batch'),
  )
  if objective.resolved.get('kl') and not adaptation.is_adapter:
    raise ValueError(
      f'config.objective.kl: {objective.resolved["kl"]}, but full fine-tuning '
      'keeps no base to diverge from; train an adapter, or make it 0.'
    )
  tokenizer, stop_ids = dataset.load_tokenizer(config, declared.base_dir)
  data, source = _data(config, tokenizer, stop_ids, model)
  check_fit(config, mesh)
  total_steps = config.train.total(_epoch_steps(source))
  optimizer = optim.make(
    config.optimizer,
    config.schedule,
    total_steps,
    adaptation.dims,
    adaptation.matrices,
    config.train.clip_norm,
    adaptation.rate_scale,
  )
  resolved = {
    **config.resolved(),
    'adapt': declared.adapt,
    'objective': objective.resolved,
    **optimizer.resolved,
  }
  return Experiment(
    config, resolved, declared, tokenizer, stop_ids, data, source, objective,
    optimizer, total_steps, mesh,
  )  # fmt: skip


def declare(config: sections.Config) -> Declared:
  """The base and what is trained of it, and that its exports can be made.

  Raises ValueError for what the user can mend.
  """
  base_dir = basedir.find(config.model.path, config.model.revision)
  model = hub.declare(base_dir)
  bound = named.bind(
    config.adapt,
    adapt,
    where='config.adapt',
    takes=('rows',),
    sizes=model.config.sizes,
    base=base_lib.Base(config.model.path, hub.revision_of(base_dir), base_dir),
  )
  adaptation = bound(weights.rows(model))
  if set(config.export.formats) == {'adapter'} and not adaptation.is_adapter:
    raise ValueError(
      f"config.export.formats: 'adapter', but {config.adapt['name']!r} makes "
      "none; use 'model'."
    )
  if 'gguf' in config.export.formats:
    from tuner.llamacpp import write  # Its library is optional.

    try:
      write.check(base_dir)
    except ValueError as error:
      raise ValueError(f"config.export.formats: 'gguf': {error}") from error
  return Declared(base_dir, model, adaptation, bound.resolved)


def model_facts(
  config: sections.Config, declared: Declared, tokenizer: Any
) -> dict[str, Any]:
  """What a checkpoint's arrays must have in common with a model to mean it."""
  own, base_dir = config.model, declared.base_dir
  template = json.dumps(template_lib.identity(tokenizer))
  return {
    'adapt': {**declared.adapt, **declared.adaptation.facts},
    'model': {
      'dtype': own.dtype,
      'master': own.master,
      'weights': basedir.weights_hash(base_dir),
    },
    'template': hashlib.sha256(template.encode()).hexdigest(),
    'tokenizer': _sha256(base_dir / 'tokenizer.json'),
  }


def check_examples(examples: chat.Examples, model: decoder.Decoder) -> None:
  """Raises ValueError for tokens or positions that the model does not have."""
  if not len(examples):
    return
  top, longest = int(examples.tokens.max()), int(examples.lengths.max())
  if top >= model.config.V:
    raise ValueError(
      f'the tokenizer made token {top}; the embedding has {model.config.V} '
      'rows. Tokenizer and model do not belong together.'
    )
  if longest > model.config.max_positions:
    where = examples.where[int(examples.lengths.argmax())]
    raise ValueError(
      f'{where} has {longest} tokens; the model has '
      f'{model.config.max_positions} positions. Set config.data.max_tokens.'
    )


def check_fit(config, mesh) -> None:
  """Raises ValueError where the devices cannot share the batch."""
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  rows = config.batch.rows // config.batch.accumulate
  if rows % parts:
    raise ValueError(
      f'config.batch: {config.batch.rows} rows in {config.batch.accumulate} '
      f'micro-batches are {rows} rows each, which the {parts} devices along '
      'data x fsdp cannot share; make it a multiple.'
    )


def _data(config, tokenizer, stop_ids, model):
  """(data, source). Raises one ValueError with all that is wrong with rows."""
  data = dataset.load(config, tokenizer, stop_ids)
  data.faults.raise_any('cannot train on this data')
  check = functools.partial(check_examples, model=model)
  check(data.examples)
  process = jax.process_index(), jax.process_count()
  if config.data.access == 'stream':
    source = batches.streamed(config, tokenizer, stop_ids, process, check)
    return data, source
  return data, batches.source(config, data, process)


def _epoch_steps(source) -> float:
  """Steps of an epoch, with their fraction; of a stream, nobody knows."""
  rows = source.rows_per_epoch
  return math.nan if rows is None else rows / source.rows


def _sha256(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()
