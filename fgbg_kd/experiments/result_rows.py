"""Rows of results.jsonl: one for each run of a comparison.

A row has the keys "method" (as it was typed), "seed", "config" and "overrides" (of the whole
comparison), "task" (:func:`.settings.task_of`), "options" (of the method), what
:meth:`.runner.Runner.run` measured, "errors" (:mod:`.tide`; not in every row), "folder",
"finished" (the time), and the hardware and versions it ran on.
"""

import statistics
from pathlib import Path

from ..utils.files import add_row, read_rows
from .method_specs import FGBG, PLAIN, TEACHER, name_of
from .runner import COSTS, METRICS

# Two rows that agree in these are about the same run.
_RUN = (
    *("config", "overrides", "task", "method", "seed", "options", "commit"),
    *METRICS,
    *COSTS,
)


def title_of(row: dict) -> str:
    """The comparison that a row belongs to: its config and its overrides."""
    return " ".join([row["config"], *row["overrides"]])


def group(rows: list[dict]) -> dict[str, dict[str, dict[int | None, dict]]]:
    """Rows by comparison (:func:`title_of`), then by method (:func:`.name_of`), then by seed.

    If two rows have the same place, the later one counts. Of each comparison only the rows of its
    last "task" count: the same file names may have had other contents.
    The teacher comes first, then plain training, FgBg, and the peers by AP, the best first. The
    variants of a method stand together, its default options first.
    """
    last = _last_tasks(rows)
    groups: dict = {}
    for row in rows:
        title = title_of(row)
        if row.get("task") == last[title]:
            groups.setdefault(title, {}).setdefault(name_of(row), {})[row["seed"]] = row
    return {title: _in_order(methods) for title, methods in groups.items()}


def _in_order(methods: dict[str, dict]) -> dict[str, dict]:
    first = [TEACHER, PLAIN, FGBG]
    best: dict[str, float] = {}
    for name, by_seed in methods.items():
        family, ap = name.split()[0], statistics.fmean(r["AP"] for r in by_seed.values())
        best[family] = max(ap, best.get(family, ap))

    def place(name):
        family = name.split()[0]
        rank = first.index(family) if family in first else len(first)
        return rank, -best[family], family, name != family

    names = sorted(methods, key=place)
    return {n: dict(sorted(methods[n].items(), key=lambda item: item[0] or 0)) for n in names}


def _last_tasks(rows: list[dict]) -> dict[str, str | None]:
    return {title_of(row): row.get("task") for row in rows}


def add_result(file: Path, row: dict) -> dict:
    """Adds a run's row to results.jsonl, unless the file has it already.

    A run that is not run again keeps its first row, with the machine and the time of that row. Its
    kinds of errors may come later; they make a new row.

    Returns:
        The row as the file has it.
    """
    rows = read_rows(file)
    same = [r for r in rows if all(r.get(key) == row.get(key) for key in _RUN)]
    if same:
        errors = row.get("errors") or same[-1].get("errors")
        row = same[-1] | ({"errors": errors} if errors else {})
    # A comparison whose files changed and changed back needs its rows again, as the last ones.
    if row not in rows or _last_tasks(rows)[title_of(row)] != row["task"]:
        add_row(file, row)
    return row


def reference(methods: dict[str, dict]) -> str | None:
    """The variant of FgBg that the other methods are compared with; None if that is not clear.

    It is FgBg with default options; else the one that the config makes, which was typed without
    options; else the only variant there is.
    """
    variants = [name for name in methods if name.split()[0] == FGBG]
    as_configured = [n for n in variants if any(r["method"] == FGBG for r in methods[n].values())]
    found = [[n for n in variants if n == FGBG], as_configured, variants]
    return next((names[0] for names in found if len(names) == 1), None)
