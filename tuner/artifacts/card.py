"""The model card: what was trained on what, what it scored, how to load it.

It says what the run's own files say and nothing else. Names that come from
data or from other models are untrusted text and are escaped.
"""

import json
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

import tuner
from tuner.adapters import low_rank, peft
from tuner.artifacts import trained as trained_lib
from tuner.models import hub
from tuner.report import escape

Trained = trained_lib.Trained

LIBRARIES = {
  'adapter': 'peft',
  'model': 'transformers',
  'gguf': 'gguf',
  'orbax': 'jax',
}
MADE_WITH = 'Made with tuner '  # by which an export is known
LICENCE_KEYS = ('license', 'license_name', 'license_link')
SECTIONS = ('adapt', 'objective', 'optimizer', 'schedule', 'batch', 'train')
# What acts at the start of a line alone is none of these: text stands within.
_MARKUP = re.compile(r'([\\`*_{}\[\]()#.!|<>&~$:@])')


def markdown(text: Any) -> str:
  """Untrusted text on one line, without a character that Markdown acts on."""
  return _MARKUP.sub(r'\\\1', escape.visible(text))


def text(trained: Trained, name: str) -> str:
  """README.md of one format."""
  base = base_label(trained)
  what = 'LoRA adapter' if name == 'adapter' else 'fine-tuned model'
  parts = [
    _front_matter(trained, name),
    f'# {markdown(base)}: {what}',
    _introduction(trained, base),
    '## Use',
    _use(trained, name),
    '## Training',
    _training(trained),
    '## Evaluation',
    _evaluation(trained),
  ]
  return '\n\n'.join(parts) + '\n'


def base_label(trained: Trained) -> str:
  """The base as a reader knows it; of a local one, its name here."""
  path = trained.config.model.path
  return pathlib.Path(path).expanduser().name if trained.is_base_local else path


def _front_matter(trained: Trained, name: str) -> str:
  """YAML that model hubs read; JSON strings are YAML strings."""
  adapt, objective = (
    trained.record['facts'][key]['name'] for key in ('adapt', 'objective')
  )
  lines = [*_licence(trained.base_dir)]
  if not trained.is_base_local and hub.is_id(trained.config.model.path):
    lines.append(f'base_model: {json.dumps(trained.config.model.path)}')
    relation = {'adapter': 'adapter', 'gguf': 'quantized'}.get(name, 'finetune')
    lines.append(f'base_model_relation: {relation}')
  lines += [
    f'library_name: {LIBRARIES[name]}',
    'pipeline_tag: text-generation',
    'tags:',
    *(f'- {json.dumps(tag)}' for tag in ('tuner', adapt, objective)),
  ]
  return '\n'.join(['---', *lines, '---'])


def _licence(base_dir: pathlib.Path) -> list[str]:
  """The lines on its licence of the base's own card, if it has any."""
  file = base_dir / 'README.md'
  if not file.is_file():
    return []
  read = file.read_text(encoding='utf-8', errors='replace')
  match = re.match(r'---\s*\n(.*?)\n---\s*(\n|$)', read, re.DOTALL)
  found = []
  for line in (match[1] if match else '').splitlines():
    key, _, value = line.partition(':')
    value = value.strip().strip('"\'')
    if key in LICENCE_KEYS and re.fullmatch(r'[\w.\-:/ ]{1,200}', value):
      found.append(f'{key}: {json.dumps(value)}')
  return found


def _introduction(trained: Trained, base: str) -> str:
  facts, record = trained.record['facts'], trained.record
  revision = trained.revision
  at = f' at revision `{revision}`' if revision else ''
  return (
    f'{MADE_WITH}{tuner.__version__} from {markdown(base)}{at}, '
    f'step {record["step"]} of {facts["steps"]}{_moved(record)}.\n\n'
    f'* sha256 of the weights of the base: `{facts["model"]["weights"]}`\n'
    f'* sha256 of the checkpoint: `{record["sha256"]}`\n\n'
    '`prompts.jsonl` holds conversations as this model is to see them: '
    'messages, the\nexact text, the token ids. A server must make the same of '
    'the same messages.'
  )


def _moved(record: Mapping[str, Any]) -> str:
  """Where between the base and the step the weights lie, if between."""
  alpha = record.get('alpha', 1.0)
  return '' if alpha == 1 else f', moved back to {alpha:g} of its way'


def _use(trained: Trained, name: str) -> str:
  """How to load it. DIR is where this directory lies."""
  base = 'BASE' if trained.is_base_local else trained.config.model.path
  revision = f', revision={trained.revision!r}' if trained.revision else ''
  python, shell = _USES[name]
  blocks = []
  if python:
    filled = python.format(base=json.dumps(base), revision=revision)
    blocks.append(f'```python\n{filled}\n```')
  if shell:
    filled = shell.format(
      base=shlex.quote(base),
      gguf=f'model-{trained.config.export.gguf_dtype}.gguf',
      rank=trained.record['facts']['adapt'].get('rank', 16),
    )
    blocks.append(f'```sh\n{filled}\n```')
  if name == 'adapter' and _has_parameters(trained):
    blocks.append(
      '`peft` warns that keys of `rank_pattern` or `alpha_pattern` did not '
      'match any\nmodule. They are those of experts, which it knows as '
      'parameters: it reads their\nranks from the pattern all the same.'
    )
  where = 'DIR is the directory of this file.'
  if '{base' in f'{python}{shell}' and trained.is_base_local:
    where = where[:-1] + ', BASE that of the base model.'
  return '\n\n'.join([where, *blocks])


