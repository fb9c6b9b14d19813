"""Measures candidates and teacher on this machine, and chooses the largest that is fast enough."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from torch import nn

from ..deploy import ExportedDetector, export
from ..deploy.deployable import dense_view
from ..detectors.dense import view
from ..experiments.cost import size_of
from ..experiments.runner import surroundings
from ..utils.errors import ConfigError, FgBgError
from ..utils.files import read_json, sha256_of_text, write_whole
from ..utils.markdown import table_of
from ..utils.packages import installed
from ..utils.timing import BLOCK, times_in_turn

# Column of the table by the name of a runtime.
RUNTIMES = {"pytorch": "ms", "onnx": "onnx_ms"}
HEADINGS = {
    "parameters_m": "parameters (M)",
    "gflops": "GFLOPs",
    "ms": "ms, PyTorch",
    "onnx_ms": "ms, ONNX Runtime",
    "openvino_ms": "ms, OpenVINO (CPU)",
    "int8_ms": "ms, int8 (CPU)",
    "int8_AP": "AP, int8",
    "speedup": "times as fast, PyTorch",
}
_RUNS = 50  # largest number of runs of a measurement
_SECONDS = 60  # after which no turn begins
# Other work on the machine only makes calls slower. So this quantile is steadier than the median.
_QUANTILE = 0.2
_STEADY = 1.3  # if the teacher's 80 % quantile is over this many 20 % quantiles, a message says so


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
            ConfigError: a value is not over 0, or the runtime is unknown.
        """
        for name in ("speedup", "latency", "parameters"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} is {value}: give a number over 0.")
        if self.runtime not in RUNTIMES:
            raise ConfigError(f"--runtime is {self.runtime!r}: choose from {tuple(RUNTIMES)}.")


def has_onnx() -> bool:
    """Whether ONNX files can be written and run here."""
    return installed("onnx", "onnxruntime")


