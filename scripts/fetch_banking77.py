"""Makes the files of configs/banking77.py out of the published BANKING77.

`python scripts/fetch_banking77.py [--source=DIR] [--cache=DIR]` leaves
banking77/{train,dev,test}.csv in the cache (~/.cache/tuner, or $TUNER_CACHE).
The two CSV files are read from DIR, or from where PolyAI publishes them, and
checked by sha256 (CC-BY-4.0, Casanueva et al. 2020):
https://github.com/PolyAI-LDN/task-specific-datasets, banking_data/.

test.csv is theirs, all 3,080 rows. Training rows that are a test row, case and
white space aside, are left out (7 of 10,003). Of the others each intent gives,
in an order by hash, its first 2 rows to dev.csv and the next 30 to train.csv:
2,310 training rows, evenly over 77 intents, are what a CPU learns from in
minutes. --rows=N takes N of each, or all there are.
"""

import argparse
import collections
import csv
import hashlib
import io
import os
import pathlib
import sys
import urllib.error
import urllib.request

SITE = (
  'https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/'
  'master/banking_data/'
)
SHA256 = {
  'train.csv': (
    'b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b'
  ),
  'test.csv': (
    'd12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d'
  ),
}
COLUMNS = ('text', 'category')
DEV_ROWS = 2  # of each intent


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
  parser.add_argument('--cache', default=default, help='default: %(default)s')
  parser.add_argument('--source', help='a folder with train.csv and test.csv')
  parser.add_argument(
    '--rows', type=int, default=30, help='of each intent; default: %(default)s'
  )
  own = parser.parse_args(argv)
  out = pathlib.Path(own.cache).expanduser().resolve() / 'banking77'
  try:
    files = {name: read(name, own.source) for name in SHA256}
    counts = write(out, *map(parse, files.values()), own.rows)
  except (ValueError, OSError) as e:
    sys.exit(f'fetch_banking77: {e}')
  print(f'data   {out}: {counts}')


def read(name, source=None):
  """The bytes of a published file. Raises ValueError where they are others."""
  if source:
    data = (pathlib.Path(source).expanduser() / name).read_bytes()
  else:
    try:
      with urllib.request.urlopen(SITE + name, timeout=60) as response:
        data = response.read()
    except urllib.error.URLError as e:
      raise ValueError(
        f'{SITE + name}: {e.reason}. Bring the file by other means, and name '
        'its folder with --source.'
      ) from e
  found = hashlib.sha256(data).hexdigest()
  if found != SHA256[name]:
    raise ValueError(
      f'{source or SITE}: {name} has sha256 {found}; wanted {SHA256[name]}'
    )
  return data


def parse(data):
  """[(text, intent)] of a file's bytes."""
  header, *rows = csv.reader(io.StringIO(data.decode('utf-8'), newline=''))
  if tuple(header) != COLUMNS:
    raise ValueError(f'columns {header}; wanted {list(COLUMNS)}')
  return [tuple(row) for row in rows]


def write(out, train, test, rows):
  """Writes the three files; says how many rows each has."""
  sides = {**split(train, test, rows), 'test': test}
  out.mkdir(parents=True, exist_ok=True)
  for side, chosen in sides.items():
    part = out / f'{side}.csv.part'
    with open(part, 'w', encoding='utf-8', newline='') as file:
      csv.writer(file).writerows([COLUMNS, *chosen])
    part.rename(out / f'{side}.csv')
  return ', '.join(f'{len(rows)} {side}' for side, rows in sides.items())


def split(train, test, rows):
  """{'train', 'dev'} out of the published training rows, evenly by intent."""
  taken = {plain(text) for text, _ in test}
  by_intent = collections.defaultdict(list)
  for row in sorted(train, key=order):
    if plain(row[0]) not in taken:
      taken.add(plain(row[0]))
      by_intent[row[1]].append(row)
  sides = {'train': [], 'dev': []}
  for chosen in by_intent.values():
    sides['dev'] += chosen[:DEV_ROWS]
    sides['train'] += chosen[DEV_ROWS : DEV_ROWS + rows]
  return {side: sorted(chosen, key=order) for side, chosen in sides.items()}


def plain(text):
  """The text, but for case and white space."""
  return ' '.join(text.casefold().split())


def order(row):
  return hashlib.sha256(row[0].encode()).digest()


if __name__ == '__main__':
  main()
