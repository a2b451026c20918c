"""A Hugging Face directory -> a GGUF file for llama.cpp and Ollama.

Tensors are laid out from their shapes and then read, changed and quantised one
after another, so memory holds one tensor (of experts, one stack) at a time.
"""

import contextlib
import functools
import math
import os
import pathlib
import tempfile
import typing

import jax.numpy as jnp
import numpy as np

from tuner.llamacpp import architectures as arch_lib
from tuner.llamacpp import config as config_lib
from tuner.llamacpp import declaration, library, rope, tokens, vocabulary
from tuner.llamacpp import read as read_lib
from tuner.models import tensors as tensors_lib

# llama.cpp's name of a file's type, and of most of its tensors'.
FILE_TYPES = {
  'f32': ('ALL_F32', 'F32'),
  'f16': ('MOSTLY_F16', 'F16'),
  'bf16': ('MOSTLY_BF16', 'BF16'),
  'q8_0': ('MOSTLY_Q8_0', 'Q8_0'),
}
HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'
# What some checkpoints hold and every model computes.
COMPUTED = ('.rotary_emb.inv_freq', '.masked_bias')


def write(
  hf_dir: str | os.PathLike[str],
  file: str | os.PathLike[str],
  dtype: str = 'f16',
  name: str | None = None,
) -> dict[str, typing.Any]:
  """What was written: architecture, tensors, bytes, types, pre, notes.

  dtype: of the matrices, one of f32, f16, bf16, q8_0; norms, biases and routers
  stay float32, and rows that q8_0's blocks of 32 do not divide become float16.
  name: general.name; the directory's when None. notes: what llama.cpp will do
  otherwise than transformers, in words. The file appears whole or not at all.
  Raises ValueError naming what is missing or not known; FileExistsError.
  """
  if dtype not in FILE_TYPES:
    raise ValueError(f'dtype {dtype!r}: known are {", ".join(FILE_TYPES)}.')
  folder, file = pathlib.Path(hf_dir), pathlib.Path(file)
  if file.exists():
    raise FileExistsError(f'{file} already exists.')
  model = _Model(folder, dtype)
  file.parent.mkdir(parents=True, exist_ok=True)
  handle, scratch = tempfile.mkstemp(prefix=f'.{file.name}.', dir=file.parent)
  os.close(handle)
  try:
    report = model.write(pathlib.Path(scratch), name or folder.resolve().name)
    os.chmod(scratch, 0o666 & ~read_lib.umask())
    os.replace(scratch, file)
  except BaseException:
    pathlib.Path(scratch).unlink(missing_ok=True)
    raise
  return {**report, 'bytes': file.stat().st_size}


def check(base_dir: pathlib.Path) -> None:
  """Raises ValueError, naming files of a base, for what GGUF cannot hold.

  Known from config.json and the tokenizer's files; weights are not looked at,
  so that they may be missing, or quantised if they will not be when written.
  """
  _described(base_dir, is_dequantised=True)


class _Described(typing.NamedTuple):
  """What a directory says beside its weights; extra: tensors of the rope."""

  architecture: declaration.Architecture
  config: dict[str, typing.Any]
  meta: dict[str, typing.Any]
  extra: dict[str, np.ndarray]
  plan: list[declaration.Tensor]
  vocabulary: vocabulary.Vocabulary


def _described(
  folder: pathlib.Path, is_dequantised: bool = False
) -> _Described:
  if not folder.is_dir():
    raise ValueError(
      f'{folder} is not a directory; wanted: a Hugging Face model'
    )
  with _naming(folder):
    raw = vocabulary.read_json(folder / 'config.json')
    if is_dequantised:
      raw.pop('quantization_config', None)
    architecture = arch_lib.by_model_type(raw.get('model_type'))
    config, model = config_lib.normal(architecture, raw)
    meta = config_lib.to_metadata(architecture, config)
    meta |= rope.to_metadata(architecture, config, model.ropes)
    extra = rope.to_tensors(model.ropes[0])
    plan = declaration.tensors(architecture, config)
    words = vocabulary.of_folder(folder, model.V)
    words.notes.extend(config_lib.notes(architecture, config))
  return _Described(architecture, config, meta, extra, plan, words)


@contextlib.contextmanager
def _naming(folder: pathlib.Path) -> typing.Iterator[None]:
  """Errors raised within name the directory."""
  try:
    yield
  except (KeyError, ValueError) as error:
    text = str(error)
    text = text if str(folder) in text else f'{folder}: {text}'
    raise ValueError(text) from error


class _Part(typing.NamedTuple):
  """One GGUF tensor to be written, and the stored ones that it is made of."""

  name: str
  kind: str
  shape: tuple[int, ...]
  make: typing.Callable[[], np.ndarray]
  stored: tuple[str, ...] = ()


