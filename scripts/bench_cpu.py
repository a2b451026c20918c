"""Measures tuner beside TRL + PEFT on this machine's CPU and prints a table.

  python scripts/fetch_quickstart.py
  python scripts/bench_cpu.py --rounds=3 --out=/tmp/bench_cpu.json

LoRA (r=16, alpha 32, every linear layer) and full fine-tuning of
SmolLM2-135M-Instruct in float32, AdamW at lr 1e-3, about 1,024 real tokens a
step, loss on the assistant's turn. Both sides read the same rows, each step
runs in a process of that side alone, and the sides alternate, so that a noisy
machine is as noisy for one as for the other. Real tokens are those that are
not padding; the first steps (compilation, caches) are not in the rate but in
"first step", which counts from the start of the process.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import typing

CACHE = pathlib.Path(
  os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
).expanduser()
HERE = pathlib.Path(__file__).resolve().parent
SYSTEM = 'Extract the parts of the US address as JSON.'
# PyTorch then asks for huge pages: 1 GB less resident memory in each of two
# pairs of runs, and no slower in either.
TRL_ENV = {'THP_MEM_ALLOC_ENABLE': '1'}
# The same of glibc, for the buffers of XLA.
TUNER_ENV = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
TRL_PACKAGES = ['torch==2.13.0', 'trl', 'peft', 'transformers', 'datasets']


@dataclasses.dataclass(frozen=True)
class Finished:
  """A child process that ended well."""

  stdout: str
  peak_rss_bytes: int
  first_step_s: float | None


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's values."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default=str(CACHE / 'SmolLM2-135M-Instruct'))
  parser.add_argument('--rows', default=str(CACHE / 'addresses.jsonl'))
  parser.add_argument('--methods', default='lora,full')
  parser.add_argument('--sides', default='tuner,trl')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--warmup', type=int, default=3, help='untimed steps')
  parser.add_argument('--steps', type=int, default=8, help='timed steps')
  parser.add_argument('--tokens', type=int, default=1024, help='a step')
  parser.add_argument('--lr', type=float, default=1e-3)
  parser.add_argument(
    '--threads', type=int, default=len(os.sched_getaffinity(0))
  )
  parser.add_argument('--trl_python', help='python of a TRL environment')
  parser.add_argument('--trl_layout', default='grouped')
  parser.add_argument('--out', help='JSON file for every figure')
  flags = parser.parse_args(argv)
  check_flags(flags)
  return flags


def check_flags(flags: argparse.Namespace) -> None:
  """Raises ValueError for a value that cannot be measured."""
  for name in ('model', 'rows'):
    if not os.path.exists(getattr(flags, name)):
      raise ValueError(
        f'--{name}={getattr(flags, name)} does not exist; '
        'run python scripts/fetch_quickstart.py first.'
      )
  for name in ('rounds', 'warmup', 'steps'):
    if getattr(flags, name) < 1:
      raise ValueError(f'--{name}={getattr(flags, name)}: at least 1.')
  known = {'methods': {'lora', 'full'}, 'sides': set(SIDES)}
  for name, allowed in known.items():
    wrong = set(getattr(flags, name).split(',')) - allowed
    if wrong:
      raise ValueError(
        f'--{name}: {sorted(wrong)} unknown; allowed: {sorted(allowed)}.'
      )


def as_messages(row: dict[str, typing.Any], where: str) -> dict:
  """`row` as {"messages": [...]} that begins with the system prompt."""
  if 'messages' in row:
    messages = list(row['messages'])
  elif 'prompt' in row and 'completion' in row:
    messages = turns(row['prompt'], row['completion'])
  elif 'input' in row and 'output' in row:
    messages = turns(row['input'], row['output'])
  else:
    raise ValueError(
      f'{where}: keys {sorted(row)}; wanted messages, or prompt and '
      'completion, or input and output.'
    )
  if messages[0]['role'] != 'system':
    messages.insert(0, {'role': 'system', 'content': SYSTEM})
  return {'messages': messages}


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
  """One user and one assistant turn."""
  return [
    {'role': 'user', 'content': prompt},
    {'role': 'assistant', 'content': answer},
  ]


def write_rows(source: str, target: pathlib.Path) -> pathlib.Path:
  """Writes the rows that both sides read, and returns their path."""
  with open(source, encoding='utf-8') as f, open(target, 'w') as g:
    for number, line in enumerate(f, 1):
      row = as_messages(json.loads(line), f'{source}:{number}')
      g.write(json.dumps(row) + '\n')
  return target


def find_trl_python(flags: argparse.Namespace) -> str:
  """The python of TRL's environment, which is made where it is absent."""
  if flags.trl_python:
    return flags.trl_python
  home = CACHE / 'venv-trl'
  python, ready = home / 'bin' / 'python', home / 'ready'
  if not ready.exists():
    print(f'making {home}', file=sys.stderr)
    subprocess.run([sys.executable, '-m', 'venv', '--clear', home], check=True)
    subprocess.run([python, '-m', 'pip', 'install', *TRL_PACKAGES], check=True)
    ready.touch()
  return str(python)


