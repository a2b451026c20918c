"""Each format read again by our own code, and what is in it that should not be.

A reader compares the files with what was to be written, tensor by tensor on the
host, and adds what differs to the check. It returns how to load the weights by
path, as the state in memory would hold them, for whoever has room for them.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from tuner import mesh as mesh_lib
from tuner.adapters import low_rank, peft, read
from tuner.artifacts import declared, export, prompts, room, verify
from tuner.artifacts import trained as trained_lib
from tuner.data import template as template_lib
from tuner.models import hub

Trained = trained_lib.Trained
Load = Callable[[], Mapping[str, Any]]

# float32 vectors that a format adds 1 to and takes it away again lose this.
ROUNDED = 3e-7


def adapter(
  path: pathlib.Path,
  trained: Trained,
  check: verify.Check,
  stack: contextlib.ExitStack,
) -> Load:
  """The base of the state in memory with the adapter of the directory."""
  del stack
  for name, wanted in export.adapter_records(trained).items():
    _compare_json(check, path / name, wanted)
  found = safetensors.numpy.load_file(path / read.WEIGHTS)
  adaptation = trained.adaptation
  assert isinstance(adaptation, low_rank.LowRank)
  wanted = peft.tensors(trained.model, adaptation, trained.trainable)
  _count(check, found, wanted)
  stored = read.adapter(trained.rows, trained.model.config.sizes, str(path))

  def load():
    values = {
      name: jax.device_put(
        value.astype(trained.config.model.master),
        trained.trainable[name].sharding,
      )
      for name, value in stored.values.items()
    }
    return adaptation.attach(dict(trained.frozen), values)

  return load


def model(
  path: pathlib.Path,
  trained: Trained,
  check: verify.Check,
  stack: contextlib.ExitStack,
) -> Load:
  """The directory's weights."""
  del stack
  _compare_json(check, path / 'config.json', export.written_config(trained))
  _compare_declared(check, trained, path)
  held = hub.Tensors(path)

  def is_same(name, wanted):
    found = held.slice_of(name)[...]
    return found.dtype == wanted.dtype and np.array_equal(found, wanted)

  _compare_tensors(check, trained, held, trained.dtype, is_same)
  return lambda: trained.load(path)


def orbax(
  path: pathlib.Path,
  trained: Trained,
  check: verify.Check,
  stack: contextlib.ExitStack,
) -> Load:
  """The arrays as plain orbax restores them, one at a time."""
  described = export.described(trained)
  _compare_json(check, path / 'weights.json', described)
  _compare_json(check, path / 'config.json', export.written_config(trained))
  _compare_declared(check, trained, path)
  checkpointer = stack.enter_context(ocp.PyTreeCheckpointer())
  place = (path / 'weights').absolute()

  def one(name):
    args = ocp.args.PyTreeRestore(
      item={name: 0},
      restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
      partial_restore=True,
    )
    return checkpointer.restore(place, args=args)[name]

  there = set(checkpointer.metadata(place).item_metadata.tree)
  wrong = len(there ^ trained.rows.keys())
  for name in there & trained.rows.keys():
    found, wanted = one(name), export.on_host(trained, name, trained.dtype)
    same = found.dtype == wanted.dtype
    wrong += not (same and np.array_equal(found, wanted))
  _set_weights(check, wrong)
  return lambda: {p: _placed(trained, p, one(p)) for p in trained.rows}


def _placed(trained: Trained, path: str, value: Any) -> jax.Array:
  row, sizes = trained.rows[path], trained.model.config.sizes
  place = mesh_lib.sharding(trained.mesh, row.dims, row.shape(sizes))
  dtype = row.kept_in or trained.config.model.dtype
  return jax.device_put(value.astype(dtype), place)


def gguf(
  path: pathlib.Path,
  trained: Trained,
  check: verify.Check,
  stack: contextlib.ExitStack,
) -> Load:
  """The file's weights, by way of a Hugging Face directory."""
  from tuner.llamacpp import read as gguf_read

  folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path))
  source = pathlib.Path(folder) / 'source'
  gguf_read.convert(path / export.gguf_name(trained), source, 'float32')
  _compare_declared(check, trained, source)
  held = hub.Tensors(source)

  def is_same(name, wanted):
    return _is_gguf(held.slice_of(name)[...], wanted, check.dtype)

  _compare_tensors(check, trained, held, 'float32', is_same)
  _compare_tokens(check, source, trained)
  return lambda: trained.load(source)


def _compare_tensors(check, trained, held, dtype, is_same) -> None:
  """Counts tensors that differ, are missing, or are there beyond those.

  The host holds one declared weight, and of the file one tensor.
  """
  sizes, wanted_names, wrong = trained.model.config.sizes, set(), 0
  for path, row in trained.rows.items():
    host = export.on_host(trained, path, dtype)
    for name, wanted in hub.hf_tensors(row, host, sizes):
      wanted_names.add(name)
      if name in held:
        wrong += not is_same(name, wanted)
        held.forget([name])
  wrong += len(wanted_names ^ set(held.names()))
  _set_weights(check, wrong)


def _compare_declared(check, trained, path: pathlib.Path) -> None:
  """Whether config.json, or a GGUF file's metadata, is of the same model."""
  found = hub.declare(path).config
  if odd := declared.differences(found, trained.model.config):
    more = f' and {len(odd) - 3} more' * (len(odd) > 3)
    check.faults.append(
      f'another model is declared: {"; ".join(odd[:3])}{more}'
    )


