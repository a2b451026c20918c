"""Each format read again by our own code, and what is in it that should not be.

A reader returns weights by path, as the state in memory would hold them, and
adds to the check what differs from what was to be written.
"""

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
from tuner.artifacts import export, prompts, verify
from tuner.artifacts import trained as trained_lib
from tuner.data import template as template_lib
from tuner.models import hub

Trained = trained_lib.Trained

# float32 vectors that a format adds 1 to and takes it away again lose this.
ROUNDED = 3e-7


def adapter(
  path: pathlib.Path, trained: Trained, check: verify.Check
) -> Mapping[str, Any]:
  """The base of the state in memory with the adapter of the directory."""
  for name, wanted in export.adapter_records(trained).items():
    _compare_json(check, path / name, wanted)
  found = safetensors.numpy.load_file(path / read.WEIGHTS)
  adaptation = trained.adaptation
  assert isinstance(adaptation, low_rank.LowRank)
  wanted = peft.tensors(trained.model, adaptation, trained.trainable)
  _count(check, found, wanted)
  stored = read.adapter(trained.rows, trained.model.config.sizes, str(path))
  values = {
    name: jax.device_put(
      value.astype(trained.config.model.master),
      trained.trainable[name].sharding,
    )
    for name, value in stored.values.items()
  }
  return adaptation.attach(dict(trained.frozen), values)


def model(
  path: pathlib.Path, trained: Trained, check: verify.Check
) -> Mapping[str, Any]:
  """The directory's weights."""
  _compare_json(check, path / 'config.json', export.written_config(trained))
  values = trained.load(path)
  _compare_values(check, trained, values)
  return values


def orbax(
  path: pathlib.Path, trained: Trained, check: verify.Check
) -> Mapping[str, Any]:
  """The arrays as plain orbax restores them."""
  described = export.described(trained)
  _compare_json(check, path / 'weights.json', described)
  _compare_json(check, path / 'config.json', export.written_config(trained))
  with ocp.PyTreeCheckpointer() as checkpointer:
    values = checkpointer.restore((path / 'weights').absolute())
  _compare_values(check, trained, values)
  return {p: _placed(trained, p, values[p]) for p in trained.rows}


def _placed(trained: Trained, path: str, value: Any) -> jax.Array:
  row, sizes = trained.rows[path], trained.model.config.sizes
  place = mesh_lib.sharding(trained.mesh, row.dims, row.shape(sizes))
  return jax.device_put(value.astype(trained.config.model.dtype), place)


def gguf(
  path: pathlib.Path, trained: Trained, check: verify.Check
) -> Mapping[str, Any]:
  """The file's weights, by way of a Hugging Face directory."""
  from tuner.llamacpp import read as gguf_read

  with tempfile.TemporaryDirectory(dir=path) as folder:
    source = pathlib.Path(folder) / 'source'
    gguf_read.convert(path / export.gguf_name(trained), source, 'float32')
    values = trained.load(source)
    tensors = hub.Tensors(source)
    sizes, wrong = trained.model.config.sizes, 0
    for path_, row in trained.rows.items():
      host = export.on_host(trained, path_, 'float32')
      for name, wanted in hub.hf_tensors(row, host, sizes):
        found = tensors.slice_of(name)[:]
        wrong += not _is_gguf(found, wanted, check.dtype)
    _set_weights(check, wrong)
    _compare_tokens(check, source, trained)
  return values


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


READERS: dict[str, Callable[..., Mapping[str, Any]]] = {
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
  try:
    values = READERS[name](path, trained, found)
  except Exception as error:  # Of a damaged file, libraries raise anything.
    reason = (str(error).splitlines() or [''])[0]
    found.faults.append(f'cannot be read: {type(error).__name__}: {reason}')
    return found
  runner = trained.filled(values)
  logits = verify.predictions(runner, wanted.sequences, wanted.starts)
  verify.compare(found, wanted, logits, trained.config.model.dtype)
  return found


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


def _compare_values(check, trained, values) -> None:
  """Counts weights that are not those to be written, by path."""
  wrong = 0
  for path in trained.rows:
    found = np.asarray(values[path])
    wanted = export.on_host(trained, path, trained.dtype).astype(found.dtype)
    wrong += not np.array_equal(found, wanted)
  _set_weights(check, wrong)


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
