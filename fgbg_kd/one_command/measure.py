"""Measures candidates and teacher on this machine: parameters, GFLOPs and latency."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
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
from ..utils.files import read_json, sha256_of_text, write_whole
from ..utils.packages import installed
from ..utils.timing import BLOCK, times_in_turn

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
_SECONDS = 30  # of each runtime, after which no turn begins
# Other work on the machine only makes calls slower. So this quantile is steadier than the median.
_QUANTILE = 0.2
_STEADY = 1.3  # if the teacher's 80 % quantile is over this many 20 % quantiles, a message says so


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
            run = None
            if has_onnx():
                run = run_in_onnx(model.cpu(), images[name].copy(), folder, device)
            model.to(device)
            if run is not None:
                calls[name, "onnx_ms"] = lambda _, run=run: run()
        for place, file in files.items():
            detector = ExportedDetector(file, device)
            image = images[place[0]]
            shape = (*(detector.about["input_size"] or image.shape[:2]), 3)
            seen = np.ascontiguousarray(np.resize(image, shape))
            calls[place] = lambda _, run=detector.run, seen=seen: run(seen)
        columns, times = ["ms", "onnx_ms", *dict.fromkeys(column for _, column in files)], {}
        # Each runtime has turns of its own, so that busy threads of one do not slow another.
        for column in columns:
            turn = {place: call for place, call in calls.items() if place[1] == column}
            times |= times_in_turn(turn, _RUNS, seconds=_SECONDS, block=BLOCK)
    for row in rows:
        for column in columns:
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


def run_in_onnx(
    model: nn.Module, image: np.ndarray, folder: str, device: str = ""
) -> Callable | None:
    """Exports a detector and returns a function that runs the file on an image.

    Args:
        model: on the CPU, in eval mode.
        image: (H, W, 3) uint8.
        folder: for the file.
        device: "cpu": the file runs on the CPU. Otherwise it runs on a GPU if there is one.

    Returns:
        The function; None if this detector cannot be exported, because it has two stages.
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
        detector = ExportedDetector(file, device)
    except Exception:  # the exporter raises many types
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
    text = json.dumps(about, sort_keys=True)
    key, about = sha256_of_text(text)[:16], json.loads(text)
    tables = read_json(cache) if cache.is_file() else {}
    if key not in tables:
        say(f"Measuring {len(detectors)} detectors on this machine: {machine['hardware']}.")
        pixels = np.random.default_rng(0)
        images = {x: pixels.integers(256, size=(*s, 3), dtype=np.uint8) for x, s in shapes}
        rows = measure(detectors, images, device, say)
        _compare_teacher(rows[0], about, tables.values(), say)
        tables[key] = {"about": about, "rows": rows}
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(tables, indent=1))
    else:
        say(f"The candidates were measured before. Their table is read from {cache}.")
    return tables[key]["rows"]


def _compare_teacher(row: dict, about: dict, tables: Iterable[dict], say: Callable) -> None:
    """Says so if an earlier table has another time for the same teacher on this machine."""

    def same(table: dict) -> bool:
        keys = about.keys() - {"detectors", "students", "facts"}
        other = table["about"]
        sizes = about["detectors"][0], other["detectors"][0]  # those of the teacher
        return sizes[0] == sizes[1] and all(other.get(k) == about[k] for k in keys)

    times = [row["ms"], *(table["rows"][0]["ms"] for table in tables if same(table))]
    if max(times) > _STEADY * min(times):
        say(
            f"{row['name']} takes {row['ms']:.1f} ms now. Another table in measured_students.json "
            f"has {max(times[1:], key=lambda x: abs(x - row['ms'])):.1f} ms: other work disturbed "
            "one of them. Remove measured_students.json, and measure again on an idle machine."
        )
