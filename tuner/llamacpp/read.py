"""A GGUF file -> a Hugging Face directory, without torch.

Tensors are dequantised and written one after another, so memory holds one of
them at a time (of stacked experts, one expert) and not the model. What
llama.cpp changed on the way in is undone: see `changes`, `rope`, `bpe`, `spm`.
"""

import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
import typing

import jax.numpy as jnp
import numpy as np

from tuner.llamacpp import architectures as arch_lib
from tuner.llamacpp import changes as changes_lib
from tuner.llamacpp import config as config_lib
from tuner.llamacpp import declaration, library, rope, tokens
from tuner.models import shards
from tuner.models import tensors as tensors_lib

KEPT = {'F16': 'F16', 'BF16': 'BF16'}  # GGUF types that stay what they are.
KINDS = {dtype: kind for kind, dtype in tensors_lib.DTYPES.items()}
# Namespaces whose keys all mean something; others are notes of who made a file.
TOKENIZER, SPLIT = 'tokenizer.', 'split.count'


def convert(
  gguf_path: str | os.PathLike[str],
  out: str | os.PathLike[str],
  dtype: str = 'auto',
  shard_bytes: int = shards.MOST_BYTES,
) -> list[str]:
  """The names of the files written into `out`, a directory made here.

  dtype: of the weights, 'float32', 'float16' or 'bfloat16'; 'auto' keeps F16
  and BF16 tensors as they are and makes float32 of the others. The directory
  appears whole or not at all. Raises ValueError for a file that is not a whole
  GGUF, or holds what is not known here, by name; FileExistsError for `out`.
  """
  if dtype != 'auto' and dtype not in KINDS:
    raise ValueError(f'dtype {dtype!r}: known are auto, {", ".join(KINDS)}.')
  gguf_path, out = pathlib.Path(gguf_path), pathlib.Path(out)
  if out.exists():
    raise FileExistsError(f'{out} already exists.')
  try:
    model = _Model(gguf_path, dtype)
    tokenizer = tokens.of_metadata(model.fields, model.config)
  except (KeyError, ValueError) as error:
    raise ValueError(f'{gguf_path}: {_message(error)}') from error
  out.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent)
  )
  try:
    scratch.chmod(0o777 & ~umask())
    config = {**model.config, **tokenizer.ids, **model.dtypes}
    write_json(scratch / 'config.json', config)
    tokenizer.write(scratch)
    files = shards.write_files(scratch, model.entries(), shard_bytes)
    shards.write_index(scratch, files)
    names = sorted(path.name for path in scratch.iterdir())
    scratch.rename(out)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  return names


def umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask


def _message(error: Exception) -> str:
  if isinstance(error, KeyError):
    return f'metadata key {error.args[0]} is missing.'
  return str(error)


def write_json(path: pathlib.Path, value: typing.Any) -> None:
  text = json.dumps(value, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')


def open_gguf(path: pathlib.Path) -> typing.Any:
  """The library's reader of a file. Raises ValueError where it is broken."""
  gguf = library.load()
  if not path.is_file():
    raise ValueError('no such file.')
  if path.stat().st_size < 24:
    raise ValueError('not a GGUF file: too short.')
  with open(path, 'rb') as file:
    if (magic := file.read(4)) != b'GGUF':
      raise ValueError(f'not a GGUF file: it begins with {magic!r}.')
  try:
    return _checked(gguf)(path)
  except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
    raise ValueError(f'cut off or damaged: {error}') from error


@functools.cache
def _checked(gguf: typing.Any) -> type:
  """The library's reader, which says what it misses in a file that is cut."""

  class Checked(gguf.GGUFReader):
    def _get(self, offset, dtype, count=1, **others):
      self._check(int(offset) + np.dtype(dtype).itemsize * int(count))
      return super()._get(offset, dtype, count, **others)

    def _build_tensors(self, start_offs, fields):
      ends = [start_offs]
      for field in fields:
        *_, dims, kind, offset = field.parts
        kind = gguf.GGMLQuantizationType(kind[0])
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(map(int, dims)) // block * size
        ends.append(start_offs + int(offset[0]) + n_bytes)
      if fields:
        self._check(max(ends))
      super()._build_tensors(start_offs, fields)

    def _check(self, wanted: int) -> None:
      if wanted > len(self.data):
        raise ValueError(
          f'it has {len(self.data):,} bytes; wanted: at least {wanted:,}.'
        )

  return Checked


def float32_bytes(path: pathlib.Path) -> int:
  """What the tensors take as float32. Raises ValueError naming the file."""
  try:
    reader = open_gguf(path)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)


