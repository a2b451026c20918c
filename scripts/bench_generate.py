"""Measures generation beside `transformers.generate` and prints a table.

  python scripts/fetch_quickstart.py
  python scripts/bench_generate.py --rounds=3 --out=/tmp/bench_generate.json

Greedy answers of one model in float32 to the same prompts, with the same stop
tokens, max_tokens and rows a batch. `transformers` gets its prompts sorted by
length and padded on the left, under torch.inference_mode. Each side is a
process of its own that stays; they take turns, one run each a round, so that a
noisy machine is as noisy for one as for the other. Prefill is a run of one
token a prompt, decode the rest of the whole run. Compilation is in the first,
untimed runs alone. Seconds are of the clock, and of all the process's threads.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path(
  os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
).expanduser()
SYSTEM = 'Extract the parts of the US address as JSON.'
SIDES = ('tuner', 'transformers')
CLOCKS = ('wall', 'cpu')


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's values."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default=str(CACHE / 'SmolLM2-135M-Instruct'))
  parser.add_argument(
    '--rows', default=str(CACHE / 'addresses.jsonl'),
    help='JSON Lines of input, or messages and tools; several by commas',
  )  # fmt: skip
  parser.add_argument('--prompts', type=int, default=128)
  parser.add_argument('--batch', type=int, default=32, help='rows at a time')
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--threads', type=int, default=len(os.sched_getaffinity(0))
  )
  parser.add_argument(
    '--bandwidth', type=float,
    help="GB/s of the device's memory: the share that decoding reaches",
  )  # fmt: skip
  parser.add_argument('--out', help='JSON file for every figure')
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  flags = parser.parse_args(argv)
  for name in ('prompts', 'batch', 'max_tokens', 'rounds', 'threads'):
    if getattr(flags, name) < 1:
      parser.error(f'--{name}={getattr(flags, name)}: at least 1.')
  for path in [flags.model, *flags.rows.split(',')]:
    if not os.path.exists(path):
      parser.error(f'{path} does not exist; see scripts/fetch_quickstart.py.')
  return flags


def read_prompts(flags: argparse.Namespace) -> tuple[list[list[int]], int]:
  """(token ids of each prompt, the stop token), rows of the files in turn."""
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(flags.model)
  files = [
    pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    for path in flags.rows.split(',')
  ]
  lines = [line for group in zip(*files, strict=False) for line in group]
  if len(lines) < flags.prompts:
    raise ValueError(f'--rows: {len(lines)} rows; wanted: {flags.prompts}.')
  prompts = []
  for line in lines[: flags.prompts]:
    messages = [
      {'role': 'system', 'content': SYSTEM},
      {'role': 'user', 'content': asked(json.loads(line))},
    ]
    prompts.append(
      tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
      )
    )
  return prompts, tokenizer.eos_token_id


def asked(row: dict) -> str:
  """What the user says in a row."""
  if 'input' in row:
    return row['input']
  tools = json.dumps(row['tools']) + '\n' if 'tools' in row else ''
  return tools + row['messages'][0]['content']


def serve(flags: argparse.Namespace) -> None:
  """One side: a run for each line of max_tokens on stdin, a JSON line each."""
  prompts, stop = read_prompts(flags)
  make = {'tuner': make_tuner, 'transformers': make_transformers}
  run = make[flags.side](flags, prompts, stop)
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    answers, steps = run(int(line))
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    print(json.dumps([seconds, answers, steps]), flush=True)


def make_tuner(flags, prompts, stop):
  """(max_tokens) -> (answers, steps of decoding)."""
  sys.path.insert(0, str(HERE.parent))
  from tuner.generate import engine, steps
  from tuner.models import hub, weights

  path = pathlib.Path(flags.model)
  model = hub.declare(path)
  filled = weights.fill(model, hub.load(path, model, dtype='float32'))
  decode, taken = steps.decode, []

  def counted(*args):
    found = decode(*args)
    taken.append(int(found[2].max()))
    return found

  steps.decode = counted

  def run(max_tokens):
    taken.clear()
    requests = [engine.Request(prompt, max_tokens) for prompt in prompts]
    answers = engine.generate(filled, requests, [stop], flags.batch)
    return [answer.ids for answer in answers], sum(taken)

  return run


def make_transformers(flags, prompts, stop):
  """The same by `transformers`."""
  import torch
  import transformers

  torch.set_num_threads(flags.threads)
  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    flags.model, dtype=torch.float32
  ).eval()
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

  def run(max_tokens):
    answers, steps = [None] * len(prompts), 0
    for start in range(0, len(order), flags.batch):
      batch = order[start : start + flags.batch]
      width = max(len(prompts[i]) for i in batch)
      ids = [[stop] * (width - len(prompts[i])) + prompts[i] for i in batch]
      seen = [
        [0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch
      ]
      with torch.inference_mode():
        out = model.generate(
          input_ids=torch.tensor(ids), attention_mask=torch.tensor(seen),
          max_new_tokens=max_tokens, do_sample=False, eos_token_id=stop,
          pad_token_id=stop,
        )  # fmt: skip
      steps += out.shape[1] - width - 1
      for i, row in zip(batch, out[:, width:].tolist(), strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        answers[i] = row[:end]
    return answers, steps

  return run


class Side:
  """A process of one side."""

  def __init__(self, flags: argparse.Namespace, side: str):
    env = os.environ | {'OMP_NUM_THREADS': str(flags.threads)}
    names = ('model', 'rows', 'prompts', 'batch', 'max_tokens', 'threads')
    given = [f'--{name}={getattr(flags, name)}' for name in names]
    self._process = subprocess.Popen(
      [sys.executable, __file__, f'--side={side}', *given],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip

  def run(self, max_tokens: int) -> list:
    """[[seconds, seconds of threads], answers, steps] of a run."""
    self._process.stdin.write(f'{max_tokens}\n')
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'a side ended with {self._process.wait()}.')
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def measure(flags: argparse.Namespace) -> dict:
  """Every figure of all rounds."""
  sides = {name: Side(flags, name) for name in SIDES}
  found = {name: {'first': [], 'prefill': [], 'all': []} for name in SIDES}
  try:
    for name, side in sides.items():
      for max_tokens in (1, flags.max_tokens):
        found[name]['first'].append(side.run(max_tokens)[0])
    for _ in range(flags.rounds):
      for name, side in sides.items():
        found[name]['prefill'].append(side.run(1)[0])
        seconds, answers, steps = side.run(flags.max_tokens)
        found[name]['all'].append(seconds)
        found[name] |= {'answers': answers, 'steps': steps}
  finally:
    for side in sides.values():
      side.close()
  return found


def table(flags: argparse.Namespace, found: dict) -> str:
  """The medians over rounds, of the clock and of threads, and their ratios."""
  lines = []
  for name, own in found.items():
    tokens = count(own['answers'])
    for kind in CLOCKS:
      whole, prefill = (median(own[part], kind) for part in ('all', 'prefill'))
      lines.append(
        f'{name:13}{kind:5} {tokens:6} tokens  {whole:7.2f} s '
        f'{tokens / whole:7.1f} tokens/s  prefill {prefill:6.2f} s  decode '
        f'{whole - prefill:6.2f} s, {own["steps"]} steps'
      )
    first = sum(s[0] for s in own['first'])
    later = median(own['all'], 'wall') + median(own['prefill'], 'wall')
    lines.append(f'{name:13}compiling: {first - later:.1f} s')
  ours, theirs = (found[name] for name in SIDES)
  more = count(ours['answers']) / count(theirs['answers'])
  for clock, kind in enumerate(CLOCKS):
    both = zip(ours['all'], theirs['all'], strict=True)
    ratios = sorted(more * their[clock] / own[clock] for own, their in both)
    lines.append(
      f'{kind}: {statistics.median(ratios):.2f} x the tokens/s (median of '
      f'{len(ratios)} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f})'
    )
  answers = list(zip(ours['answers'], theirs['answers'], strict=True))
  same = sum(own == their for own, their in answers)
  lines.append(f'{same} of {len(answers)} answers are the same')
  if flags.bandwidth:
    lines.append(bandwidth(flags, ours))
  return '\n'.join(lines)


def median(runs: list, kind: str) -> float:
  """Of the runs' seconds."""
  return statistics.median(run[CLOCKS.index(kind)] for run in runs)


def count(answers: list) -> int:
  """Tokens."""
  return sum(map(len, answers))


def bandwidth(flags: argparse.Namespace, own: dict) -> str:
  """The share of the memory's bandwidth that reading the weights takes.

  Once a step, in float32; what is read of the cache comes on top.
  """
  sys.path.insert(0, str(HERE.parent))
  from tuner.models import hub, weights

  model = hub.declare(pathlib.Path(flags.model))
  params = weights.count(weights.rows(model), model.config.sizes)
  whole, prefill = (median(own[part], 'wall') for part in ('all', 'prefill'))
  read = 4 * params * own['steps'] / (whole - prefill) / 1e9
  return (
    f'decoding reads {read:.1f} GB/s of weights, '
    f'{100 * read / flags.bandwidth:.0f} % of {flags.bandwidth:g} GB/s'
  )


def main() -> None:
  flags = parse_flags()
  if flags.side:
    serve(flags)
    return
  found = measure(flags)
  print(table(flags, found))
  if flags.out:
    pathlib.Path(flags.out).write_text(json.dumps(found))


if __name__ == '__main__':
  main()
