"""Labels that were taken for one another, in HTML: a list and a heat table."""

from tuner.report import escape, evaluate_labels
from tuner.report import evaluate_parts as parts_lib

MOST = 120  # labels of a table
_PAIRS = 20
_SHADES = 4
_LONGEST = 40  # columns of a label


def pairs(tables: evaluate_labels.Tables) -> str:
  """The pairs that were confused most often; how many more there are."""
  found = evaluate_labels.confused(tables)
  if not found:
    return '<p class="good">No label was taken for another.</p>'
  items = [
    f'<li><b>{_count(tuned)}</b><span>{_name(wanted)} '
    f'<span class="soft">taken for</span> {_name(said)} '
    f'<span class="soft">(base {_count(base)})</span></span></li>'
    for wanted, said, base, tuned in found[:_PAIRS]
  ]
  if (more := len(found) - _PAIRS) > 0:
    items.append(f'<li class="soft">{more:,} more pairs in the tables</li>')
  return f'<div class="box"><ol class="pairs">{"".join(items)}</ol></div>'


def _count(n):
  return parts_lib.NAN if n is None else f'{n:,}'


def matrices(tables: evaluate_labels.Tables) -> str:
  """Rows are wanted labels, columns what was said; tuned's first, then base's.

  Of more than `MOST` labels those with most mistakes; how many is said.
  """
  found = [
    _table(tables, name, counts)
    for name, counts in (('tuned', tables.tuned), ('base', tables.base))
    if counts
  ]
  if tables.absent:
    said = ', '.join(map(_name, tables.absent))
    found.append(f'<p class="legend">Labels that no row wants: {said}.</p>')
  return '\n'.join(found)


def _table(tables, name, counts):
  kept, n = _worst(counts), len(tables.labels)
  of = f'the {len(kept):,} with most mistakes of ' * (len(kept) < n)
  return (
    f'<details{" open" if name == "tuned" else ""}><summary>{name}: '
    f'{of}{n:,} labels; rows are wanted, columns said</summary>'
    f'<div class="box heat">{_matrix(tables, counts, kept)}</div></details>'
  )


def _worst(counts):
  """Places of the labels that are shown, in their order."""
  n = len(counts)
  if n <= MOST:
    return range(n)
  mistakes = [
    sum(counts[i]) + sum(row[i] for row in counts) - 2 * counts[i][i]
    for i in range(n)
  ]
  return sorted(sorted(range(n), key=lambda i: -mistakes[i])[:MOST])


def _matrix(tables, counts, kept):
  columns = [*kept, len(tables.labels)]  # The last: what is no label.
  heads = ''.join(
    f'<th><span>{_name(tables.columns[j])}</span></th>' for j in columns
  )
  top = max((counts[i][j] for i in kept for j in columns), default=0)
  rows = []
  for i in kept:
    cells = ''.join(
      _cell(tables, i, j, n, top) if (n := counts[i][j]) else '<td></td>'
      for j in columns
    )
    rows.append(f'<tr><th>{_name(tables.labels[i])}</th>{cells}</tr>\n')
  return (
    f'<table><thead><tr><th></th>{heads}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table>'
  )


def _cell(tables, i, j, n, top):
  """Shades by the root of the count, so that a single mistake can be seen."""
  shade = max(1, round(_SHADES * (n / top) ** 0.5))
  tip = escape.html(
    f'wanted {tables.labels[i]}, said {tables.columns[j]}: {n:,}'
  )
  side = 'r' if i == j else 'w'
  return f'<td class="{side}{shade}" title="{tip}">{n:,}</td>'


def _name(label):
  return escape.html(escape.cut(escape.visible(label), _LONGEST))