class _Model:
  """A GGUF file understood: its config and how each tensor is made."""

  def __init__(self, path: pathlib.Path, dtype: str):
    reader = open_gguf(path)
    self.dtype = dtype
    self.tensors = {t.name: t for t in reader.tensors}
    self.fields = {name: f.contents() for name, f in reader.fields.items()}
    self._check_kind()
    name = self.fields['general.architecture']
    prefix = f'{name}.'
    meta = {
      key.removeprefix(prefix): value
      for key, value in self.fields.items()
      if key.startswith(prefix)
    }
    experts = int(meta.get('expert_count', 0))
    self.architecture = arch_lib.by_name(name, experts > 0)
    extra = {
      name: self._dequantised(name)
      for name in rope.EXTRA
      if name in self.tensors
    }
    rows = self._rows()
    self.config = config_lib.of_metadata(
      self.architecture, meta, rows, extra, self.tensors
    )
    self.plan = declaration.tensors(self.architecture, self.config)
    declaration.check_names(
      self.architecture.name,
      {name for tensor in self.plan for name in tensor.gguf},
      {*self.tensors} - {*rope.EXTRA},
    )
    config_lib.check_whole(self.architecture, self.config)
    kind = self._kind('token_embd.weight', False)
    self.dtypes = dict.fromkeys(
      ['torch_dtype', 'dtype'], tensors_lib.DTYPES[kind]
    )
    self.heads = tuple(
      self.config[f'num_{k}_heads'] for k in ('attention', 'key_value')
    )

  def _check_kind(self) -> None:
    fields = self.fields
    if (kind := fields.get('general.type', 'model')) != 'model':
      raise ValueError(f"general.type is {kind!r}; wanted: 'model'.")
    if (parts := fields.get(SPLIT, 1)) > 1:
      raise ValueError(
        f'one of {parts} parts; join them with llama-gguf-split --merge.'
      )

  def _rows(self) -> int:
    """Of the embedding, which is as large as the vocabulary."""
    n_tokens = len(self.fields[f'{TOKENIZER}ggml.tokens'])
    if 'token_embd.weight' not in self.tensors:
      return n_tokens
    if (rows := self._shape('token_embd.weight')[0]) != n_tokens:
      raise ValueError(f'{n_tokens} tokens, and an embedding of {rows} rows.')
    return rows

  def _shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(self.tensors[name].shape))

  def _kind(self, name: str, is_computed: bool) -> str:
    if self.dtype != 'auto':
      return KINDS[self.dtype]
    own = self.tensors[name].tensor_type.name
    return 'F32' if is_computed else KEPT.get(own, 'F32')

  def _dequantised(self, name: str, expert: int | None = None) -> np.ndarray:
    """The tensor, or one expert's of it, in its own float type or float32."""
    gguf = library.load()
    tensor = self.tensors[name]
    data = tensor.data if expert is None else tensor.data[expert]
    if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
      return np.asarray(data)
    try:
      array = gguf.quants.dequantize(data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f'{name} is {tensor.tensor_type.name}: {error}'
      ) from None
    return array.astype(np.float32, copy=False)

  def entries(self) -> list[shards.Entry]:
    entries = (
      self._entry(tensor, i)
      for tensor in self.plan
      for i in range(len(tensor.hf))
    )
    return sorted(entries, key=lambda entry: entry.name)

  def _entry(self, tensor: declaration.Tensor, i: int) -> shards.Entry:
    change = tensor.change
    shapes = [self._shape(name)[tensor.is_stack :] for name in tensor.gguf]
    kind = self._kind(tensor.gguf[0], change is changes_lib.ONE_MORE)

    dtype = jnp.dtype(tensors_lib.DTYPES[kind])

    def make() -> np.ndarray:
      expert = i if tensor.is_stack else None
      parts = [self._dequantised(name, expert) for name in tensor.gguf]
      array = change.to_hf(parts, self.heads)
      return tensors_lib.cast(array, dtype, tensor.hf[i])

    return shards.Entry(tensor.hf[i], dtype, change.hf_shape(shapes), make)
