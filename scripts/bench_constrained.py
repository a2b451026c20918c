"""Measures what constrained decoding costs and what it brings; prints tables.

  python scripts/fetch_quickstart.py
  python scripts/bench_constrained.py --rows=128 --out=/tmp/constrained.json

First the cost of a token's mask beside the choice of the token, on the model's
vocabulary and the answers that the data has: in what each state allows, in
bringing the masks of a batch to the device, and in choosing under them. Then
the base model answers the same prompts free and constrained, its weights as
they come: tokens a second, and how often and how well it is JSON.

The schemas are made of the data: its labels in their usual order (properties),
or in any (patternProperties); bounded is in order, without white space, and
with values no longer than the data's.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import random
import re
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from tuner.data import template
from tuner.evals import generative, stats
from tuner.generate import constrain, engine, sampling
from tuner.models import hub, weights

CACHE = pathlib.Path(
  os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
).expanduser()
SYSTEM = 'Extract the parts of the US address as JSON.'
SYSTEMS = ('free', 'json', 'in order', 'any order', 'bounded')
METRICS = ('json_valid', 'json_equal', 'field_f1')


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's values."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default=str(CACHE / 'SmolLM2-135M-Instruct'))
  parser.add_argument('--data', default=str(CACHE / 'addresses.jsonl'))
  parser.add_argument('--rows', type=int, default=128, help='answered; 0: none')
  parser.add_argument(
    '--systems', default=','.join(SYSTEMS), help='that answer'
  )
  parser.add_argument('--timed_rows', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=3, help='of timed rows')
  parser.add_argument('--batch', type=int, default=64, help='rows at a time')
  parser.add_argument('--max_tokens', type=int, default=104)
  parser.add_argument('--states', type=int, default=2000, help='masks timed')
  parser.add_argument('--repeats', type=int, default=30, help='of each choice')
  parser.add_argument('--out', help='JSON file for every figure')
  flags = parser.parse_args(argv)
  wrong = set(flags.systems.split(',')) - set(SYSTEMS)
  if wrong:
    raise ValueError(
      f'--systems: {sorted(wrong)} unknown; allowed: {", ".join(SYSTEMS)}.'
    )
  return flags


def read_rows(path: str) -> list[dict[str, str]]:
  """The data's rows in an order drawn once."""
  lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  random.Random(0).shuffle(rows)
  return rows


def make_schemas(rows) -> dict[str, constrain.Constraint]:
  """Constraints of the answers' labels, by what they hold to."""
  before: collections.Counter = collections.Counter()
  lengths: collections.Counter = collections.Counter()
  for row in rows:
    fields = json.loads(row['output'])
    before.update(itertools.combinations(fields, 2))
    for label, value in fields.items():
      lengths[label] = max(lengths[label], len(value))

  def rank(label):
    """How many labels it follows more often than it stands before them."""
    pairs = ((label, other) for other in lengths)
    return sum(np.sign(before[b, a] - before[a, b]) for a, b in pairs)

  usual = sorted(lengths, key=rank)
  text = {'type': 'string'}
  pattern = f'^({"|".join(map(re.escape, usual))})$'
  closed = {'type': 'object', 'additionalProperties': False}
  schemas = {
    'in order': {**closed, 'properties': dict.fromkeys(usual, text)},
    'any order': {**closed, 'patternProperties': {pattern: text}},
    'bounded': {
      **closed,
      'properties': {k: {**text, 'maxLength': lengths[k]} for k in usual},
      'x-guidance': {'whitespace_flexible': False, 'whitespace_pattern': None},
    },
  }
  return {'json': constrain.Constraint('json')} | {
    name: constrain.Constraint('json_schema', json.dumps(schema))
    for name, schema in schemas.items()
  }


def timed(function, *arguments):
  """(microseconds, result)."""
  start = time.perf_counter()
  result = function(*arguments)
  return (time.perf_counter() - start) * 1e6, result


def spread(times_us: list[float]) -> dict[str, float]:
  """Median and 95th percentile of times, and how many they are."""
  return {
    'median_us': float(np.median(times_us)),
    'p95_us': float(np.percentile(times_us, 95)),
    'n': len(times_us),
  }


def time_states(grammar, answers, tokenizer, wanted: int):
  """(times of allowed and accept, answers followed, answers refused).

  Along the answers as the tokenizer writes them; one that the grammar refuses,
  whose labels stand in another order, is left where it does.
  """
  allowed_us: list[float] = []
  accept_us: list[float] = []
  followed = refused = 0
  for answer in answers:
    if len(allowed_us) >= wanted:
      break
    matcher, followed = grammar.start(), followed + 1
    for token in tokenizer.encode(answer, add_special_tokens=False):
      allowed_us.append(timed(matcher.allowed)[0])
      try:
        accept_us.append(timed(matcher.accept, token)[0])
      except ValueError:
        refused += 1
        break
  return spread(allowed_us), spread(accept_us), followed, refused