class _Model:
  """A directory understood: metadata, and how each tensor is made."""

  def __init__(self, folder: pathlib.Path, dtype: str):
    self.gguf = library.load()
    self.dtype = dtype
    said = _described(folder)
    self.architecture, self.config = said.architecture, said.config
    self.meta, self.extra, self.plan = said.meta, said.extra, said.plan
    self.vocabulary = said.vocabulary
    with _naming(folder):
      self.files = tensors_lib.Tensors(folder)
      self._check_names()
      self._check_shapes()
    self.heads = tuple(
      self.config[f'num_{k}_heads'] for k in ('attention', 'key_value')
    )

  def _check_names(self) -> None:
    wanted = {name for tensor in self.plan for name in tensor.hf}
    there = {
      n for n in self.files.names() if n in wanted or not n.endswith(COMPUTED)
    }
    if HEAD in there - wanted and self._is_embedding_again():
      there.remove(HEAD)
    declaration.check_names(self.architecture.model_types[0], wanted, there)

  def _check_shapes(self) -> None:
    rows = self._stored(EMBEDDING).shape[0]
    if rows != self.config['vocab_size']:
      raise ValueError(
        f'config.json: vocab_size: {self.config["vocab_size"]}; the '
        f'embedding has {rows} rows.'
      )
    for tensor in self.plan:
      for name in tensor.hf:
        if (found := self._stored(name).shape) != tensor.shape:
          raise ValueError(
            f'{name} has shape {found}; config.json implies {tensor.shape}.'
          )

  def _stored(self, name: str) -> tensors_lib.Stored:
    stored = self.files.slice_of(name)
    if stored.dtype not in tensors_lib.DTYPES:
      raise ValueError(
        f'{stored.file.path}: {name} is {stored.dtype}; known are '
        f'{", ".join(tensors_lib.DTYPES)}.'
      )
    return stored

  def _is_embedding_again(self) -> bool:
    pair = (HEAD, EMBEDDING)
    one, other = (self._stored(name)[...] for name in pair)
    return np.array_equal(one, other)

  def _parts(self) -> list[_Part]:
    parts = []
    for name, array in self.extra.items():
      parts.append(
        _Part(name, 'F32', array.shape, functools.partial(np.asarray, array))
      )
    for tensor in self.plan:
      for i, (own, shape) in enumerate(zip(tensor.gguf, tensor.gguf_shapes)):
        kind = self._kind(tensor, own, shape)
        make = functools.partial(self._make, tensor, i, kind)
        parts.append(_Part(own, kind, shape, make, tensor.hf))
    return parts

  def _kind(self, tensor: declaration.Tensor, name: str, shape) -> str:
    """The GGUF type: llama.cpp's code for vectors and routers wants float32."""
    is_matrix = len(shape) > 1 and name.endswith('.weight')
    if tensor.change.is_float32 or not is_matrix:
      return 'F32'
    kind = FILE_TYPES[self.dtype][1]
    return 'F16' if kind == 'Q8_0' and shape[-1] % 32 else kind

  def _make(self, tensor: declaration.Tensor, i: int, kind: str) -> np.ndarray:
    """The GGUF tensor's bytes, of one Hugging Face tensor or a stack."""

    def one(name: str) -> np.ndarray:
      hf = self._stored(name)[...]
      array = tensor.change.to_gguf(hf, self.heads)[i]
      return self._encoded(array, kind, name)

    if not tensor.is_stack:
      return one(tensor.hf[0])
    return np.stack([one(name) for name in tensor.hf])

  def _encoded(self, array: np.ndarray, kind: str, name: str) -> np.ndarray:
    if kind in tensors_lib.DTYPES:
      # The library knows no bfloat16 array: its bytes do.
      wanted = jnp.dtype(tensors_lib.DTYPES[kind])
      made = np.ascontiguousarray(tensors_lib.cast(array, wanted, name))
      return made.view(np.uint8) if kind == 'BF16' else made
    array = np.ascontiguousarray(array.astype(np.float32))
    if not np.isfinite(array).all():
      raise ValueError(f'{name} holds a number that is not finite.')
    kinds = self.gguf.GGMLQuantizationType
    return self.gguf.quants.quantize(array, kinds[kind])

  def write(self, path: pathlib.Path, name: str) -> dict[str, typing.Any]:
    writer = self.gguf.GGUFWriter(path, self.architecture.name)
    try:
      name = tokens.fitting_name(name, self.vocabulary.is_phi3)
      self._add_metadata(writer, name)
      parts = self._parts()
      for part in parts:
        self._add_info(writer, part)
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for part in parts:
        writer.write_tensor_data(part.make())
        self.files.forget(part.stored)
      writer.flush()
      os.fsync(writer.fout[0].fileno())
    finally:
      writer.close()
    types: dict[str, int] = {}
    for part in parts:
      types[part.kind] = types.get(part.kind, 0) + 1
    return {
      'architecture': self.architecture.name,
      'name': name,
      'tensors': len(parts),
      'types': types,
      'pre': self.vocabulary.meta[f'{tokens.PREFIX}pre'],
      'notes': self.vocabulary.notes,
    }

  def _add_metadata(self, writer, name: str) -> None:
    file_type = self.gguf.LlamaFileType[FILE_TYPES[self.dtype][0]]
    writer.add_type('model')
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
    own = {f'{self.architecture.name}.{k}': v for k, v in self.meta.items()}
    for key, value in {**own, **self.vocabulary.meta}.items():
      if isinstance(value, bool):
        writer.add_bool(key, value)
      elif isinstance(value, int):
        writer.add_uint32(key, value)
      elif isinstance(value, float):
        writer.add_float32(key, value)
      elif isinstance(value, str):
        writer.add_string(key, value)
      else:
        writer.add_array(key, value)

  def _add_info(self, writer, part: _Part) -> None:
    kind = self.gguf.GGMLQuantizationType[part.kind]
    block, size = self.gguf.GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(part.shape) // block * size
    writer.add_tensor_info(
      part.name, part.shape, np.dtype(np.float32), n_bytes, kind
    )
