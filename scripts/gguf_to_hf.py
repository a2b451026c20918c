"""A GGUF file -> a Hugging Face directory, without torch.

`python scripts/gguf_to_hf.py MODEL.gguf OUT_DIR [--dtype=auto]`; what is known
and what is undone on the way stands in `tuner.llamacpp`.
"""

import argparse
import pathlib
import sys

# Also where tuner is not installed: the quickstart's files are fetched before.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tuner.llamacpp import read

convert = read.convert
write_json = read.write_json


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('gguf')
  parser.add_argument('out')
  parser.add_argument('--dtype', default='auto', help='default: %(default)s')
  arguments = parser.parse_args(argv)
  try:
    names = convert(arguments.gguf, arguments.out, arguments.dtype)
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f'gguf_to_hf: {error}')
  print(*names, sep='\n')


if __name__ == '__main__':
  main()
