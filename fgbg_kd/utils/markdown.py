"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], headings: Mapping[str, str] | None = None) -> str:
    """A table with a line per row.

    Args:
        rows: values by column. A column that a row lacks is empty there.
        headings: of columns that are not called by their key.

    Example::

        >>> print(table([{"name": "a", "ap": 1.0}], {"ap": "AP"}))
        | name | AP |
        |---|---|
        | a | 1.0 |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[(headings or {}).get(c, c) for c in columns]]
    lines += [[str(row.get(c, "")) for c in columns] for row in rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|---" * len(columns) + "|", *text[1:]])
