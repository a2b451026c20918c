"""What queries return, run on SQLite in memory; see `bounded`, which does.

A query of a model is untrusted: it may read what is there and nothing else, for
a bounded number of steps, into a bounded result.
"""

import collections
import sqlite3
from typing import Any

STEPS = 20_000_000  # of SQLite's machine: about a second
EVERY = 10_000  # steps between looks at how many there were
RESULT_ROWS = 10_000
RESULT_BYTES = 10_000_000
VALUE_BYTES = 1_000_000
_READS = (
  sqlite3.SQLITE_SELECT,
  sqlite3.SQLITE_READ,
  sqlite3.SQLITE_FUNCTION,
  sqlite3.SQLITE_RECURSIVE,
)
_FORBIDDEN = (
  'load_extension', 'readfile', 'writefile', 'edit', 'fts3_tokenizer',
)  # fmt: skip


def are_same(schema: str, reference: str, query: str, ordered: bool) -> bool:
  """Whether both return the same rows; a query that fails returns others.

  Raises ValueError where the schema or the reference does not run.
  """
  wanted = _rows_of(schema, reference)
  if isinstance(wanted, str):
    raise ValueError(f'the reference does not run: {wanted}')
  found = _rows_of(schema, query)
  if isinstance(found, str):
    return False
  if ordered:
    return found == wanted
  return collections.Counter(found) == collections.Counter(wanted)


def _rows_of(schema: Any, query: str) -> list[tuple] | str:
  """What the query returns, or what is wrong with it. Raises ValueError."""
  connection = sqlite3.connect(':memory:', isolation_level=None)
  try:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    _bound(connection)
    try:
      connection.set_authorizer(_makes)
      connection.executescript(schema)
    except (sqlite3.Error, TypeError, ValueError, MemoryError) as error:
      raise ValueError(f'the schema does not run: {error}') from None
    connection.set_authorizer(_reads)
    _bound(connection)
    try:
      return _fetched(connection.execute(query))
    except (
      sqlite3.Error,
      sqlite3.Warning,
      ValueError,
      OverflowError,
      MemoryError,
    ) as error:
      return str(error)
  finally:
    connection.close()


def _bound(connection: sqlite3.Connection) -> None:
  """Stops the next statements after STEPS."""
  looks = iter(range(STEPS // EVERY))
  connection.set_progress_handler(lambda: next(looks, None) is None, EVERY)


def _fetched(cursor: sqlite3.Cursor) -> list[tuple]:
  found: list[tuple] = []
  n_bytes = 0
  for row in cursor:
    n_bytes += sum(len(v) for v in row if isinstance(v, str | bytes))
    if len(found) == RESULT_ROWS or n_bytes > RESULT_BYTES:
      raise ValueError(f'more than {RESULT_ROWS:,} rows, or too many bytes')
    found.append(row)
  return found


def _reads(action: int, name: str | None, function: str | None, *_) -> int:
  """Lets a statement read tables and call functions, and nothing else."""
  if action not in _READS:
    return sqlite3.SQLITE_DENY
  if action == sqlite3.SQLITE_FUNCTION and function in _FORBIDDEN:
    return sqlite3.SQLITE_DENY
  # Of a table that SQLite makes up, such as pragma_database_list.
  is_made_up = action == sqlite3.SQLITE_READ and str(name).startswith('pragma_')
  return sqlite3.SQLITE_DENY if is_made_up else sqlite3.SQLITE_OK


def _makes(action: int, name: str | None, function: str | None, *_) -> int:
  """Lets the row's own statements make tables, and reach no file."""
  forbidden = (
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA,
    sqlite3.SQLITE_CREATE_VTABLE,
  )
  if action in forbidden or function in _FORBIDDEN:
    return sqlite3.SQLITE_DENY
  return sqlite3.SQLITE_OK
