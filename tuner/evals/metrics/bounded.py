"""Patterns, schemas and queries on untrusted text, for a bounded time.

A regular expression may take exponential time on a text, and so may a schema
or a query; nothing stops them from within. They run in a process beside this
one, which is made once and asked by lines of JSON; each question has a second
of its processor's time, and the process a bound on its memory.
"""

import functools
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
from typing import Any

SECONDS = 1.0  # of processor time, so that a busy machine changes no score
MEMORY_BYTES = 2**31
_ROOT = pathlib.Path(__file__).parents[3]
_MAIN = (
  'import sys; sys.path.insert(0, sys.argv[1]); '
  'from tuner.evals.metrics import bounded; bounded.serve()'
)
_LOCK = threading.Lock()
_process: subprocess.Popen | None = None


def groups(pattern: str, text: str) -> list[list[str | None]] | None:
  """[whole match, its groups] of each match; None where it takes too long."""
  found = _ask(['groups', pattern, text])
  return found.get('found')


def is_valid(schema: str, value: str) -> bool | None:
  """Whether the JSON `value` fits the JSON Schema; None: it took too long.

  Raises ValueError for what is no schema, or refers to one elsewhere.
  """
  answer = _ask(['is_valid', schema, value])
  if 'wrong' in answer:
    raise ValueError(answer['wrong'])
  return answer.get('found')


def is_same_result(
  schema: str, reference: str, query: str, ordered: bool
) -> bool:
  """`queries.are_same`; False, too, where it takes too long.

  Raises ValueError where the schema or the reference does not run.
  """
  answer = _ask(['is_same_result', schema, reference, query, ordered])
  if 'wrong' in answer:
    raise ValueError(answer['wrong'])
  return answer.get('found', False)


def _ask(question: list[Any]) -> dict[str, Any]:
  """The answer; {} of a process that has ended on it, or run out of time."""
  global _process
  with _LOCK:
    if _process is None or _process.poll() is not None:
      # -P: no module beside the one that is run hides another.
      _process = subprocess.Popen(
        [sys.executable, '-P', '-W', 'ignore', '-c', _MAIN, str(_ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    assert _process.stdin and _process.stdout
    try:
      _process.stdin.write(json.dumps(question).encode() + b'\n')
      _process.stdin.flush()
      line = _process.stdout.readline()
    except BrokenPipeError:
      line = b''
    if line.endswith(b'\n'):
      return json.loads(line)
    return _ended(_process)


def _ended(process: subprocess.Popen) -> dict[str, Any]:
  """{} of a process that was ended by a signal. Raises RuntimeError for others.

  Of itself it ends only where it cannot run at all.
  """
  _, errors = process.communicate()
  if process.returncode >= 0:
    raise RuntimeError(
      'the process that bounds patterns, schemas and queries ended with '
      f'{process.returncode}: {errors.decode(errors="replace")[-500:]}'
    )
  return {}


def serve() -> None:
  """Answers lines of standard input until it ends."""
  import resource

  resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  for line in sys.stdin.buffer:
    # Not caught: what is deaf to it, such as one long step in C, ends with it.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
      answer = _answer(*json.loads(line))
    except Exception:  # What was asked is untrusted: whatever it comes to.
      answer = {}
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(json.dumps(answer).encode() + b'\n')
    sys.stdout.buffer.flush()


def _answer(name: str, *question: Any) -> dict[str, Any]:
  if name == 'groups':
    matches = re.finditer(*question)
    return {'found': [[match[0], *match.groups()] for match in matches]}
  if name == 'is_valid':
    return _fits(*question)
  from tuner.evals.metrics import queries

  try:
    return {'found': queries.are_same(*question)}
  except ValueError as error:
    return {'wrong': str(error)}


def _fits(rule: str, text: str) -> dict[str, Any]:
  import jsonschema
  import referencing.exceptions

  try:
    return {'found': _validator(rule).is_valid(json.loads(text))}
  except (jsonschema.SchemaError, ValueError, re.error) as error:
    return {'wrong': f'no JSON Schema: {str(error)[:200]}'}
  except referencing.exceptions.Unresolvable as error:
    return {'wrong': f'refers to what is not in it: {str(error)[:200]}'}


@functools.lru_cache(maxsize=64)
def _validator(schema: str):
  import jsonschema
  import jsonschema_specifications

  value = json.loads(schema)
  kind = jsonschema.validators.validator_for(
    value, default=jsonschema.Draft202012Validator
  )
  kind.check_schema(value)
  # The drafts alone: by default, what is referred to is fetched.
  return kind(value, registry=jsonschema_specifications.REGISTRY)