def run_child(
  command: list[str],
  where: pathlib.Path,
  threads: int,
  marker: pathlib.Path | None = None,
  extra_env: dict[str, str] | None = None,
) -> Finished:
  """Runs `command` alone; its memory is the kernel's figure for the process.

  first_step_s is when `marker` was first seen with a line in it, to 0.1 s.
  Raises RuntimeError with the end of stderr when the command fails.
  """
  env = os.environ | {
    'OMP_NUM_THREADS': str(threads),
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
  }
  env |= extra_env or {}
  out, err = where / 'stdout', where / 'stderr'
  start_s, first_step_s = time.monotonic(), None
  with open(out, 'w') as f, open(err, 'w') as g:
    child = subprocess.Popen(command, stdout=f, stderr=g, env=env)
    try:
      pid = 0
      while not pid:
        time.sleep(0.1)
        if first_step_s is None and marker and holds_a_line(marker):
          first_step_s = time.monotonic() - start_s
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
      child.returncode = os.waitstatus_to_exitcode(status)
    finally:
      if child.returncode is None:
        child.kill()
        child.wait()
  if child.returncode:
    raise RuntimeError(
      f'{" ".join(command)} exited {child.returncode}:\n'
      + err.read_text(errors='replace')[-3000:]
    )
  return Finished(out.read_text(), usage.ru_maxrss * 1024, first_step_s)


def holds_a_line(path: pathlib.Path) -> bool:
  """Whether the file exists and has a whole line."""
  return path.exists() and '\n' in path.read_text(errors='replace')


def run_trl(flags, method: str, rows: pathlib.Path, where: pathlib.Path):
  """The figures of one TRL run: bench_trl.py's last line, memory from here."""
  command = [find_trl_python(flags), str(HERE / 'bench_trl.py')]
  values = {
    'model': flags.model,
    'rows': rows,
    'method': method,
    'layout': flags.trl_layout,
    'tokens': flags.tokens,
    'warmup': flags.warmup,
    'steps': flags.steps,
    'lr': flags.lr,
    'threads': flags.threads,
  }
  command += [f'--{key}={value}' for key, value in values.items()]
  done = run_child(command, where, flags.threads, extra_env=TRL_ENV)
  figures = json.loads(done.stdout.strip().splitlines()[-1])
  return figures | {'peak_rss_bytes': done.peak_rss_bytes}


def run_tuner(flags, method: str, rows: pathlib.Path, where: pathlib.Path):
  """The figures of one tuner run, read from its metrics.jsonl."""
  workdir, config = where / 'run', where / 'config.py'
  metrics = workdir / 'metrics.jsonl'
  values = json.dumps(tuner_config(flags, method, rows))
  config.write_text(CONFIG_FILE.format(values=values))
  command = [sys.executable, '-m', 'tuner.main', 'train']
  command += [f'--config={config}', f'--workdir={workdir}']
  done = run_child(
    command, where, flags.threads, marker=metrics, extra_env=TUNER_ENV
  )
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  steps = [x for x in lines if 'tokens_per_second' in x]
  timed = steps[flags.warmup : flags.warmup + flags.steps]
  if len(timed) != flags.steps:
    raise RuntimeError(f'{metrics}: {len(steps)} steps, too few to time.')
  return {
    'real_tokens': round(sum(x['tokens'] for x in timed)),
    'target_tokens': sum(x['target_tokens'] for x in timed),
    'seconds': sum(x['seconds'] for x in timed),
    'steps': len(timed),
    'peak_rss_bytes': done.peak_rss_bytes,
    'first_step_s': done.first_step_s,
    'losses': [x['loss'] for x in steps],
  }


