"""transformers and peft, asked in a process of their own (theirs.py)."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tuner.artifacts import trained as trained_lib
from tuner.artifacts import verify
from tuner.data import template as template_lib
from tuner.models import weights

Trained = trained_lib.Trained

READERS = {'adapter': 'peft', 'model': 'transformers'}
SHARE = 0.8  # of the memory that is free, to be used for a float32 model
TIMEOUT_S = 3600


def readers(formats, trained: Trained) -> tuple[dict[str, str], list[str]]:
  """({format: library} to be asked, why others are not)."""
  found, notes = {}, []
  needed = 4 * weights.count(trained.rows, trained.model.config.sizes)
  free = free_bytes()
  for name in formats:
    library = READERS.get(name)
    if library is None:
      continue
    absent = [n for n in ('torch', library) if not _is_installed(n)]
    if absent:
      notes.append(f'{name}: {library} was not asked; no {absent[0]} here')
    elif free is not None and needed > SHARE * free:
      notes.append(
        f'{name}: {library} was not asked; in float32 the model takes '
        f'{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free'
      )
    else:
      found[name] = library
  return found, notes


def _is_installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def free_bytes() -> int | None:
  """Memory that can be had without swapping; None where nobody says."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text(encoding='utf-8')
  except OSError:
    return None
  lines = dict(line.split(':', 1) for line in text.splitlines() if ':' in line)
  return int(lines['MemAvailable'].split()[0]) * 1024


def check(
  places: Mapping[str, pathlib.Path],
  libraries: Mapping[str, str],
  trained: Trained,
  wanted: verify.Reference,
) -> list[verify.Check]:
  """What they find in the formats of `libraries`; places: the directories."""
  if not libraries:
    return []
  jobs = [
    {
      'format': name,
      'path': str(places[name]),
      'base': str(trained.base_dir) if name == 'adapter' else None,
    }
    for name in libraries
  ]
  prompts = [
    {**dataclasses.asdict(p), 'date': template_lib.DATE}
    for p in trained.prompts
  ]
  request = {
    'jobs': jobs,
    'prompts': prompts,
    'sequences': wanted.sequences,
    'starts': wanted.starts,
  }
  found, fault = _ask(request)
  checks = []
  for name, library in libraries.items():
    dtype = 'float32' if name == 'adapter' else trained.dtype
    own = verify.Check(name, library, dtype)
    if fault:
      own.faults.append(fault)
    else:
      _fill(own, found, trained, wanted)
    checks.append(own)
  return checks


def _fill(own, found, trained, wanted) -> None:
  said = json.loads(found[own.format].tobytes())
  own.faults += said['faults']
  verify.compare_prompts(own, trained.prompts, said['renderings'])
  if not said['faults']:
    logits = [found[f'{own.format}.{i}'] for i in range(len(wanted.logits))]
    verify.compare(own, wanted, logits, trained.config.model.dtype)


def _ask(request: dict[str, Any]) -> tuple[dict[str, np.ndarray], str]:
  """(arrays, why there are none)."""
  with tempfile.TemporaryDirectory() as folder:
    asked, answer = (
      pathlib.Path(folder, 'q.json'),
      pathlib.Path(folder, 'a.npz'),
    )
    asked.write_text(json.dumps(request), encoding='utf-8')
    root = str(pathlib.Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = os.environ | {
      'PYTHONPATH': os.pathsep.join(paths),
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      'TRANSFORMERS_VERBOSITY': 'error',
    }
    command = [sys.executable, '-m', 'tuner.artifacts.theirs']
    command += [str(asked), str(answer)]
    try:
      done = subprocess.run(
        command, env=environment, capture_output=True, text=True,
        timeout=TIMEOUT_S,
      )  # fmt: skip
    except subprocess.TimeoutExpired:
      return {}, f'no answer within {TIMEOUT_S} s'
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ['no word'])[-1][:300]
      return {}, f'its process ended with {done.returncode}: {last}'
    with np.load(answer, allow_pickle=False) as arrays:
      return dict(arrays), ''