def _has_parameters(trained: Trained) -> bool:
  """Whether the adapter has ranks or alphas of their own for parameters."""
  assert isinstance(trained.adaptation, low_rank.LowRank)
  said = peft.config(trained.adaptation, '', None)
  named = {**said['rank_pattern'], **said['alpha_pattern']}
  ends = [f'.{key}' for key in named]
  parameters = [f'.{key}' for key in said.get('target_parameters', ())]
  return any(
    one.endswith(end) or end.endswith(one) for one in parameters for end in ends
  )


_USES = {
  'adapter': (
    'import peft, transformers\n'
    'base = transformers.AutoModelForCausalLM.from_pretrained('
    '{base}{revision})\n'
    "model = peft.PeftModel.from_pretrained(base, 'DIR')\n"
    "tokenizer = transformers.AutoTokenizer.from_pretrained('DIR')",
    'vllm serve {base} --enable-lora --max-lora-rank {rank} '
    '--lora-modules tuned=DIR',
  ),
  'model': (
    'import transformers\n'
    "model = transformers.AutoModelForCausalLM.from_pretrained('DIR')\n"
    "tokenizer = transformers.AutoTokenizer.from_pretrained('DIR')",
    'vllm serve DIR',
  ),
  'gguf': (
    '',
    'llama-cli -m DIR/{gguf} --jinja\n'
    'llama-server -m DIR/{gguf} --jinja\n'
    'ollama create tuned -f DIR/Modelfile && ollama run tuned',
  ),
  'orbax': (
    'import orbax.checkpoint\n'
    'checkpointer = orbax.checkpoint.PyTreeCheckpointer()\n'
    "weights = checkpointer.restore('DIR/weights')  # path -> array; an "
    'absolute DIR',
    '',
  ),
}


def _training(trained: Trained) -> str:
  """Rows, tokens and the recipe, as the run recorded them."""
  lines = []
  check = _read(trained.workdir / 'check.json')
  if 'rows' in check:
    counts = ', '.join(f'{n:,} {side}' for side, n in check['rows'].items())
    lines.append(f'* Rows: {counts}')
  if check.get('loss'):
    loss = check['loss']
    lines.append(
      f'* Loss on {loss["trained"]:,} of {loss["total"]:,} tokens an epoch '
      f'({markdown(loss["what"])})'
    )
  if check.get('data'):
    lines.append(f'* sha256 of the training tokens: `{check["data"]}`')
  recipe = _read(trained.workdir / 'config.json')
  own = {key: recipe[key] for key in SECTIONS if key in recipe}
  if 'seed' in recipe:
    own['seed'] = recipe['seed']
  own['versions'] = trained.record['versions']
  lines += ['', 'The recipe:', '', _fenced(own)]
  return '\n'.join(lines)


def _fenced(value: Any) -> str:
  """JSON in a fence longer than any in it."""
  shown = '\n'.join(json.dumps({k: v}) for k, v in value.items())
  runs = [len(run) for run in re.findall('`+', shown)]
  fence = '`' * max(3, 1 + max(runs, default=0))
  return f'{fence}json\n{shown}\n{fence}'


def _evaluation(trained: Trained) -> str:
  """Scores of these very weights, with n and intervals."""
  step, last = trained.record['step'], trained.record['facts']['steps']
  alpha, folder = trained.record.get('alpha', 1.0), trained.workdir / 'eval'
  suite = f'test.{step}' if alpha == 1 else f'test.{step}.alpha{alpha:g}'
  tuned = _read(folder / f'{suite}.json').get('metrics', {})
  if not tuned and (step != last or alpha != 1):
    where = f'step {step} of {last}{_moved(trained.record)}'
    return f'Not measured: this is {where}.'
  if not tuned:
    return 'Not measured on held-out rows.'
  base = _read(folder / 'test.base.json').get('metrics', {})
  lines = [
    'On held-out rows; mean [95 % interval].',
    '',
    '| metric | base | this model | rows |',
    '|---|---|---|---|',
  ]
  for metric, score in tuned.items():
    before = _cell(base[metric]) if metric in base else ''
    row = (markdown(metric), before, _cell(score), f'{score["n"]:,}')
    lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines)


def _cell(score: Mapping[str, Any]) -> str:
  value, low, high = (float(score[key]) for key in ('value', 'low', 'high'))
  return f'{value:.3f} [{low:.3f}, {high:.3f}]'


def _read(file: pathlib.Path) -> dict[str, Any]:
  """A record of the run, {} where it is not there."""
  if not file.is_file():
    return {}
  return json.loads(file.read_text(encoding='utf-8'))
