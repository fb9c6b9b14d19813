"""Chooses the largest measured candidate that meets the user's wish."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..utils.errors import ConfigError
from ..utils.markdown import table_of
from .measure import HEADINGS, has_onnx

# Column of the table by the name of a runtime.
RUNTIMES = {"pytorch": "ms", "onnx": "onnx_ms"}
_ROUNDS = 2  # each exports the teacher to ONNX again, so few rounds are fast


@dataclass(frozen=True)
class Wish:
    """What the user asks of the student. None: no wish.

    Attributes:
        speedup: how many times as fast as the teacher.
        latency: milliseconds per image at most.
        parameters: millions of parameters at most.
        runtime: where speed-up and latency are measured, "pytorch" or "onnx".
    """

    speedup: float | None = None
    latency: float | None = None
    parameters: float | None = None
    runtime: str = "pytorch"

    def __str__(self) -> str:
        named = ("speedup", "latency", "parameters")
        return " ".join(f"--{n} {v:g}" for n in named if (v := getattr(self, n)) is not None)

    def check(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: a value is not over 0, or the runtime is unknown or not installed.
        """
        for name in ("speedup", "latency", "parameters"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} is {value}: give a number over 0.")
        if self.runtime not in RUNTIMES:
            raise ConfigError(f"--runtime is {self.runtime!r}: choose from {tuple(RUNTIMES)}.")
        if self.runtime == "onnx" and not has_onnx():
            raise ConfigError(
                "--runtime onnx needs the packages onnx and onnxruntime: pip install -e "
                "'.[export]'."
            )


