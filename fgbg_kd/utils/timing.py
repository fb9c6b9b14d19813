"""Measures the latency of calls."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

BLOCK = 5  # runs of a call in a turn, where calls of different runtimes take turns
# Seconds before a block. After a call, idle threads of ONNX Runtime stay busy for about 40 ms, and
# those of PyTorch for about 8 ms. They would slow down the next call.
_REST = 0.05


def latency(calls: dict[str, Callable[[int], Any]], runs: int = 30) -> dict[str, float]:
    """Median latency of each call, in milliseconds.

    Args:
        calls: by name. Each gets the number of the run.
        runs: number of measured runs.
    """
    times = times_in_turn(calls, runs, block=BLOCK)
    return {name: float(np.median(x)) for name, x in times.items()}


def times_in_turn(
    calls: dict[str, Callable[[int], Any]],
    runs: int,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    seconds: float = float("inf"),
    block: int = 1,
) -> dict[str, list[float]]:
    """Milliseconds of each run of each call, after three runs to warm up.

    The calls take turns, so that other work on the machine slows all of them alike.

    Args:
        calls: by name. Each gets the number of the run.
        runs: number of measured runs at most.
        timer: from a call to milliseconds; None: :func:`wall_clock`.
        seconds: after which no turn begins. At least five runs and one whole turn are measured.
        block: runs of a call in a turn. Before a block of more than one run, nothing runs for
            50 ms, until the threads of the previous call sleep.
    """
    timer = timer or wall_clock
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(3):
        for call in calls.values():
            call(i)
    stop = time.perf_counter() + seconds
    for first in range(0, runs, block):
        if first >= 5 and time.perf_counter() > stop:
            break
        for name, call in calls.items():
            if block > 1:
                time.sleep(_REST)
            for i in range(first, min(first + block, runs)):
                times[name].append(timer(lambda call=call, i=i: call(i)))
    return times


def wall_clock(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, with the work that it leaves to the GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
