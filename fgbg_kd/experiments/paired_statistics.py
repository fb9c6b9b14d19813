"""Means over seeds, and differences between two methods, paired by seed."""

import math
import statistics
from collections.abc import Callable, Sequence

# A mean, and half the width of its 95 % confidence interval. A single value has no interval: None.
Estimate = tuple[float, float | None]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom. More degrees use the last
# quantile, so their intervals are slightly too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045, 2.042)  # fmt: skip


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of values, and half the width of its 95 % confidence interval by Student's t.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        (2.0, 2.484...)
    """
    n = len(values)
    if n < 2:
        return statistics.fmean(values), None
    t = _T[min(n - 1, len(_T)) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def paired_difference(a: dict[int, float], b: dict[int, float]) -> Estimate | None:
    """:func:`mean_interval` of a - b over the shared seeds; None if they share no seed.

    Args:
        a, b: {seed: value}.
    """
    seeds = sorted(a.keys() & b.keys())
    return mean_interval([a[s] - b[s] for s in seeds]) if seeds else None


def average(
    rows: Sequence[dict], key: str, how: Callable[[list[float]], float] = statistics.fmean
) -> float | None:
    """Mean (or ``how``) of a key over the rows with a value for it; None if no row has a value."""
    values = [r[key] for r in rows if r.get(key) is not None]
    return how(values) if values else None