def time_choices(vocabulary, grammar, batch: int, repeats: int):
  """Times of one choice for a batch: free, under masks, and the masks' way."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(
    rng.standard_normal((batch, vocabulary.size), np.float32)
  )
  settings = sampling.settings([sampling.Sampling()] * batch)
  keys = sampling.keys(np.zeros(batch, np.uint32), np.arange(batch))
  words = np.stack([grammar.start().allowed()] * batch)
  on_device = jax.device_put(words)
  choose = jax.jit(sampling.choose)
  ways = {
    'transfer': lambda: jax.device_put(words),
    'free choice': lambda: choose(logits, settings, keys),
    'masked choice': lambda: choose(logits, settings, keys, on_device),
  }
  found = {}
  for name, way in ways.items():
    jax.block_until_ready(way())
    times = [
      timed(lambda way=way: jax.block_until_ready(way()))[0]
      for _ in range(repeats)
    ]
    found[name] = spread(times)
  return found


def render(tokenizer, row) -> list[int]:
  """The prompt's tokens, up to where the answer begins."""
  messages = [
    {'role': 'system', 'content': SYSTEM},
    {'role': 'user', 'content': row['input']},
  ]
  text = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=False
  )
  return tokenizer.encode(text, add_special_tokens=False)


def answer(model, tokenizer, stop_ids, rows, grammar, flags):
  """(seconds, answers) of a system to the rows."""
  requests = [
    engine.Request(
      render(tokenizer, row),
      flags.max_tokens,
      constraint=grammar.start() if grammar else None,
    )
    for row in rows
  ]
  time_us, answers = timed(
    engine.generate, model, requests, stop_ids, flags.batch
  )
  return time_us / 1e6, answers


def score(tokenizer, stop_ids, rows, answers, scorers):
  """The mean of each metric with its interval, and the texts."""
  texts = [
    tokenizer.decode(a.ids[:-1] if a.ids[-1] in stop_ids else a.ids)
    for a in answers
  ]
  scores = {
    name: [
      metric(text, row['output'], None)
      for text, row in zip(texts, rows, strict=True)
    ]
    for name, metric in scorers.items()
  }
  scores['stopped'] = [float(a.ended == 'stop') for a in answers]
  means = {
    name: stats.bootstrap(values, stats.SEED)._asdict()
    for name, values in scores.items()
  }
  return {'scores': means, 'n': len(rows), 'texts': texts}


def time_answers(model, tokenizer, stop_ids, rows, grammars, flags):
  """Tokens a second of each system, in turns, the first of them untimed."""
  rates: dict[str, list[float]] = {name: [] for name in grammars}
  for turn in range(flags.rounds + 1):
    for name, grammar in grammars.items():
      seconds, answers = answer(
        model, tokenizer, stop_ids, rows, grammar, flags
      )
      if turn:
        rates[name].append(sum(len(a.ids) for a in answers) / seconds)
  return rates


def main(argv: list[str] | None = None) -> None:
  """Prints both tables and writes the JSON file."""
  flags = parse_flags(argv)
  scorers = generative.find(METRICS)
  tokenizer = template.load_tokenizer(flags.model)
  stop_ids = template.stop_ids(pathlib.Path(flags.model), tokenizer)
  declared = hub.declare(pathlib.Path(flags.model))
  rows = read_rows(flags.data)
  us, vocabulary = timed(
    constrain.Vocabulary, tokenizer, declared.config.V, stop_ids
  )
  print(f'{len(tokenizer)} tokens of {vocabulary.size}: {us / 1e3:.0f} ms')
  figures: dict = {'vocabulary_ms': us / 1e3, 'masks': {}, 'answers': {}}
  grammars = {}
  for name, constraint in make_schemas(rows).items():
    us, grammars[name] = timed(vocabulary.grammar, constraint)
    allowed, accept, followed, refused = time_states(
      grammars[name], (r['output'] for r in rows), tokenizer, flags.states
    )
    figures['masks'][name] = {
      'grammar_us': us,
      'allowed': allowed,
      'accept': accept,
      'followed': followed,
      'refused': refused,
    }
    print(
      f'{name:10} grammar {us:7.0f} us; of {followed} answers refused {refused}'
    )
    for part, times in (('allowed', allowed), ('accept', accept)):
      show(f'  {part}', times)
  for batch in (1, flags.batch):
    found = time_choices(
      vocabulary, grammars['any order'], batch, flags.repeats
    )
    figures[f'batch of {batch}'] = found
    for name, times in found.items():
      show(f'batch {batch:3} {name}', times)
  if flags.rows:
    path = pathlib.Path(flags.model)
    model = weights.fill(declared, hub.load(path, declared))
    systems = {
      name: None if name == 'free' else grammars[name]
      for name in flags.systems.split(',')
    }
    for name, grammar in systems.items():
      own = rows[: flags.rows]
      _, answers = answer(model, tokenizer, stop_ids, own, grammar, flags)
      found = score(tokenizer, stop_ids, own, answers, scorers)
      figures['answers'][name] = found
      show_answers(name, found)
    figures['tokens_per_s'] = time_answers(
      model, tokenizer, stop_ids, rows[: flags.timed_rows], systems, flags
    )
    for name, rates in figures['tokens_per_s'].items():
      shown = ' '.join(f'{rate:.0f}' for rate in rates)
      print(f'{name:10} {statistics.median(rates):6.0f} tokens/s ({shown})')
  if flags.out:
    pathlib.Path(flags.out).write_text(json.dumps(figures, indent=1) + '\n')


def show(name: str, times: dict[str, float]) -> None:
  """Prints a line of times."""
  print(
    f'{name:24} median {times["median_us"]:8.0f} us   '
    f'p95 {times["p95_us"]:8.0f} us   n {times["n"]}',
    flush=True,
  )


def show_answers(name: str, found: dict) -> None:
  """Prints a system's line."""
  parts = [
    f'{metric} {i["mean"]:.2f} [{i["low"]:.2f}, {i["high"]:.2f}]'
    for metric, i in found['scores'].items()
  ]
  print(f'{name:10} n {found["n"]}  {"  ".join(parts)}', flush=True)


if __name__ == '__main__':
  main()
