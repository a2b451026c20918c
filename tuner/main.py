"""python -m tuner.main [COMMAND] --config=FILE --workdir=DIR [--config.key=v].

COMMAND is `train` (the default), `check`, which reads the data as training
would and needs no workdir, `export`, which writes a checkpoint of a workdir as
files that other software loads, or `convert IN... OUT`, which writes any form
of rows as messages and needs no config. Any key of the config can be set on the
command line, as in --config.schedule.peak=5e-4, those that the file leaves out
among them. `evaluate` measures base and tuned of a committed step on the same
held-out rows.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tuner import named, sections
from tuner.report import escape

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
_JSON = flags.DEFINE_bool('json', False, 'check: print the record as JSON.')
_DETAIL = flags.DEFINE_bool('detail', False, 'check: print all that was found.')
_ROW = flags.DEFINE_string(
  'row', '', "check: show one row, by its line '17' or by 'file:17'."
)
_WRITE_CLEAN = flags.DEFINE_string(
  'write_clean', '', 'check: a JSONL file for the rows without faults.'
)
_LOSSES = flags.DEFINE_integer(
  'losses', 0, "check: take the base's loss of so many training rows."
)
_FORM = flags.DEFINE_string('form', None, 'convert: the form of the rows.')
_COLUMNS = flags.DEFINE_string(
  'columns', '', "convert: as 'prompt=text,completion=category'."
)
_SKIP = flags.DEFINE_bool(
  'skip', False, 'convert: leave out rows that cannot be read.'
)
_FORMATS = flags.DEFINE_list(
  'formats', [], 'export: adapter, model, gguf, orbax; else as config.export.'
)
_STEP = flags.DEFINE_integer(
  'step', None, 'export, evaluate: a committed step; else the chosen or newest '
  'one. evaluate: 0 is the base alone.', lower_bound=0,
)  # fmt: skip
_ALPHA = flags.DEFINE_float(
  'alpha', 1.0, 'export: how far from the base (0) to the tuned weights (1).'
)
_OUT = flags.DEFINE_string(
  'out', None, 'export: where to; else WORKDIR/export.'
)
_VERIFY = flags.DEFINE_bool(
  'verify', True, 'export: read again what was written, and compare.'
)
_SPLIT = flags.DEFINE_string(
  'split',
  None,
  'evaluate: test, or dev; dev where several alphas are compared.',
)
_ALPHAS = flags.DEFINE_string(
  'alphas', None, 'evaluate: also weights between base and tuned, as 0.25,0.5.'
)
_HARNESS = flags.DEFINE_string(
  'harness', None, "evaluate: also lm-eval's tasks, as hellaswag,arc_easy."
)
_HARNESS_PATH = flags.DEFINE_string(
  'harness_path', None, 'evaluate: a folder of task files of your own.'
)
_HARNESS_LIMIT = flags.DEFINE_integer(
  'harness_limit', None, 'evaluate: examples of each task, from the first.'
)

COMMANDS = ('train', 'evaluate', 'check', 'convert', 'export')


def main(argv: list[str]) -> None:
  """Runs a command; what the user can mend is told without a traceback."""
  command, arguments = (argv[1:] or ['train'])[0], argv[2:]
  if command not in COMMANDS or (arguments and command != 'convert'):
    raise app.UsageError(
      f'unknown command {" ".join(argv[1:])!r}; there is {", ".join(COMMANDS)}'
    )
  _check_flags(command, arguments)
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells of each absent backend.
  # No library of ours may reach for a hub or a telemetry server by itself.
  os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
  # It advises to install PyTorch, which nothing here needs.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  try:
    sys.exit(_run(command, arguments))
  except (ValueError, RuntimeError, OSError) as error:
    if logging.level_debug():
      raise
    print(escape.lines(f'tuner: {error}'), file=sys.stderr)
    print('(--verbosity=1 shows the traceback)', file=sys.stderr)
    sys.exit(1)


def _run(command: str, arguments: list[str]) -> int:
  """The exit code. Imports what a command needs: --help need not wait."""
  if command == 'convert':
    from tuner import convert

    columns = named.pairs(_COLUMNS.value or None, '--columns')
    *paths, output = arguments
    return convert.run(paths, output, _FORM.value, columns, _SKIP.value)
  file = config_flags.get_config_filename(flags.FLAGS['config'])
  named.existing_path(file.partition(':')[0], '--config')
  workdir = _WORKDIR.value and pathlib.Path(_WORKDIR.value).expanduser()
  if command == 'check':
    from tuner import check

    return check.run(
      _CONFIG.value, file, workdir, _JSON.value, _DETAIL.value, _ROW.value,
      _WRITE_CLEAN.value, _LOSSES.value,
    )  # fmt: skip
  if command == 'export':
    from tuner import export

    out = _OUT.value and pathlib.Path(_OUT.value).expanduser()
    return export.run(
      _CONFIG.value, workdir, _FORMATS.value, _STEP.value, out, _VERIFY.value,
      _ALPHA.value,
    )  # fmt: skip
  if command == 'evaluate':
    from tuner import evaluate

    asked = evaluate.asked(
      _STEP.value, _SPLIT.value, _ALPHAS.value, _HARNESS.value,
      _HARNESS_PATH.value, _HARNESS_LIMIT.value,
    )  # fmt: skip
    return evaluate.run(_CONFIG.value, workdir, asked)
  from tuner import commands

  return commands.train(_CONFIG.value, workdir, _ALLOW_CHANGE.value)


def _check_flags(command: str, arguments: list[str]) -> None:
  """Raises UsageError where the command lacks what it cannot do without."""
  if command == 'convert':
    if len(arguments) < 2:
      raise app.UsageError('convert takes files and, last, the one to write')
    return
  needed = {'check': ('config',)}
  for name in needed.get(command, ('config', 'workdir')):
    if not flags.FLAGS[name].value:
      raise app.UsageError(f'{command} needs --{name}')


def parse_flags(argv: list[str]) -> list[str]:
  """What absl leaves of argv; a section that is not there is told shortly."""
  try:
    return app.parse_flags_with_usage(argv)
  except KeyError as error:  # ml_collections names the nearest section.
    sys.exit(f'tuner: --config: no section {error.args[0]}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
