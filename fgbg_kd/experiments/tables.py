"""Tables of a comparison in Markdown, and tables inside a document."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..utils.errors import RunError
from ..utils.markdown import markdown_table
from .method_specs import FGBG, PLAIN, TEACHER, short
from .paired_statistics import Estimate, average, paired_difference
from .result_rows import reference
from .runner import METRICS
from .tide import KINDS

# The tables of a comparison in their order. "classes" and "tuning" are made only on request.
PARTS = ("summary", "metrics", "errors", "note")
# A picture in a document, see plot. It is not a table.
PLOT = "plot"


def comparison_tables(methods: dict[str, dict], parts: Sequence[str] = PARTS) -> str:
    """The tables of one comparison.

    Args:
        methods: rows by method and seed, from :func:`.result_rows.group`.
        parts: the tables to make:

            - "summary": AP, paired differences, and how much of the gap to the teacher is closed.
            - "metrics": all COCO metrics, time and memory.
            - "errors": kinds of errors by TIDE.
            - "classes": AP by class.
            - "tuning": a row per method with all its choices of options.
            - "note": hardware and versions.
    """
    texts = [_TABLES[part](methods) for part in parts]
    return "\n\n".join(text for text in texts if text)


def _summary(methods: dict[str, dict]) -> str:
    aps = {m: {s: r["AP"] for s, r in by_seed.items()} for m, by_seed in methods.items()}
    teacher = next(iter(aps.get(TEACHER, {}).values()), None)
    plain, fgbg = aps.get(PLAIN), reference(methods)
    with_fgbg = plain or (fgbg and not aps.keys() <= {fgbg, TEACHER})
    columns = ["method", "AP", "each seed"]
    columns += [f"AP − {PLAIN}"] if plain else []
    columns += [f"{fgbg or FGBG} − method"] if with_fgbg else []
    columns += ["gap closed"] if plain else []
    rows = []
    for name, values in aps.items():
        ap = list(values.values())
        row = [name, f"{statistics.fmean(ap):.2f}"]
        row.append(", ".join(f"{v:.1f}" for v in ap) if len(ap) > 1 else "–")
        student = name not in (PLAIN, TEACHER)
        gain = paired_difference(values, plain) if plain and student else None
        ahead = paired_difference(aps[fgbg], values) if fgbg and student and name != fgbg else None
        row += [signed(gain)] if plain else []
        row += [signed(ahead)] if with_fgbg else []
        row += [_gap_closed(gain, teacher, values, plain)] if plain else []
        rows.append(row)
    return markdown_table(columns, rows)


def _gap_closed(gain: Estimate | None, teacher: float | None, values: dict, plain: dict) -> str:
    """The share of the gap between plain training and teacher that a method closes, in per cent.

    Only seeds that both methods have are used.

    Args:
        gain: the paired difference of ``values`` and ``plain``.
    """
    if not gain or not teacher:
        return "–"
    gap = teacher - statistics.fmean(plain[s] for s in plain.keys() & values.keys())
    return f"{100 * gain[0] / gap:.0f} %" if gap > 0 else "–"


def _metrics(methods: dict[str, dict]) -> str:
    rows = []
    for name, by_seed in methods.items():
        runs = list(by_seed.values())
        key = "gpu_memory_mb" if runs[0]["gpu_memory_mb"] else "memory_mb"
        seconds = average(runs, "seconds_per_step", statistics.median)
        memory = average(runs, key, statistics.median)
        means = [number(average(runs, m)) for m in METRICS]
        rows.append([name, *means, number(seconds, 3), number(memory, 0)])
    return markdown_table(["method", *METRICS, "s / step", "memory (MB)"], rows)


def _errors(methods: dict[str, dict]) -> str:
    """The mean dAP50 of each kind of error, and its paired difference to plain training."""
    table = _beside_plain(methods, "errors", "dAP50", KINDS)
    return table and table + (
        "\n\ndAP50: the points that AP50 would gain without any error of this kind (TIDE). In "
        f"brackets: the difference to {PLAIN}. Cls: right place, wrong class. Loc: right class, "
        "inaccurate box. Both: both of them. Dupe: a second detection of an object. Bkg: a "
        "detection where no object is. Miss: an object without a detection. FalsePos: all wrong "
        "detections. FalseNeg: all objects that are not found."
    )


def _classes(methods: dict[str, dict]) -> str:
    """The mean AP of each class, and its paired difference to plain training."""
    rows = [r.get("classes") or {} for by_seed in methods.values() for r in by_seed.values()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    zero = {"classes": dict.fromkeys(names, 0.0)}
    methods = {
        name: {s: r | zero if r.get("detections") == 0 else r for s, r in by_seed.items()}
        for name, by_seed in methods.items()
    }
    table = _beside_plain(methods, "classes", "AP by class", names)
    return table and f"{table}\n\nIn brackets: the difference to {PLAIN}."


def _beside_plain(methods: dict[str, dict], key: str, title: str, columns: Sequence[str]) -> str:
    """A table with a row per method: mean values, and their paired differences to plain training.

    Args:
        key: of the values by name in a row. Rows without it are left out.
        title: of the first column.
        columns: names of the values.

    Returns:
        The table; "" if no row has the key.
    """
    found = {
        name: {seed: r[key] for seed, r in by_seed.items() if r.get(key)}
        for name, by_seed in methods.items()
    }
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not found:
        return ""
    rows = []
    for name, by_seed in found.items():
        row = [name]
        for column in columns:
            values = {seed: e[column] for seed, e in by_seed.items()}
            cell = f"{statistics.fmean(values.values()):.1f}"
            if PLAIN in found and name not in (PLAIN, TEACHER):
                plain = {seed: e[column] for seed, e in found[PLAIN].items()}
                cell += f" ({signed(paired_difference(values, plain))})"
            row.append(cell)
        rows.append(row)
    return markdown_table([title, *columns], rows)


def _tuning(methods: dict[str, dict]) -> str:
    """A row per method: the mean AP for each choice of its options. The best AP is bold."""
    families: dict[str, list[tuple[dict, list[str], float]]] = {}
    for name, by_seed in methods.items():
        if name not in (TEACHER, PLAIN):
            options = next(iter(by_seed.values()))["options"]
            mean = statistics.fmean(r["AP"] for r in by_seed.values())
            family, *shown = name.split()  # also keys such as SOLVER.BASE_LR
            others = [x for x in shown if x.partition("=")[0].lower() not in options]
            families.setdefault(family, []).append((options, others, mean))
    rows = []
    for family, tried in families.items():
        options = [o for o, _, _ in tried]
        keys = dict.fromkeys(k for o in options for k in o)
        varied = [k for k in keys if len({repr(o.get(k)) for o in options}) > 1]
        best, cells = max(ap for *_, ap in tried), []
        tried = sorted(tried, key=lambda x: [(k in x[0], x[0].get(k)) for k in varied])
        for chosen, others, ap in tried:
            given = [f"{k.upper()}={short(chosen[k])}" for k in varied if k in chosen]
            label = " ".join([*given, *others]) or "as given"
            cells.append(f"{label}: {f'**{ap:.1f}**' if ap == best else f'{ap:.1f}'}")
        rows.append([family, "; ".join(cells)])
    return markdown_table(["method", "AP of each choice"], rows)


def _note(methods: dict[str, dict]) -> str:
    rows = [r for by_seed in methods.values() for r in by_seed.values()]

    def each(key, between=" and "):
        return between.join(dict.fromkeys(str(r[key]) for r in rows if r.get(key)))

    several = "±" in _summary(methods)
    commits = ", ".join(dict.fromkeys(each("commit", ", ").split(", ")))
    explained = "± is the 95 % confidence interval of the mean difference, paired by seed. "
    text = (
        f"{explained if several else ''}{each('hardware')}; threads {each('threads')}, "
        f"runs at a time {each('jobs')}; "
        f"{each('versions')}; commit {commits}."
    )
    students = [frozenset(by_seed) for name, by_seed in methods.items() if name != TEACHER]
    if len(set(students)) > 1:
        text += " Means are over the seeds of each method, differences over the shared seeds."
    if nothing := [
        f"{name}, seed {seed}"
        for name, by_seed in methods.items()
        for seed, r in by_seed.items()
        if r.get("detections") == 0
    ]:
        text += f" AP 0 because nothing was detected: {'; '.join(nothing)}."
    return text


_TABLES = {
    "summary": _summary,
    "metrics": _metrics,
    "errors": _errors,
    "classes": _classes,
    "tuning": _tuning,
    "note": _note,
}


def number(value: float | None, digits: int = 1) -> str:
    """A number as text; "–" for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(difference: Estimate | None, digits: int = 2) -> str:
    """A difference with sign and interval as text; "–" for None."""
    if difference is None:
        return "–"
    mean, half = difference
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def without_folders(title: str) -> str:
    """The title of a comparison, with only the file name of each absolute path."""
    return re.sub(r"(?<!\S)/\S*/", "", title)


