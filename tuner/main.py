"""python -m tuner.main [COMMAND] --config=FILE --workdir=DIR [--config.key=v].

COMMAND is `train` (the default). Any key of the config can be set on the
command line, as in --config.schedule.peak=5e-4, those that the file leaves out
among them.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tuner import named, sections

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='The experiment, a file of configs/.',
  # Keys that the file leaves out can be set; tuner.sections knows them all.
  lock_config=False,
  accept_new_attributes=True,
)
# The same for whole sections: those that are left out are there, and empty.
_PARSER = flags.FLAGS['config'].parser
_PARSER.parse = sections.complete(_PARSER.parse)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept.')
_ALLOW_CHANGE = flags.DEFINE_list(
  'allow_change', [], 'Facts that may differ from the checkpoint resumed from.'
)
flags.mark_flags_as_required(['config', 'workdir'])

COMMANDS = ('train',)


def main(argv: list[str]) -> None:
  """Runs a command; what the user can mend is told without a traceback."""
  command = argv[1] if len(argv) > 1 else 'train'
  if command not in COMMANDS or len(argv) > 2:
    raise app.UsageError(
      f'unknown command {" ".join(argv[1:])!r}; there is {", ".join(COMMANDS)}'
    )
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells of each absent backend.
  # No library of ours may reach for a hub or a telemetry server by itself.
  os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
  # It advises to install PyTorch, which nothing here needs.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  file = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    named.existing_path(file.partition(':')[0], '--config')
    from tuner import commands  # Imports jax, which --help need not wait for.

    sys.exit(commands.train(_CONFIG.value, workdir, _ALLOW_CHANGE.value))
  except (ValueError, RuntimeError, OSError) as error:
    if logging.level_debug():
      raise
    print(f'tuner: {error}', file=sys.stderr)
    print('(--verbosity=1 shows the traceback)', file=sys.stderr)
    sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
  """What absl leaves of argv; a section that is not there is told shortly."""
  try:
    return app.parse_flags_with_usage(argv)
  except KeyError as error:  # ml_collections names the nearest section.
    sys.exit(f'tuner: --config: no section {error.args[0]}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
