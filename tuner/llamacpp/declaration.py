"""The form of an architecture's declaration, and the tensors it comes to.

An `Architecture` says which metadata key is which key of config.json
(`fields`), what llama.cpp has built in, so that a config may not say otherwise
(`fixed`), and what is done to each weight (`rules`). Names of tensors are not
here: `gguf.get_tensor_name_map` maps Hugging Face's to GGUF's.
"""

import dataclasses
import typing

from tuner.llamacpp import changes, library


class Field(typing.NamedTuple):
  """A metadata key after the architecture's name, and its config.json key."""

  key: str
  config: str
  kind: type = int
  required: bool = True


class Rule(typing.NamedTuple):
  """One kind of tensor: its Hugging Face name and how llama.cpp changes it.

  hf: may hold {L}, the layer, and {E}, the expert; llama.cpp stacks experts.
  via: the names under which the name map knows its GGUF tensors; () is hf.
  when: the config key that must be true for the tensor to be there.
  """

  hf: str
  change: changes.Change = changes.SAME
  via: tuple[str, ...] = ()
  when: str = ''


@dataclasses.dataclass(frozen=True)
class Architecture:
  """name: llama.cpp's; model_types: config.json's, the first one is written.

  fixed: {key of config.json: (built in, what its absence means)}.
  period: of layers, where all but each period's last attend to a window.
  has_head_dim: whether config.json may say a head_dim other than D / N.
  """

  name: str
  model_types: tuple[str, ...]
  class_name: str
  rules: tuple[Rule, ...]
  fields: tuple[Field, ...] = ()
  fixed: typing.Mapping[str, tuple[object, object]] = dataclasses.field(
    default_factory=dict
  )
  period: int = 0
  has_head_dim: bool = False
  has_experts: bool = False
  permuted: bool = False
  written: typing.Mapping[str, object] = dataclasses.field(default_factory=dict)


class Tensor(typing.NamedTuple):
  """A rule in one layer: Hugging Face names (one an expert) and GGUF names."""

  rule: Rule
  hf: tuple[str, ...]
  gguf: tuple[str, ...]


def tensors(
  architecture: Architecture, layers: int, experts: int, flags: set[str]
) -> list[Tensor]:
  """All tensors of a model whose config says `flags`, in the rules' order."""
  return [
    _tensor(rule, layer, experts, names)
    for names in [_name_map(architecture, layers)]
    for rule in architecture.rules
    if not rule.when or rule.when in flags
    for layer in (range(layers) if '{L}' in rule.hf else [0])
  ]


def _tensor(rule: Rule, layer: int, experts: int, names) -> Tensor:
  hf: tuple[str, ...] = (rule.hf.replace('{L}', str(layer)),)
  if '{E}' in rule.hf:
    hf = tuple(hf[0].replace('{E}', str(e)) for e in range(experts))
  via = rule.via or (rule.hf.replace('.{E}', ''),)
  return Tensor(
    rule, hf, tuple(names(name.replace('{L}', str(layer))) for name in via)
  )


def _name_map(architecture: Architecture, layers: int):
  gguf = library.load()
  kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
  mapping = gguf.get_tensor_name_map(kinds[architecture.name], layers)

  def name(hf: str) -> str:
    found = mapping.get_name(hf, try_suffixes=('.weight', '.bias'))
    assert found, f'{architecture.name}: gguf has no name for {hf}'
    return found

  return name


def flags_of(
  architecture: Architecture, layers: int, present: typing.Container[str]
) -> set[str]:
  """The flags that the GGUF tensors of a file imply, any of each enough."""
  names = _name_map(architecture, layers)
  return {
    rule.when
    for rule in architecture.rules
    if rule.when
    if any(
      name in present
      for layer in range(layers)
      for name in _tensor(rule, layer, 0, names).gguf
    )
  }
