"""Measures the latency of calls."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def latency(calls: dict[str, Callable[[int], Any]], runs: int = 30) -> dict[str, float]:
    """Median latency of each call, in milliseconds.

    The calls alternate, so that other work on the machine slows all of them equally.

    Args:
        calls: functions by name. Each gets the index of the run.
        runs: number of measured runs, after three warm-up runs.
    """
    times = {name: [] for name in calls}
    for i in range(runs + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(x[3:])) for name, x in times.items()}
