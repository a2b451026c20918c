"""Asks a real llama.cpp what this program asks itself, and compares.

  python scripts/check_llamacpp.py HF_DIR MODEL.gguf PROMPTS.jsonl [--n=100]

HF_DIR answers greedily through `tuner`, the GGUF file through llama.cpp, which
the npm package node-llama-cpp ships: `npm install --ignore-scripts
node-llama-cpp` somewhere, and name that folder with --npm. A line of
PROMPTS.jsonl has a text under --field; it becomes a user's message in HF_DIR's
chat template. Printed, as JSON: how many answers are the same token for token,
and where the others first differ; how many texts have the same token ids.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from tuner.data import template
from tuner.generate import greedy
from tuner.models import hub, weights

NODE = pathlib.Path(__file__).with_name('check_llamacpp.mjs').resolve()


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name in ('hf_dir', 'gguf', 'prompts'):
    parser.add_argument(name, type=pathlib.Path)
  parser.add_argument('--n', type=int, default=100, help='prompts')
  parser.add_argument('--field', default='input', help='default: %(default)s')
  parser.add_argument('--system', help='a system message')
  parser.add_argument('--most', type=int, default=64, help='tokens an answer')
  parser.add_argument('--npm', default='.', help='where node-llama-cpp lies')
  own = parser.parse_args(argv)
  tokenizer = template.load_tokenizer(own.hf_dir)
  texts = read_texts(own.prompts, own.field, own.n)
  render = template.renderer(tokenizer)
  lead = [{'role': 'system', 'content': own.system}] if own.system else []
  rendered = [
    render([*lead, {'role': 'user', 'content': t}], add_generation_prompt=True)
    for t in texts
  ]
  backend = template.backend(tokenizer)
  ids = [encode(backend, text) for text in rendered]
  shown = [*rendered, *texts]
  requests = [{'text': text} for text in shown]
  requests += [{'ids': own_ids, 'most': own.most} for own_ids in ids]
  replies = ask(own.gguf, requests, own.npm)
  report = compare_ids(
    [encode(backend, text) for text in shown],
    [reply['ids'] for reply in replies[: len(shown)]],
  )
  theirs = [reply['answer'] for reply in replies[len(shown) :]]
  report |= compare_answers(
    answers(own.hf_dir, tokenizer, ids, own.most), theirs
  )
  print(json.dumps(report))


def read_texts(path, field, n):
  lines = path.read_text(encoding='utf-8').splitlines()[:n]
  return [json.loads(line)[field] for line in lines]


def encode(backend, text):
  return backend.encode(text, add_special_tokens=False).ids


def answers(hf_dir, tokenizer, ids, most):
  """Greedy answers of the directory's model, in float32."""
  model = hub.declare(hf_dir)
  model = weights.fill(model, hub.load(hf_dir, model))
  stops = template.stop_ids(hf_dir, tokenizer)
  return greedy.generate(model, ids, stops, most)


def ask(gguf, requests, npm):
  """llama.cpp's replies, one a request."""
  done = subprocess.run(
    ['node', str(NODE), str(gguf.resolve())],
    input=''.join(json.dumps(r) + '\n' for r in requests),
    capture_output=True,
    text=True,
    cwd=npm,
  )
  lines = done.stdout.splitlines()
  if done.returncode or len(lines) != len(requests):
    sys.exit(f'llama.cpp ended with {done.returncode}:\n{done.stderr[-2000:]}')
  return [json.loads(line) for line in lines]


def compare_ids(ours, theirs):
  same = [a == b for a, b in zip(ours, theirs)]
  return {'texts': len(same), 'texts_of_same_ids': sum(same)}


def compare_answers(ours, theirs):
  """How many are the same, and where the others first differ."""
  differ = [first_difference(a, b) for a, b in zip(ours, theirs) if a != b]
  n_same = sum(x == y for a, b in zip(ours, theirs) for x, y in zip(a, b))
  return {
    'answers': len(ours),
    'same_answers': len(ours) - len(differ),
    'tokens': sum(map(len, ours)),
    'tokens_in_place': n_same,
    'first_differences': sorted(differ),
  }


def first_difference(a, b):
  places = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
  return next(places, min(len(a), len(b)))


if __name__ == '__main__':
  main()
