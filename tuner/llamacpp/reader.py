"""The tensors of a Hugging Face directory, by name."""

import json
import pathlib
import typing

import numpy as np

from tuner.models import tensors


class Reader:
  """The tensors of a Hugging Face directory; `names` maps each to its file."""

  def __init__(self, folder: pathlib.Path):
    """Raises ValueError where there is no safetensors file or one is broken."""
    self.folder = folder
    index = folder / 'model.safetensors.index.json'
    if index.exists():
      weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
      files = sorted(set(weight_map.values()))
    else:
      files = ['model.safetensors']
    self.names: dict[str, str] = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._open: tuple[str, typing.Any] = ('', None)
    for file in files:
      for name, shape, kind in self._described(file):
        if kind not in tensors.DTYPES:
          raise ValueError(
            f'{folder / file}: {name} is {kind}; known are '
            f'{", ".join(tensors.DTYPES)}.'
          )
        self.names[name] = file
        self._shapes[name] = shape

  def _described(self, file: str):
    import safetensors

    path = self.folder / file
    if not path.is_file():
      raise ValueError(f'{path} is missing.')
    try:
      with safetensors.safe_open(path, 'np') as opened:
        for name in opened.keys():
          part = opened.get_slice(name)
          yield name, tuple(part.get_shape()), part.get_dtype()
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{path}: not a whole safetensors file: {error}'
      ) from None

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def load(self, name: str) -> np.ndarray:
    """The tensor as it is stored."""
    import safetensors

    file = self.names[name]
    if self._open[0] != file:  # One at a time: its pages count as memory.
      opened = safetensors.safe_open(self.folder / file, 'np')
      self._open = (file, opened)
    return self._open[1].get_tensor(name)
