"""The form of an architecture's declaration, and the tensors it comes to.

An `Architecture` says which metadata key is which key of config.json
(`fields`), what llama.cpp has built in, so that a config may not say otherwise
(`fixed`), and which weights it changes (`rules`). Which weights there are is
said once, by the model's own declaration in `tuner.models`; their names here
are `gguf.get_tensor_name_map`'s of Hugging Face's.
"""

import dataclasses
import re
import typing

from tuner.llamacpp import changes, library
from tuner.models import families, weights

Config = typing.Mapping[str, typing.Any]


class Field(typing.NamedTuple):
  """A metadata key after the architecture's name, and its config.json key."""

  key: str
  config: str
  kind: type = int
  required: bool = True


class Rule(typing.NamedTuple):
  """How llama.cpp changes the weights whose Hugging Face names end in `hf`.

  via: what to put instead of that end, for each GGUF tensor, to have a name
  that the name map knows; () is the end itself.
  """

  hf: str
  change: changes.Change
  via: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Architecture:
  """name: llama.cpp's; model_types: config.json's, the first one is written.

  fixed: {key of config.json: (built in, what its absence means)}.
  biases: keys of config.json that a file says by the biases that it holds.
  period: of layers, where all but each period's last attend to a window.
  has_head_dim: whether config.json may say a head_dim other than D / N.
  """

  name: str
  model_types: tuple[str, ...]
  class_name: str
  rules: tuple[Rule, ...] = ()
  fields: tuple[Field, ...] = ()
  fixed: typing.Mapping[str, tuple[object, object]] = dataclasses.field(
    default_factory=dict
  )
  biases: tuple[str, ...] = ()
  period: int = 0
  has_head_dim: bool = False
  written: typing.Mapping[str, object] = dataclasses.field(default_factory=dict)

  @property
  def has_experts(self) -> bool:
    return any(field.key == 'expert_count' for field in self.fields)


class Tensor(typing.NamedTuple):
  """One layer of a declared weight: Hugging Face's tensors and GGUF's.

  hf: the names, one an expert where Hugging Face has those apart; llama.cpp
  has them in one (is_stack). shape: of each. gguf: one name, or two.
  """

  hf: tuple[str, ...]
  shape: tuple[int, ...]
  gguf: tuple[str, ...]
  change: changes.Change
  is_stack: bool

  @property
  def gguf_shapes(self) -> list[tuple[int, ...]]:
    lead = (len(self.hf),) if self.is_stack else ()
    return [(*lead, *own) for own in self.change.gguf_shapes(self.shape)]


def tensors(architecture: Architecture, config: Config) -> list[Tensor]:
  """All tensors of the model that a config.json declares, in its order.

  Raises ValueError for a config that `tuner.models` does not know.
  """
  # What is not said is what the family takes for granted.
  said = {key: value for key, value in config.items() if value is not None}
  model = families.decoder_of(said)
  name_of = _name_map(architecture, said['num_hidden_layers'])
  sizes, found = model.config.sizes, []
  for row in weights.rows(model).values():
    rule = _rule(architecture, row)
    names = list(row.names(sizes).values())
    is_stack = 'E' in row.stacked
    apart = sizes['E'] if is_stack else 1
    for i in range(0, len(names), apart):
      own = tuple(names[i : i + apart])
      known = tuple(name_of(via) for via in _via(rule, own[0]))
      shape = row.hf_shape(sizes)
      found.append(Tensor(own, shape, known, rule.change, is_stack))
  return found


def _rule(architecture: Architecture, row: weights.Row) -> Rule:
  fitting = (r for r in architecture.rules if row.hf.endswith(r.hf))
  return next(fitting, Rule('', changes.SAME))


def _via(rule: Rule, name: str) -> list[str]:
  """The names that the name map knows; experts have no number there."""
  name = re.sub(r'(\.experts)\.\d+', r'\1', name)
  return [name.removesuffix(rule.hf) + end for end in rule.via or (rule.hf,)]


def _name_map(architecture: Architecture, layers: int):
  gguf = library.load()
  kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
  mapping = gguf.get_tensor_name_map(kinds[architecture.name], layers)

  def name(hf: str) -> str:
    found = mapping.get_name(hf, try_suffixes=('.weight', '.bias'))
    assert found, f'{architecture.name}: gguf has no name for {hf}'
    return found

  return name


def check_names(
  what: str, wanted: typing.Iterable[str], there: typing.Iterable[str]
) -> None:
  """Raises one ValueError with all missing and all unknown tensors."""
  wanted, there = set(wanted), set(there)
  missing, unknown = sorted(wanted - there), sorted(there - wanted)
  if missing or unknown:
    raise ValueError(
      f'{what} tensors missing: {library.quote(missing) or "none"}; not known: '
      f'{library.quote(unknown) or "none"}.'
    )
