"""Logits and renderings by transformers and peft, in a process of their own.

`python -m tuner.artifacts.theirs REQUEST ANSWER` reads a JSON request and
writes an .npz. The process computes on CPU in float32, and takes its memory
and its libraries with it when it ends.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np


def main(request_file: str, answer_file: str) -> None:
  """For each job: `NAME.i` logits of sequence i, and `NAME` its renderings."""
  request = json.loads(pathlib.Path(request_file).read_text(encoding='utf-8'))
  found: dict[str, Any] = {}
  for job in request['jobs']:
    name, faults = job['format'], []
    try:
      logits = _logits(job, request['sequences'], request['starts'])
      found |= {f'{name}.{i}': x for i, x in enumerate(logits)}
    except Exception as error:  # Whatever a library says is for the report.
      faults.append(f'cannot be loaded: {_first_line(error)}')
    rendered = _renderings(job['path'], request['prompts'])
    said = json.dumps({'faults': faults, 'renderings': rendered})
    found[name] = np.frombuffer(said.encode(), np.uint8)
  np.savez(answer_file, **found)


def _logits(job, sequences, starts):
  """float32 [answer, V] of each sequence."""
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    job['base'] or job['path'], dtype='float32', trust_remote_code=False,
    use_safetensors=True, local_files_only=True,
  )  # fmt: skip
  if job['base']:
    import peft

    model = peft.PeftModel.from_pretrained(model, job['path'])
  model.eval().requires_grad_(False)
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    job['path'], trust_remote_code=False, local_files_only=True
  )
  found = []
  for ids, start in zip(sequences, starts, strict=True):
    given = tokenizer.pad({'input_ids': [ids]}, return_tensors='pt')
    logits = model(input_ids=given['input_ids'], use_cache=False).logits
    found.append(logits[0, start - 1 : -1].float().numpy())
  return found


def _renderings(path, prompts):
  """Of each prompt, its ids; a string says why there are none."""
  import transformers

  found: list[list[int] | str] = []
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path, trust_remote_code=False, local_files_only=True
    )
  except Exception as error:
    return [_first_line(error)] * len(prompts)
  for prompt in prompts:
    try:
      found.append(_ids(tokenizer, prompt))
    except Exception as error:  # A template may raise anything.
      found.append(_first_line(error))
  return found


def _ids(tokenizer, prompt):
  if not prompt['messages']:
    return tokenizer(prompt['text'])['input_ids']
  text = tokenizer.apply_chat_template(
    prompt['messages'],
    tools=prompt['tools'] or None,
    tokenize=False,
    add_generation_prompt=True,
    date_string=prompt['date'],
  )
  return tokenizer(text, add_special_tokens=False)['input_ids']


def _first_line(error):
  lines = f'{type(error).__name__}: {error}'.strip().splitlines()
  return lines[0][:300]


if __name__ == '__main__':
  main(*sys.argv[1:])