def refined(
    rows: list[dict],
    wish: Wish,
    finer: Callable[[str], list[str]],
    measure_again: Callable[[list[str]], list[dict]],
) -> list[dict]:
    """Adds candidates between the chosen one and the next larger one.

    Without them, the student can be much faster than the user asks. In each of two rounds, three
    candidates are measured together with the teacher. They divide the rest of the list into
    quarters. Their times are scaled to the first times of the teacher. So it does not matter if the
    machine is now slower than when ``rows`` were measured.

    Args:
        rows: those of :func:`measure`. The first is the teacher.
        finer: function from the name of a candidate to the names of larger ones, fast to slow.
        measure_again: function from names of candidates to the rows of the teacher and of these.
    """
    if not (wish.speedup or wish.latency):
        return rows
    try:
        taken = choose(rows, wish)
    except ConfigError:  # is raised again when the table is shown
        return rows
    known = {row["name"] for row in rows}
    names = [name for name in finer(taken["name"]) if name not in known]
    low, high = 0, len(names)
    for _ in range(_ROUNDS):
        if low == high:
            break
        places = sorted({low + (high - low) * k // 4 for k in (1, 2, 3)})
        teacher, *measured = measure_again([names[i] for i in places])
        measured = [_at_the_speed_of(rows[0], row, teacher) for row in measured]
        rows = [*rows, *measured]
        for i, row in zip(places, measured):
            if not _fitting([row], rows[0], wish):
                high = i
                break
            low = i + 1
    return rows


def _at_the_speed_of(teacher: dict, row: dict, again: dict) -> dict:
    """A row with times scaled to those of the teacher in another measurement.

    Args:
        teacher: its row in the other measurement.
        again: its row in the measurement of ``row``.
    """
    scaled = {
        column: round(row[column] * teacher[column] / again[column], 2)
        for column in RUNTIMES.values()
        if row[column] and teacher[column] and again[column]
    }
    return row | scaled


def _small(candidates: Sequence[dict], wish: Wish) -> list[dict]:
    """The rows with few enough parameters."""
    most = wish.parameters or float("inf")
    return [row for row in candidates if row["parameters_m"] <= most]


def _fitting(candidates: Sequence[dict], teacher: dict, wish: Wish) -> list[dict]:
    """The rows that meet a wish."""
    column, infinity = RUNTIMES[wish.runtime], float("inf")
    small = _small(candidates, wish)
    if not (wish.speedup or wish.latency):
        return small
    most = min(
        wish.latency or infinity, teacher[column] / wish.speedup if wish.speedup else infinity
    )
    return [r for r in small if r[column] is not None and r[column] <= most]


def choose(rows: Sequence[dict], wish: Wish) -> dict:
    """The largest candidate that meets a wish.

    Its backbone is that of the candidate with the most parameters. Of the candidates with this
    backbone, it has the most GFLOPs.

    Args:
        rows: those of :func:`measure`. The first is the teacher.

    Raises:
        ConfigError: no candidate meets the wish. The message names the nearest one.
    """
    teacher, *candidates = rows
    small = _small(candidates, wish)
    if not small:
        least = min(candidates, key=lambda r: r["parameters_m"])
        raise ConfigError(
            f"No candidate has at most {wish.parameters:g} M parameters: the smallest, "
            f"{least['name']}, has {least['parameters_m']} M. Raise --parameters, or give only "
            "--student NAME."
        )
    timed = [r for r in small if r[RUNTIMES[wish.runtime]] is not None]
    if wish.speedup or wish.latency:
        _check_timed(timed, teacher, wish)
    fits = _fitting(small, teacher, wish)
    if not fits:
        raise _too_slow(min(timed, key=lambda r: r[RUNTIMES[wish.runtime]]), teacher, wish)
    largest = max(fits, key=lambda r: (r["parameters_m"], r["gflops"]))
    backbone = largest["name"].split(",")[0]
    return max((r for r in fits if r["name"].split(",")[0] == backbone), key=lambda r: r["gflops"])


def verdict(student: dict, teacher: dict, wish: Wish) -> str:
    """Whether the trained student meets a wish; "" if there is none.

    Args:
        student, teacher: rows of :func:`measure`.
    """
    if not str(wish):
        return ""
    column = RUNTIMES[wish.runtime]
    facts = [f"{student['parameters_m']} M parameters"]
    if student[column] is not None:
        facts.append(f"{student[column]} ms")
        if teacher[column] is not None:
            facts.append(f"{teacher[column] / student[column]:.2f} times as fast as the teacher")
    met = "meets" if _fitting([student], teacher, wish) else "does not meet"
    return f"The student {met} {wish} (--runtime {wish.runtime}): {', '.join(facts)}."


def _check_timed(timed: list[dict], teacher: dict, wish: Wish) -> None:
    """Refuses a wish for a runtime in which nothing was measured."""
    if not timed:
        raise ConfigError(
            "--runtime onnx: no candidate can be exported to ONNX. Give --runtime pytorch, or "
            "another --student."
        )
    if wish.speedup and teacher[RUNTIMES[wish.runtime]] is None:
        raise ConfigError(
            "--speedup with --runtime onnx: the teacher has no ONNX file, so there is nothing to "
            "compare with. Give --latency, or --runtime pytorch."
        )


def _too_slow(fastest: dict, teacher: dict, wish: Wish) -> ConfigError:
    column = RUNTIMES[wish.runtime]
    times = ""
    if teacher[column] is not None:
        ratio = teacher[column] / fastest[column]
        times = f", {ratio:.1f} times as fast as the teacher"
    return ConfigError(
        f"No candidate meets {wish}: the fastest, {fastest['name']}, takes {fastest[column]} ms"
        f"{times}. Lower --speedup, raise --latency, name another --student, or give smaller "
        "images (INPUT.MIN_SIZE_TEST in the teacher's config)."
    )


def table(rows: Sequence[dict], taken: str = "") -> str:
    """Rows in Markdown. An arrow marks the candidate that is taken; "": no arrow."""
    shown = []
    for row in rows:
        cells = {k: "–" if v is None else v for k, v in row.items()}
        arrow = {"": "<- taken" if row["name"] == taken else ""} if taken else {}
        shown.append(cells | arrow)
    return table_of(shown, HEADINGS)