_START, _END = re.compile(r"<!-- *table\b[^\n]*"), "<!-- end of table -->"
_MARKED = re.compile(rf"(<!-- table: ([^\n]+?) -->\n)((?!<!-- *table\b).)*?({_END})", re.DOTALL)


def fill(text: str, tables: Callable[[str, list[str]], str]) -> str:
    """Replaces the tables in a document.

    Args:
        text: the document. A table is between the lines ``<!-- table: FILE PART ... -->`` and
            ``<!-- end of table -->``. Without a PART, all of :data:`PARTS` are made. :data:`PLOT`
            is a PART too.
        tables: a function that gets FILE and the list of parts, and returns the text between the
            two lines. If it returns "", the old text stays.

    Raises:
        RunError: a first line has no last line or is not well formed, or there is no such PART.
    """
    complete = {match.start() for match in _MARKED.finditer(text)}
    for match in _START.finditer(text):
        if match.start() not in complete:
            raise RunError(
                f"{match[0]!r} does not start a table: write <!-- table: FILE PART ... -->, and "
                f"{_END} after the table."
            )

    def replace(match: re.Match) -> str:
        file, *parts = match[2].split()
        if unknown := [part for part in parts if part not in (*_TABLES, PLOT)]:
            raise RunError(
                f"{match[1].strip()}: there is no part {' '.join(unknown)}: choose from "
                f"{', '.join((*_TABLES, PLOT))}. The path of the file must have no spaces."
            )
        made = tables(file, parts or list(PARTS))
        return f"{match[1]}{made}\n{match[4]}" if made else match[0]

    return _MARKED.sub(replace, text)


def plot(methods: dict[str, dict], path: Path) -> None:
    """Draws a comparison into a file.

    Each method has a row with a dot for the AP of each seed and a bar for their mean. A dashed line
    is the teacher's AP.

    Args:
        methods: see :func:`comparison_tables`.
        path: path of the picture.
    """
    names = [m for m in methods if m != TEACHER][::-1]
    fgbg = reference(methods)
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(names)))
    axes = figure.subplots()
    for y, name in enumerate(names):
        ap = [r["AP"] for r in methods[name].values()]
        color = "C1" if name == fgbg else "C0"
        axes.plot(ap, [y] * len(ap), "o", color=color, alpha=0.6, markersize=5)
        axes.plot([statistics.fmean(ap)] * 2, [y - 0.3, y + 0.3], color=color)
    for row in methods.get(TEACHER, {}).values():
        axes.axvline(row["AP"], color="0.5", linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("COCO AP (dot: one seed, bar: mean, dashed: teacher)")
    figure.savefig(path, dpi=100, bbox_inches="tight")