CONFIG_FILE = """import json

import ml_collections


def get_config():
  return ml_collections.ConfigDict(json.loads({values!r}))
"""


def tuner_config(flags, method: str, rows: pathlib.Path) -> dict:
  """A run of warm-up and timed steps, and nothing else."""
  adapt = {'name': 'lora', 'rank': 16, 'alpha': 32.0}
  return {
    'model': {'path': flags.model},
    'data': {'path': str(rows), 'test': 0.0},
    'batch': {'rows': 1, 'tokens': flags.tokens},
    'train': {'steps': flags.warmup + flags.steps},
    'adapt': adapt if method == 'lora' else {'name': 'full'},
    'optimizer': {'name': 'adamw'},
    'schedule': {'name': 'constant', 'peak': flags.lr},
    'evaluate': {'test': 'never'},
    'export': {'formats': []},
    'log': {'writers': ['jsonl']},
  }


SIDES = {'tuner': run_tuner, 'trl': run_trl}


def measure(flags: argparse.Namespace) -> list[dict[str, typing.Any]]:
  """One record a run: round by round, method by method, sides in turn."""
  records = []
  with tempfile.TemporaryDirectory() as scratch:
    rows = write_rows(flags.rows, pathlib.Path(scratch) / 'rows.jsonl')
    for round_ in range(flags.rounds):
      for method in flags.methods.split(','):
        for side in flags.sides.split(','):
          where = pathlib.Path(scratch) / f'{round_}-{method}-{side}'
          where.mkdir()
          figures = SIDES[side](flags, method, rows, where)
          key = {'round': round_, 'method': method, 'side': side}
          rate = figures['real_tokens'] / figures['seconds']
          records.append(key | {'tokens_per_second': rate} | figures)
          print(f'{key} {rate:.1f} real tokens/s', file=sys.stderr)
  return records


def ratios(records: list[dict], method: str) -> list[float]:
  """tuner's rate over TRL's, round by round; empty when a side is missing."""
  rates = {
    (r['round'], r['side']): r['tokens_per_second']
    for r in records
    if r['method'] == method
  }
  rounds = sorted({round_ for round_, _ in rates})
  return [
    rates[k, 'tuner'] / rates[k, 'trl']
    for k in rounds
    if (k, 'tuner') in rates and (k, 'trl') in rates
  ]


def summarize(records: list[dict]) -> list[list[str]]:
  """The table's rows: one a method and side."""
  table = []
  for method, side in dict.fromkeys((r['method'], r['side']) for r in records):
    mine = [r for r in records if (r['method'], r['side']) == (method, side)]
    rates = [r['tokens_per_second'] for r in mine]
    ratio = ratios(records, method) if side == 'tuner' else []
    peak_gb = max(r['peak_rss_bytes'] for r in mine) / 1e9
    firsts_s = [r['first_step_s'] for r in mine if r['first_step_s']]
    table.append(
      [
        side,
        method,
        f'{statistics.median(rates):.1f}',
        f'{min(rates):.1f}-{max(rates):.1f}',
        ' '.join(f'{x:.2f}' for x in ratio) or '-',
        f'{peak_gb:.2f}',
        f'{statistics.median(firsts_s):.1f}' if firsts_s else '-',
      ]
    )
  return table


def render(table: list[list[str]]) -> str:
  """Aligned columns under their titles."""
  titles = ['side', 'method', 'tokens/s', 'min-max', 'x TRL, each round']
  table = [titles + ['peak RSS GB', 'first step s'], *table]
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  return '\n'.join(
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in table
  )


def main() -> None:
  """Measures, prints the table and writes --out."""
  flags = parse_flags()
  records = measure(flags)
  print(render(summarize(records)))
  if flags.out:
    result = {'flags': vars(flags), 'runs': records}
    pathlib.Path(flags.out).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
