"""The rows of results.jsonl. Each run of a comparison has a row.

A row has these keys:

- "method": the method and its options, as on the command line.
- "seed": None for the teacher.
- "config", "overrides": of the whole comparison.
- "task": see :func:`.settings.task_of`.
- "options": the options of the method.
- the keys that :meth:`.runner.Runner.run` returns.
- "errors": see :mod:`.tide`. Not every row has it.
- "folder": the folder of the run.
- "finished": the time at the end.
- the keys that :func:`.runner.surroundings` returns: hardware and versions.
"""

import statistics
from pathlib import Path

from ..utils.files import add_row, read_rows
from .method_specs import FGBG, PLAIN, TEACHER, name_of
from .runner import COSTS, METRICS

# Two rows with the same values of these keys are from the same run.
_RUN = (
    *("config", "overrides", "task", "method", "seed", "options", "commit"),
    *METRICS,
    *COSTS,
)


def title_of(row: dict) -> str:
    """The title of the comparison to which a row belongs: its config and its overrides."""
    return " ".join([row["config"], *row["overrides"]])


def group(rows: list[dict]) -> dict[str, dict[str, dict[int | None, dict]]]:
    """Groups rows by comparison (:func:`title_of`), method (:func:`.name_of`) and seed.

    If two rows have the same place, the later row counts. Only the rows with the last "task" of a
    comparison count, because earlier rows can be from files with the same names and other contents.

    The order of methods is: teacher, plain training, FgBg, then the other methods by AP, the best
    first. The variants of a method are neighbours. The variant with default options is the first.
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
    """Adds the row of a run to results.jsonl, unless the file has it.

    A run that is not repeated keeps its first row, with the hardware and the time of this row. If
    its kinds of errors are measured later, a row with them is added.

    Args:
        file: path of results.jsonl.
        row: the row of the run.

    Returns:
        The row as it is in the file.
    """
    rows = read_rows(file)
    same = [r for r in rows if all(r.get(key) == row.get(key) for key in _RUN)]
    if same:
        errors = row.get("errors") or same[-1].get("errors")
        row = same[-1] | ({"errors": errors} if errors else {})
    # If the files of a comparison change and change back, its rows are added again at the end.
    if row not in rows or _last_tasks(rows)[title_of(row)] != row["task"]:
        add_row(file, row)
    return row


def reference(methods: dict[str, dict]) -> str | None:
    """The variant of FgBg with which the other methods are compared.

    It is the first of these that exists: FgBg with default options; the only variant that was named
    without options on the command line, so that the config decides them; the only variant. None if
    there is none of them.
    """
    variants = [name for name in methods if name.split()[0] == FGBG]
    as_configured = [n for n in variants if any(r["method"] == FGBG for r in methods[n].values())]
    found = [[n for n in variants if n == FGBG], as_configured, variants]
    return next((names[0] for names in found if len(names) == 1), None)
