"""Markdown tables with aligned columns, so that they are also readable as plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table of rows of cells.

    Example:
        >>> print(markdown_table(["method", "AP"], [["plain", 4.3]]))
        | method   | AP   |
        |----------|------|
        | plain    | 4.3  |
    """
    cells = [[str(cell) for cell in row] for row in rows]
    return tabulate(cells, list(columns), "github", disable_numparse=True)


def table_of(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str] | None = None) -> str:
    """A table from rows that map columns to values. A missing value is an empty cell.

    Args:
        headings: headings by column, for columns whose heading is not their key.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(c, "") for c in columns] for row in rows]
    return markdown_table([(headings or {}).get(c, c) for c in columns], cells)
