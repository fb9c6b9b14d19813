"""What the benchmarks share: timing, random boxes, and a table of rows."""

import csv
import math
import time
from pathlib import Path

import torch


def quantiles(function, device: str, seconds: float, ahead=0.0) -> tuple[float, float, float]:
    """p20, p50, p80 in milliseconds, after warming up.

    Args:
        ahead: on a GPU, how many seconds it sleeps before each run, so that it does not wait for
            the host in between.
    """
    return quantiles_in_turn({"": function}, device, seconds, ahead)[""]


def quantiles_in_turn(calls: dict, device: str, seconds: float, ahead: float = 0.0) -> dict:
    """:func:`quantiles` of several functions by name, called in turn: what else the machine does
    meets all of them alike."""
    for function in calls.values():
        for _ in range(3):
            function()
    times, stop = {name: [] for name in calls}, time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or (time.perf_counter() < stop and rounds < 500):
        rounds += 1
        for name, function in calls.items():
            times[name].append(milliseconds(function, device, ahead))
    at = torch.tensor([0.2, 0.5, 0.8])
    return {
        name: tuple(round(v, 3) for v in torch.tensor(found).quantile(at).tolist())
        for name, found in times.items()
    }


def host_seconds(function) -> float:
    """Median of five: how long the host takes to issue the work of a function to the GPU."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(milliseconds(function, "cpu") / 1000)
    return sorted(times)[2]


def milliseconds(function, device: str, ahead: float = 0.0) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(int(ahead * 2e9))  # cycles, of at most 2 GHz
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def random_boxes(count: int, height: int, width: int, generator) -> torch.Tensor:
    """(count, 4) XYXY, sides from 8 pixels to half the image, log-uniform."""
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(height / 16)) * 8
    return torch.cat([corner - side / 2, corner + side / 2], dim=1)


def show(rows: list[dict], path: Path | None) -> None:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |")
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def rounded(row: dict) -> dict:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def describe(device: str) -> None:
    """Prints what the times depend on."""
    if device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