def _is_gguf(found: np.ndarray, wanted: np.ndarray, dtype: str) -> bool:
  """Whether it is `wanted` in float32, the file's dtype, or what fits both."""
  for kept in _kept(wanted, dtype):
    if found.shape == kept.shape and np.array_equal(found, kept):
      return True
  return wanted.ndim == 1 and bool(
    (abs(found - wanted) <= ROUNDED * np.maximum(1, abs(wanted))).all()
  )


def _kept(wanted: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
  """What a GGUF file of that dtype may hold of a tensor."""
  yield wanted
  if dtype in ('f16', 'q8_0'):
    yield wanted.astype('float16').astype('float32')
  if dtype == 'bf16':
    yield wanted.astype('bfloat16').astype('float32')
  if dtype == 'q8_0' and wanted.shape[-1] % 32 == 0:
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    yield gguf.dequantize(gguf.quantize(wanted, kind), kind)


READERS: dict[str, Callable[..., Load]] = {
  'adapter': adapter,
  'model': model,
  'gguf': gguf,
  'orbax': orbax,
}


def check(
  name: str, path: pathlib.Path, trained: Trained, wanted: verify.Reference
) -> verify.Check:
  """What our own code finds in one directory."""
  dtype = {
    'adapter': 'float32',
    'gguf': trained.config.export.gguf_dtype,
  }.get(name, trained.dtype)
  found = verify.Check(name, 'tuner', dtype)
  files(path, trained, found)
  with contextlib.ExitStack() as stack:
    try:
      load = READERS[name](path, trained, found, stack)
      _predict(found, load, trained, wanted)
    except Exception as error:  # Of a damaged file, libraries raise anything.
      reason = (str(error).splitlines() or [''])[0]
      found.faults.append(f'cannot be read: {type(error).__name__}: {reason}')
  return found


def _predict(check, load: Load, trained, wanted) -> None:
  """Compares predictions, where devices hold the weights a second time."""
  if not wanted.logits:
    return
  is_whole = check.format != 'adapter'
  try:
    if is_whole and (reason := room.lacking(trained)):
      check.notes.append(f'{room.NOT_COMPARED} ({reason})')
      return
    runner = trained.filled(load())
    logits = verify.predictions(runner, wanted.sequences, wanted.starts)
  except jax.errors.JaxRuntimeError as error:
    if not room.is_exhausted(error):
      raise
    check.notes.append(room.NOT_COMPARED)
    return
  verify.compare(check, wanted, logits, trained.config.model.dtype)


def files(path: pathlib.Path, trained: Trained, check: verify.Check) -> None:
  """Compares all that is no weight with what was to be written."""
  wanted = dict(trained.companions()) if check.format != 'gguf' else {}
  wanted['prompts.jsonl'] = prompts.lines(trained.prompts[: prompts.SHOWN])
  for name, content in wanted.items():
    file = path / name
    if not file.is_file():
      check.faults.append(f'{name} is missing')
    elif file.read_bytes() != content:
      check.faults.append(f'{name} is not what was to be written')
  if check.format != 'gguf':
    _compare_tokens(check, path, trained)


def _compare_tokens(
  check: verify.Check, path: pathlib.Path, trained: Trained
) -> None:
  """Renders every prompt by the directory's own tokenizer; its stop ids."""
  try:
    tokenizer = template_lib.load_tokenizer(path)
    stop_ids = template_lib.stop_ids(path, tokenizer)
  except Exception as error:  # Of a broken file, libraries raise anything.
    check.prompts = 0
    reason = str(error).splitlines()[0] if str(error) else ''
    check.faults.append(f'the tokenizer cannot be read: {reason}')
    return
  lost = set(trained.stop_ids) - set(stop_ids)
  # A GGUF file names one end of text and one of a turn.
  if lost and (check.format != 'gguf' or lost == set(trained.stop_ids)):
    check.faults.append(
      f'generation does not end at {_listed(lost)}, as it was trained to; it '
      f'ends at {_listed(stop_ids)}'
    )
  ids = [_ids(prompt, tokenizer) for prompt in trained.prompts]
  verify.compare_prompts(check, trained.prompts, ids)


def _ids(prompt, tokenizer):
  try:
    return prompts.again(prompt, tokenizer).ids
  except ValueError as error:
    return str(error)


def _listed(ids) -> str:
  return ', '.join(map(str, sorted(ids)))


def _count(check, found, wanted) -> None:
  """Counts tensors that differ, are missing, or are there beyond those."""
  wrong = len(found.keys() ^ wanted.keys())
  for name in found.keys() & wanted.keys():
    same = found[name].dtype == wanted[name].dtype
    wrong += not (same and np.array_equal(found[name], wanted[name]))
  _set_weights(check, wrong)


def _set_weights(check: verify.Check, wrong: int) -> None:
  check.weights = wrong
  if wrong:
    check.faults.append(f'{wrong} weights are not what was to be written')


def _compare_json(check, file: pathlib.Path, wanted: Any) -> None:
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    check.faults.append(f'{file.name} cannot be read: {error}')
    return
  if found != json.loads(json.dumps(wanted)):
    check.faults.append(f'{file.name} is not what was to be written')
