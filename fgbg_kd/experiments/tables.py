"""Methods side by side: rows of runs to means, paired differences, a table and a plot."""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..methods import METHOD_REGISTRY
from .runner import COSTS, METRICS
from .settings import COUNTED, flat, keys_read, options_before
from .tide import KINDS

PLAIN, TEACHER, OURS = "plain", "teacher", "FgBg"
# What says which method a run is of, and what all runs of a comparison share: no option of one.
_SHARED = (
    *COUNTED,
    "MODEL.META_ARCHITECTURE",
    "MODEL.KD.METHOD",
    "MODEL.KD.STUDENT",
    "MODEL.KD.TEACHER.CONFIG",
    "MODEL.KD.TEACHER.WEIGHTS",
    "MODEL.KD.TEACHER.SHA256",
    "DATASETS.TEST",
    "DATASETS.TEST_JSON",
    "DATASETS.TEST_IMAGES",
)
# By these two rows tell of one run.
_RUN = ("config", "overrides", "method", "seed", "options", "commit", *METRICS, *COSTS)

# 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; the last, a bit wide, for more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045, 2.042)  # fmt: skip


def method_overrides(cfg, spec: str) -> list[str]:
    """Config overrides of a method as the command line names it.

    Args:
        cfg: config that distils.
        spec: "plain", or a name in METHOD_REGISTRY; then any number of KEY=VALUE, where KEY is an
            option of the method, or a key of MODEL.KD, or a whole one: "PKD WEIGHT=2".

    Raises:
        ValueError: no such method, or no key that it reads and that may differ from run to run.
    """
    name, *options = spec.split() or [""]
    if name == PLAIN:
        overrides, prefixes = ["MODEL.META_ARCHITECTURE", cfg.MODEL.KD.STUDENT], [""]
    elif name in METHOD_REGISTRY:
        overrides = ["MODEL.META_ARCHITECTURE", "FgBgDistiller", "MODEL.KD.METHOD", name]
        prefixes = [f"MODEL.KD.{name.upper()}.", "MODEL.KD.", ""]
    else:
        names = sorted(n for n, _ in METHOD_REGISTRY)
        raise ValueError(f"No method {name!r}: choose from {[PLAIN, *names]}.")
    chosen = dict(zip(overrides[::2], overrides[1::2]))
    keys = keys_read({**flat(cfg), **chosen}).keys() - {*_SHARED}
    for option in options:
        key, equals, value = option.partition("=")
        found = [prefix + key for prefix in prefixes if prefix + key in keys]
        if not equals or not found:
            raise ValueError(f"{spec!r}: {option!r} is not KEY=VALUE with a key that {name} reads.")
        overrides += [found[0], value]
    return overrides


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval by Student's t; None for one value."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), None
    t = _T[min(n - 1, len(_T)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float | None] | None:
    """:func:`interval` of a - b over the seeds that both have; None where there is none."""
    seeds = sorted(a.keys() & b.keys())
    return interval([a[s] - b[s] for s in seeds]) if seeds else None


def group(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Rows by comparison (config and its overrides), then method (:func:`name_of`), then seed.

    Of rows with one key the last counts, and of a comparison only those of its last "task"
    (:func:`fgbg_kd.experiments.settings.task_of`; rows of old have none): files under the same names change.
    The variants of a method stand together.
    """
    groups: dict = {}
    last = _last_tasks(rows)
    for row in rows:
        title = _title(row)
        if row.get("task") in (None, last.get(title)):
            groups.setdefault(title, {}).setdefault(name_of(row), {})[row["seed"]] = row
    for title, methods in groups.items():
        families = [name.split()[0] for name in methods]
        groups[title] = {
            name: dict(sorted(methods[name].items(), key=lambda item: item[0] or 0))
            for name in sorted(methods, key=lambda name: families.index(name.split()[0]))
        }
    return groups


def _title(row: dict) -> str:
    return " ".join([row["config"], *row["overrides"]])


def _last_tasks(rows: list[dict]) -> dict[str, str]:
    return {_title(row): row["task"] for row in rows if row.get("task")}


def as_recorded(row: dict, rows: list[dict]) -> dict:
    """A run's row as the last of the rows that tells of the same run has it (its machine, its
    hour), with the errors and the task of this one where that has none."""
    same = [r for r in rows if all(r.get(key) == row.get(key) for key in _RUN)]
    if not same:
        return row
    errors = same[-1].get("errors") or row.get("errors")
    return {**row, **same[-1], "task": row["task"]} | ({"errors": errors} if errors else {})


def is_kept(row: dict, rows: list[dict]) -> bool:
    """Whether the rows hold this one, and :func:`group` takes its task for the last."""
    return row in rows and _last_tasks(rows).get(_title(row)) == row["task"]


def name_of(row: dict) -> str:
    """A row's method, with the options that are not what the title says, or else today's defaults.

    Not as it was typed: what a row shows stays true when a default changes.
    """
    name, *typed = row["method"].split()
    if name not in METHOD_REGISTRY:  # plain, the teacher
        return row["method"]
    defaults = METHOD_REGISTRY.get(name).options()
    node = "MODEL.KD." if name == OURS else f"MODEL.KD.{name.upper()}."
    told = dict(zip(row["overrides"][::2], row["overrides"][1::2]))

    def is_other(key, value):
        if (text := told.get(f"{node}{key.upper()}")) is None:
            return value != defaults.get(key)
        return str(value) != text and not (isinstance(value, float) and float(text) == value)

    options = row["options"]
    if name == OURS:
        options = {**options_before(options.get("gate")), **options}
    other = [f"{k.upper()}={_short(v)}" for k, v in options.items() if is_other(k, v)]
    short = [x.removeprefix("MODEL.KD.").removeprefix(f"{name.upper()}.") for x in typed]
    keys = [x for x in short if x.partition("=")[0].lower() not in options]
    return " ".join([name, *other, *keys])


def ours_of(methods: dict[str, dict]) -> str | None:
    """The variant of ours that the others are compared with: that of title and defaults, else the
    one that the config makes, named without options, else the only one there is."""
    variants = [name for name in methods if name.split()[0] == OURS]
    as_configured = [n for n in variants if any(r["method"] == OURS for r in methods[n].values())]
    found = [[n for n in variants if n == OURS], as_configured, variants]
    return next((names[0] for names in found if len(names) == 1), None)


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def heading(title: str) -> str:
    """The title of a comparison without the folders of a machine: of absolute paths, the names."""
    return re.sub(r"(?<!\S)/\S*/", "", title)


def markdown(methods: dict[str, dict]) -> str:
    """The tables of one comparison: every seed, means, costs; paired differences; errors."""
    aps = {m: {s: r["AP"] for s, r in by_seed.items()} for m, by_seed in methods.items()}
    teacher = next(iter(aps.get(TEACHER, {}).values()), None)
    lines = [
        "| method | AP | sd | each seed | AP50 | AP75 | APs | APm | APl | s / step | memory (MB) |",
        "|---" * 11 + "|",
    ]
    for name, by_seed in methods.items():
        rows = list(by_seed.values())
        ap = [r["AP"] for r in rows]
        sd = f"{statistics.stdev(ap):.2f}" if len(ap) > 1 else "–"
        means = [number(average(rows, m)) for m in METRICS[1:]]
        memory = "gpu_memory_mb" if rows[0]["gpu_memory_mb"] else "memory_mb"
        time, memory = (average(rows, k, statistics.median) for k in ("seconds_per_step", memory))
        cost = [number(time, 3), number(memory, 0)]
        seeds = ", ".join(f"{v:.1f}" for v in ap) if len(ap) > 1 else "–"
        cells = [name, f"**{statistics.fmean(ap):.2f}**", sd, seeds, *means, *cost]
        lines.append("| " + " | ".join(cells) + " |")
    students = {m: v for m, v in aps.items() if m != TEACHER}
    if PLAIN in students and len(students) > 1:
        plain = students[PLAIN]
        ours = ours_of(methods)
        lines += [
            "",
            f"| method | AP − {PLAIN} | {ours or OURS} − method | gap to teacher closed |",
            "|---|---|---|---|",
        ]
        for name, values in students.items():
            if name == PLAIN:
                continue
            gain = paired(values, plain)
            ahead = paired(students[ours], values) if ours and name != ours else None
            closed = "–"
            if gain and teacher:  # of the same seeds
                gap = teacher - statistics.fmean(plain[s] for s in plain.keys() & values.keys())
                closed = f"{100 * gain[0] / gap:.0f} %" if gap > 0 else "–"
            lines.append(f"| {name} | {signed(gain)} | {signed(ahead)} | {closed} |")
    lines += _error_table(methods)
    lines += ["", _footnote([r for by_seed in methods.values() for r in by_seed.values()])]
    if len({frozenset(by_seed) for by_seed in students.values()}) > 1:
        lines[-1] += " Means are over the seeds of each method, differences over the shared ones."
    return "\n".join(lines)


def _error_table(methods: dict[str, dict]) -> list[str]:
    """Mean dAP50 of each kind of error, and its paired difference to plain."""
    errors = {
        name: {seed: r["errors"] for seed, r in by_seed.items() if r.get("errors")}
        for name, by_seed in methods.items()
    }
    errors = {name: by_seed for name, by_seed in errors.items() if by_seed}
    if not errors:
        return []
    lines = ["", f"| dAP50 | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for name, by_seed in errors.items():
        cells = []
        for kind in KINDS:
            values = {seed: e[kind] for seed, e in by_seed.items()}
            cell = f"{statistics.fmean(values.values()):.1f}"
            if PLAIN in errors and name not in (PLAIN, TEACHER):
                plain = {seed: e[kind] for seed, e in errors[PLAIN].items()}
                cell += f" ({signed(paired(values, plain))})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    explained = (
        "dAP50: how much higher AP50 were without the errors of a kind (TIDE); in brackets the "
        f"difference to {PLAIN}."
    )
    return [*lines, "", explained]


def _footnote(rows: list[dict]) -> str:
    def each(key):
        values = [part for r in rows if r.get(key) for part in str(r[key]).split(", ")]
        return ", ".join(dict.fromkeys(values))

    return (
        f"± is the 95 % confidence interval of the mean difference, paired by seed. "
        f"{each('hardware')}; threads {each('threads')}, runs at a time {each('jobs')}; "
        f"{each('versions')}; commit {each('commit')}."
    )


def average(
    rows: Sequence[dict], key: str, how: Callable[[list[float]], float] = statistics.fmean
) -> float | None:
    """Of a key over the rows that have it; None where none has."""
    values = [r[key] for r in rows if r.get(key) is not None]
    return how(values) if values else None


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(difference: tuple[float, float | None] | None, digits: int = 2) -> str:
    """What :func:`paired` found, as text."""
    if difference is None:
        return "–"
    mean, half = difference
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fill(text: str, tables: Callable[[str], str]) -> str:
    """A document with its tables made anew.

    Args:
        text: has, for each table, the lines <!-- table: NAME --> and <!-- end of table -->.
        tables: from such a NAME to the text between; "" leaves what is there.
    """

    def replace(match: re.Match) -> str:
        made = tables(match[2])
        return f"{match[1]}{made}\n{match[3]}" if made else match[0]

    return _MARKED.sub(replace, text)


def plot(methods: dict[str, dict], path: Path) -> None:
    """A dot for every seed's AP, a line for the mean, one row a method; the teacher dashed."""
    names = [m for m in methods if m != TEACHER][::-1]
    ours = ours_of(methods)
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(names)))
    axes = figure.subplots()
    for y, name in enumerate(names):
        ap = [r["AP"] for r in methods[name].values()]
        color = "C1" if name == ours else "C0"
        axes.plot(ap, [y] * len(ap), "o", color=color, alpha=0.6, markersize=5)
        axes.plot([statistics.fmean(ap)] * 2, [y - 0.3, y + 0.3], color=color)
    for row in methods.get(TEACHER, {}).values():
        axes.axvline(row["AP"], color="0.5", linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("COCO AP (dot: a seed, bar: the mean, dashed: the teacher)")
    figure.savefig(path, dpi=100, bbox_inches="tight")