def image_size(content: dict, test_size: int, limit: int) -> tuple[int, int]:
    """(height, width) of a resized image that has the median proportions of a COCO file.

    A ``test_size`` of 0 leaves images as they are, as in Detectron2.
    """
    shapes = [(i["height"], i["width"]) for i in content["images"]]
    height, width = sorted(shapes, key=lambda s: s[0] / s[1])[len(shapes) // 2]
    if test_size == 0:
        return height, width
    return ResizeShortestEdge.get_output_shape(height, width, test_size, limit)


def measure(
    detectors: Mapping[str, Callable[[], nn.Module]],
    images: Mapping[str, np.ndarray],
    device: str,
    say: Callable[[str], None] = lambda text: None,
    files: Mapping[tuple[str, str], str] | None = None,
) -> list[dict]:
    """Parameters, GFLOPs and milliseconds of detectors for one image. They take turns.

    Args:
        detectors: functions that build them, by name. The first is the teacher.
        images: (H, W, 3) uint8 at the test size of each detector, by name.
        files: exported files that are timed too, by the name of the detector and the column.

    Returns:
        Rows with "name", "parameters_m", "gflops", "ms", "onnx_ms" (None: it has no ONNX file) and
        "speedup", which is the teacher's time divided by the detector's, in PyTorch. ``files`` add
        their columns. Times are 20 % quantiles.
    """
    rows, calls, files = [], {}, files or {}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in detectors.items():
            model = build().to(device).eval()
            say(f"{name} ...")
            channels = len(view(model).normalization[0])
            pixels = images[name][:, :, :channels].copy()  # writable, as PyTorch wants it
            example = {"image": torch.from_numpy(pixels).permute(2, 0, 1).float()}
            rows.append({"name": name, **size_of(model, example)})
            calls[name, "ms"] = _in_pytorch(model, example)
            run = run_in_onnx(model.cpu(), pixels, folder) if has_onnx() else None
            model.to(device)
            if run is not None:
                calls[name, "onnx_ms"] = lambda _, run=run: run()
        for place, file in files.items():
            detector = ExportedDetector(file)
            image = images[place[0]]
            shape = (*(detector.about["input_size"] or image.shape[:2]), 3)
            seen = np.ascontiguousarray(np.resize(image, shape))
            calls[place] = lambda _, run=detector.run, seen=seen: run(seen)
        times = times_in_turn(calls, _RUNS, seconds=_SECONDS, block=BLOCK)
    for row in rows:
        for column in ("ms", "onnx_ms", *dict.fromkeys(column for _, column in files)):
            found = times.get((row["name"], column))
            row[column] = round(float(np.quantile(found, _QUANTILE)), 2) if found else None
        row["speedup"] = round(rows[0]["ms"] / row["ms"], 2)
    low, high = np.quantile(times[rows[0]["name"], "ms"], [_QUANTILE, 1 - _QUANTILE])
    if high > _STEADY * low:
        say(
            f"{rows[0]['name']} takes {low:.1f} to {high:.1f} ms: other work disturbs the "
            "measurement. For steady times, measure on an idle machine, and remove "
            "measured_students.json before."
        )
    return rows


def _in_pytorch(model: nn.Module, example: dict) -> Callable:
    @torch.no_grad()
    def call(_):
        return model([example])

    return call


def run_in_onnx(model: nn.Module, image: np.ndarray, folder: str) -> Callable | None:
    """Exports a detector and returns a function that runs the file on an image.

    Args:
        model: on the CPU, in eval mode.
        image: (H, W, 3) uint8.
        folder: for the file.

    Returns:
        The function; None if this detector cannot be exported (two stages, or grey images).
    """
    file = os.path.join(folder, f"{len(os.listdir(folder))}.onnx")
    try:
        of = dense_view(model)
        about = {
            "categories": [],
            "min_size": min(image.shape[:2]),
            "max_size": max(image.shape[:2]),
            "input_size": list(of.input_size) if of.input_size else None,
            "suppression": of.suppression,
        }
        if of.input_size:
            image = np.resize(image, (*of.input_size, image.shape[2]))
        export(model, about, file, image)
        detector = ExportedDetector(file)
    except (FgBgError, RuntimeError, ValueError):  # what the exporter does not support
        return None
    return lambda: detector.run(image)


def measured(
    cache: Path,
    about: dict[str, Any],
    detectors: Mapping[str, Callable[[], nn.Module]],
    sizes: Mapping[str, tuple[int, int]],
    device: str,
    say: Callable[[str], None],
) -> list[dict]:
    """The rows of :func:`measure` for random pixels, kept in a file.

    They are measured again on another machine, with other versions or another number of threads,
    for another image size, or for other detectors.

    Args:
        cache: JSON file with tables by key.
        about: description of the detectors, as values that JSON can hold.
        sizes: (height, width) of the image of each detector, by name.
    """
    packages = {}
    for name in ("timm", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    machine = surroundings(torch.get_num_threads(), jobs=1)
    shapes = [(name, sizes[name]) for name in detectors]
    about = {**machine, **packages, "device": device, "detectors": shapes, **about}
    key = sha256_of_text(json.dumps(about, sort_keys=True))[:16]
    tables = read_json(cache) if cache.is_file() else {}
    if key not in tables:
        say(f"Measuring {len(detectors)} detectors on this machine: {machine['hardware']}.")
        pixels = np.random.default_rng(0)
        images = {x: pixels.integers(256, size=(*s, 3), dtype=np.uint8) for x, s in shapes}
        tables[key] = {"about": about, "rows": measure(detectors, images, device, say)}
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(tables, indent=1))
    else:
        say(f"The candidates were measured before. Their table is read from {cache}.")
    return tables[key]["rows"]


def refined(
    rows: list[dict],
    wish: Wish,
    finer: Callable[[str], list[str]],
    measure_pair: Callable[[str, str], list[dict]],
) -> list[dict]:
    """Adds candidates between the chosen one and the next larger one, by bisection.

    Without them, the student can be much faster than the user asks. Each is measured together with
    the chosen one. So it does not matter if the machine is now slower than when ``rows`` were
    measured.

    Args:
        rows: those of :func:`measure`. The first is the teacher.
        finer: function from the name of a candidate to the names of larger ones, fast to slow.
        measure_pair: function from the names of two candidates to their rows.
    """
    try:
        taken = choose(rows, wish)
    except ConfigError:  # is raised again when the table is shown
        return rows
    known = {row["name"] for row in rows}
    names = [name for name in finer(taken["name"]) if name not in known]
    low, high = 0, len(names)
    while low < high and (wish.speedup or wish.latency):
        middle = (low + high) // 2
        again, row = measure_pair(taken["name"], names[middle])
        row = dict(row)
        for column in RUNTIMES.values():
            if row[column] and again[column]:
                row[column] = round(row[column] * taken[column] / again[column], 2)
        row["speedup"] = round(rows[0]["ms"] / row["ms"], 2)
        rows = [*rows, row]
        if _fitting([row], rows[0], wish):
            low = middle + 1
        else:
            high = middle
    return rows


def _fitting(candidates: Sequence[dict], teacher: dict, wish: Wish) -> list[dict]:
    """The rows that meet a wish."""
    column, infinity = RUNTIMES[wish.runtime], float("inf")
    small = [r for r in candidates if r["parameters_m"] <= (wish.parameters or infinity)]
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
    small = [r for r in candidates if r["parameters_m"] <= (wish.parameters or float("inf"))]
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


def _check_timed(timed: list[dict], teacher: dict, wish: Wish) -> None:
    """Refuses a wish for a runtime in which nothing was measured."""
    if not timed:
        raise ConfigError(
            "--runtime onnx: no candidate was measured in ONNX Runtime. It needs the packages onnx "
            "and onnxruntime: pip install -e '.[export]'."
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
    """The table of candidates in Markdown. An arrow marks the one that is taken."""
    shown = []
    for row in rows:
        cells = {k: "–" if v is None else v for k, v in row.items()}
        shown.append(cells | {"": "<- taken" if row["name"] == taken else ""})
    return table_of(shown, HEADINGS)
