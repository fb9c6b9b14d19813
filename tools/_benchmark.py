"""Functions that the benchmarks share: timing, random boxes, tables."""

import csv
import math
import time
from pathlib import Path

import torch

from fgbg_kd.utils.markdown import table_of
from fgbg_kd.utils.timing import times_in_turn, wall_clock


def quantiles(function, device: str, seconds: float, ahead=0.0) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles of the time per call in ms, after three warm-up calls.

    Args:
        device: "cuda": GPU time is measured. "cpu": wall-clock time is measured.
        seconds: duration of the measurement.
        ahead: seconds that a GPU sleeps before each call, so that the host can issue all work
            before the GPU starts.
    """
    return quantiles_in_turn({"": function}, device, seconds, ahead)[""]


def quantiles_in_turn(calls: dict, device: str, seconds: float, ahead: float = 0.0) -> dict:
    """:func:`quantiles` of several functions by name, which are called in turn."""
    numbered = {name: lambda _, function=function: function() for name, function in calls.items()}
    times = times_in_turn(
        numbered, 500, lambda call: milliseconds(call, device, ahead), seconds * len(calls)
    )
    at = torch.tensor([0.2, 0.5, 0.8])
    return {
        name: tuple(round(v, 3) for v in torch.tensor(found).quantile(at).tolist())
        for name, found in times.items()
    }


def host_seconds(function) -> float:
    """Seconds that the host needs to issue a function's work to the GPU (median of five)."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()  # the host alone: the GPU is not waited for
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def milliseconds(function, device: str, ahead: float = 0.0) -> float:
    """Time of one call; see :func:`quantiles`."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(int(ahead * 2e9))  # in cycles, at 2 GHz
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    return wall_clock(function)


def random_boxes(count: int, height: int, width: int, generator) -> torch.Tensor:
    """(count, 4) XYXY, sides from 8 pixels to half the image, log-uniform."""
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(height / 16)) * 8
    return torch.cat([corner - side / 2, corner + side / 2], dim=1)


def show(rows: list[dict], path: Path | None) -> None:
    """Prints rows as a table, and writes them as CSV if there is a path."""
    print(f"\n{table_of(rows)}")
    if path:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def rounded(row: dict) -> dict:
    """The row with its numbers rounded to three decimal places."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def describe(device: str) -> None:
    """Prints the device and versions on which the times depend."""
    if device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
