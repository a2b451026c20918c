"""Export: a PEFT adapter directory and a merged Hugging Face directory.

The tokenizer, its template and the generation config travel with the weights.
A directory is written beside its place and renamed into it, so that there is
never half an export.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from tuner import adapt
from tuner.models import decoder, hub, weights

# What a served model needs beside its weights; copied as it is.
COMPANIONS = (
  'tokenizer.json',
  'tokenizer_config.json',
  'tokenizer.model',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)


def write_adapter(
  path: pathlib.Path,
  base_dir: pathlib.Path,
  model: decoder.Decoder,
  adaptation: adapt.LoraAdaptation,
  trainable: Mapping[str, Any],
  base_name: str,
  revision: str | None = None,
  template: str | None = None,
) -> None:
  """Writes a LoRA as `peft` does, so that PeftModel.from_pretrained loads it.

  base_name is where `peft` looks for the base: a hub id or a directory.
  template: the chat template, where it is not the base's own.
  """
  tensors = adapter_tensors(model, adaptation, trainable)
  with _renamed(path) as scratch:
    safetensors.numpy.save_file(
      tensors, scratch / 'adapter_model.safetensors', {'format': 'pt'}
    )
    config = adapter_config(adaptation, base_name, revision)
    _write_json(scratch / 'adapter_config.json', config)
    _write_companions(base_dir, scratch, template)


def adapter_tensors(
  model: decoder.Decoder,
  adaptation: adapt.LoraAdaptation,
  trainable: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """lora_A [R, in] and lora_B [out, R] of each layer, by their `peft` names."""
  sizes, tensors = model.config.sizes, {}
  for path in adaptation.targets:
    row = adaptation.rows[path]
    for factor, letters in (('a', row.inputs), ('b', row.outputs)):
      value = np.asarray(trainable[f'{path}.{factor}'])
      # HF fuses the letters of a side in the layout's order, not in ours.
      group = row.groups[1] if factor == 'a' else row.groups[0]
      order = [0, *(1 + letters.index(d) for d in group)]
      side = 'lora_A' if factor == 'a' else 'lora_B'
      for index, name in row.names(sizes).items():
        matrix = value[index].transpose(order).reshape(adaptation.rank, -1)
        matrix = matrix if factor == 'a' else matrix.T
        module = name.removesuffix('.weight')
        key = f'base_model.model.{module}.{side}.weight'
        tensors[key] = np.ascontiguousarray(matrix, np.float32)
  return tensors


def adapter_config(
  adaptation: adapt.LoraAdaptation, base_name: str, revision: str | None
) -> dict[str, Any]:
  """adapter_config.json; `peft` computes the scale from alpha, r and rslora."""
  modules = {
    adaptation.rows[path].hf.removesuffix('.weight').rpartition('.')[2]
    for path in adaptation.targets
  }
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_name,
    'revision': revision,
    'r': adaptation.rank,
    'lora_alpha': adaptation.scale * adaptation.rank,
    'lora_dropout': adaptation.dropout,
    'use_rslora': False,  # alpha above already holds the scale in use.
    'use_dora': False,
    'target_modules': sorted(modules),
    'bias': 'none',
    'fan_in_fan_out': False,
    'modules_to_save': None,
    'inference_mode': True,
    'init_lora_weights': True,
  }


def write_model(
  path: pathlib.Path,
  base_dir: pathlib.Path,
  model: decoder.Decoder,
  attached: Mapping[str, Any],
  dtype: str = 'float32',
  template: str | None = None,
) -> None:
  """Writes the merged model as a Hugging Face directory; see write_adapter."""
  declared = weights.rows(model)
  with _renamed(path) as scratch:
    config = hub.read_config(base_dir)
    config.pop('torch_dtype', None)
    config['dtype'] = dtype
    _write_json(scratch / 'config.json', config)
    _write_companions(base_dir, scratch, template)
    hub.write(
      scratch, model, lambda p: adapt.merge(declared, attached, p), dtype
    )


@contextlib.contextmanager
def _renamed(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A scratch directory that becomes `path` when the block succeeds."""
  scratch = path.with_name(f'.{path.name}.tmp')
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir(parents=True)
  try:
    yield scratch
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  old = path.with_name(f'.{path.name}.old')
  shutil.rmtree(old, ignore_errors=True)
  if path.exists():
    path.rename(old)
  os.replace(scratch, path)
  shutil.rmtree(old, ignore_errors=True)


def _write_companions(
  base_dir: pathlib.Path, target: pathlib.Path, template: str | None
) -> None:
  for name in COMPANIONS:
    if (base_dir / name).is_file():
      shutil.copyfile(base_dir / name, target / name)
  if template is None:
    return
  (target / 'chat_template.jinja').write_text(template, encoding='utf-8')
  file = target / 'tokenizer_config.json'
  if file.is_file():  # Older readers look for it there.
    config = json.loads(file.read_text(encoding='utf-8'))
    _write_json(file, {**config, 'chat_template': template})


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
