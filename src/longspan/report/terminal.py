"""The summary for the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from longspan.report.summary import columns, gather


def table(records: list[dict[str, Any]]) -> Table:
    """One row a mechanism, best quality first; the best of each column in bold.

    >>> rich.print(table(records))
    """
    comparison = gather(records)
    shown = columns(comparison)
    made = Table(box=None, pad_edge=False, header_style="dim")
    made.add_column("Mechanism", no_wrap=True)
    for column in shown:
        made.add_column(Text(f"{column.title}\n{column.unit}"), justify="right")
    made.add_column(Text("Laws\npassed"), justify="right")
    for row in comparison.ranked:
        if not row.done:
            continue
        cells = [
            Text(column.text(row), style="bold" if column.is_best(row) else "") for column in shown
        ]
        failed = row.laws_with("fail")
        laws = f"{len(row.laws_with('pass'))}/{len(row.laws)}" if row.laws else "–"
        made.add_row(Text(row.label), *cells, Text(laws, style="bold red" if failed else ""))
    # A reason is longer than any cell: the caption has the width of the terminal.
    unfinished = [row for row in comparison.ranked if not row.done]
    if unfinished:
        lines = (f"{row.label} {row.status}: {row.reason}" for row in unfinished)
        made.caption = Text("\n".join(lines), style="dim")
        made.caption_justify = "left"
    return made
