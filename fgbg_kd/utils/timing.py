"""How long calls take."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def latency(calls: dict[str, Callable[[int], Any]], runs: int = 30) -> dict[str, float]:
    """Median milliseconds of each call.

    The calls take turns, so that other work on the machine slows all of them alike.

    Args:
        calls: by name. Each gets the number of the run.
        runs: that are measured, after three that are not.
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
