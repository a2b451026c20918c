"""What writes each format into an empty directory.

Beside the weights go the tokenizer, its template, the generation config,
rendered prompts and a model card: all that whoever serves the model needs.
"""

import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from tuner.adapters import base as base_lib
from tuner.adapters import low_rank, peft
from tuner.artifacts import card, folders, prompts
from tuner.artifacts import trained as trained_lib
from tuner.models import hub, tensors, weights

Trained = trained_lib.Trained
Done = Mapping[str, pathlib.Path]  # directories written before, by format

BYTES = {
  'float32': 4,
  'bfloat16': 2,
  'float16': 2,
  'f32': 4,
  'f16': 2,
  'bf16': 2,
  'q8_0': 34 / 32,  # a block of 32 numbers and its scale
}
OTHER_BYTES = 2**20  # of cards, prompts and headers


def needed_bytes(name: str, trained: Trained) -> int:
  """What a format takes on the disk, by the declaration and a little more."""
  sizes, own = trained.model.config.sizes, trained.config.export
  count = weights.count(trained.rows, sizes)
  rest = OTHER_BYTES + sum(map(len, trained.companions().values()))
  if name == 'adapter':
    shapes = trained.adaptation.shapes(sizes).values()
    return rest + 4 * sum(map(math.prod, shapes))
  if name == 'gguf':
    # As float32, it is written before and read again after.
    # Vectors stay float32; of them there are few.
    return rest + 4 * count + int(count * BYTES[own.gguf_dtype])
  return rest + int(count * BYTES[trained.dtype])


def adapter(path: pathlib.Path, trained: Trained, done: Done) -> None:
  """A PEFT directory: the adapter alone, as `peft` writes it."""
  del done
  assert isinstance(trained.adaptation, low_rank.LowRank)
  values = peft.tensors(trained.model, trained.adaptation, trained.trainable)
  file = path / 'adapter_model.safetensors'
  # `save_file` would make a file that others may not read.
  file.write_bytes(safetensors.numpy.save(values, {'format': 'pt'}))
  for name, content in adapter_records(trained).items():
    folders.write_json(path / name, content)
  _write_rest(path, trained, 'adapter')


def adapter_records(trained: Trained) -> dict[str, Any]:
  """What `peft` and this program read beside an adapter, by file."""
  assert isinstance(trained.adaptation, low_rank.LowRank)
  config = peft.config(trained.adaptation, trained.base_name, trained.revision)
  base = {base_lib.KEY: trained.record['facts']['model']['weights']}
  return {'adapter_config.json': config, base_lib.RECORD: base}


def model(path: pathlib.Path, trained: Trained, done: Done) -> None:
  """A Hugging Face directory of the merged, or fully trained, model."""
  del done
  write_weights(path, trained, trained.dtype)
  _write_rest(path, trained, 'model')


def gguf(path: pathlib.Path, trained: Trained, done: Done) -> list[str]:
  """A GGUF file, made from a Hugging Face directory, and a Modelfile.

  What llama.cpp will do otherwise, in words.
  """
  from tuner.llamacpp import modelfile, write  # Needs an extra.

  own = trained.config.export
  source = done['model'] if _is_source(trained, done) else path / 'source'
  if source not in done.values():
    source.mkdir()
    write_weights(source, trained, 'float32')
    _write_companions(source, trained)
  file = path / gguf_name(trained)
  try:
    said = write.write(source, file, own.gguf_dtype, card.base_label(trained))
  except ValueError as error:  # The files that it speaks of are the base's.
    text = str(error).replace(str(source), str(trained.base_dir))
    raise ValueError(text) from error
  system = modelfile.text(source, file.name, trained.config.data.system)
  (path / 'Modelfile').write_text(system, encoding='utf-8')
  if source not in done.values():
    shutil.rmtree(source)
  _write_card(path, trained, 'gguf')
  return said['notes']


def gguf_name(trained: Trained) -> str:
  return f'model-{trained.config.export.gguf_dtype}.gguf'


def _is_source(trained: Trained, done: Done) -> bool:
  """Whether 'model' holds all that the GGUF file is to hold."""
  own = trained.config.export.gguf_dtype
  exact = {'float32', {'f16': 'float16', 'bf16': 'bfloat16'}.get(own)}
  return 'model' in done and trained.dtype in exact


def orbax(path: pathlib.Path, trained: Trained, done: Done) -> None:
  """`weights`, a flat dict of host arrays that plain orbax restores.

  weights.json says of each path its dims, and the Hugging Face tensors that it
  is. Arrays lie in files of their own, named by path. The host holds the whole
  model: orbax takes it at once.
  """
  del done
  host = {p: on_host(trained, p, trained.dtype) for p in trained.rows}
  place = (path / 'weights').absolute()
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  news = logging.getLogger('absl')
  news.addFilter(_is_news)
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(place, args=ocp.args.PyTreeSave(host))
  finally:
    news.removeFilter(_is_news)
  # It names this machine's directory, and nothing on a file system reads it.
  (place / 'commit_success.txt').unlink(missing_ok=True)
  folders.write_json(path / 'weights.json', described(trained))
  folders.write_json(path / 'config.json', written_config(trained))
  _write_rest(path, trained, 'orbax')


def _is_news(record: logging.LogRecord) -> bool:
  """False for the warning that there is nothing to merge, as was asked."""
  return record.filename != 'ocdbt_utils.py'


def described(trained: Trained) -> dict[str, Any]:
  """Of each path: shape, dims, and how it is laid out at Hugging Face."""
  sizes = trained.model.config.sizes
  return {
    path: {
      'dims': row.dims,
      'shape': row.shape(sizes),
      'hf_layout': row.layout,
      'hf_names': [
        [list(index), name] for index, name in row.names(sizes).items()
      ],
    }
    for path, row in trained.rows.items()
  }


# Each writes into a directory; what it returns, if anything, is to be told.
FORMATS: dict[
  str, Callable[[pathlib.Path, Trained, Done], Sequence[str] | None]
] = {
  'adapter': adapter,
  'model': model,
  'gguf': gguf,
  'orbax': orbax,
}


def on_host(trained: Trained, path: str, dtype: str) -> np.ndarray:
  """One merged weight as it is written."""
  dtype = trained.rows[path].kept_in or dtype
  return tensors.cast(np.asarray(trained.merged(path)), dtype, path)


def write_weights(path: pathlib.Path, trained: Trained, dtype: str) -> None:
  """config.json and the weights, merged one at a time."""
  folders.write_json(path / 'config.json', written_config(trained, dtype))
  shard = trained.config.export.max_shard_bytes
  hub.write(path, trained.model, trained.merged, dtype, shard)


def written_config(trained: Trained, dtype: str = '') -> dict[str, Any]:
  """config.json as it is written; it names the dtype of the weights."""
  config = hub.read_config(trained.base_dir)
  return hub.written_config(config, dtype or trained.dtype)


def _write_rest(path: pathlib.Path, trained: Trained, name: str) -> None:
  _write_companions(path, trained)
  _write_card(path, trained, name)


def _write_companions(path: pathlib.Path, trained: Trained) -> None:
  for name, content in trained.companions().items():
    (path / name).write_bytes(content)


def _write_card(path: pathlib.Path, trained: Trained, name: str) -> None:
  few = trained.prompts[: prompts.SHOWN]
  (path / 'prompts.jsonl').write_bytes(prompts.lines(few))
  (path / 'README.md').write_text(card.text(trained, name), encoding='utf-8')
