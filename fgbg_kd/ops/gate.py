"""The gate: how far the student follows the teacher at each cell."""

from typing import NamedTuple

import torch
from torch import Tensor

from .split import Split


class Gate(NamedTuple):
    """The gate of each cell, and what it was made from.

    Attributes:
        value: (N, R) g in [0, 1], without a gradient; 0 on padding.
        lead: (N, R) max(0, t - s) on foreground cells, see :func:`teacher_gate`; 0 elsewhere.
            None: there is no gate.
    """

    value: Tensor
    lead: Tensor | None = None


@torch.no_grad()
def teacher_gate(student: Tensor, teacher: Tensor, cells: Split) -> Gate:
    """The gate g of each cell. On an object, it is the missing share of the teacher's score.

    - All cells of an object share max(0, 1 - s / t). s and t are the highest qualities of student
      and teacher in the cells of the object. A detector predicts an object in few of its cells. In
      its other cells, a comparison would be noise.
    - A background cell has min(1, t / s), with its own qualities. So g is clearly lower only where
      the teacher gives a high score to an object that is not there, and the student a lower one.

    Args:
        student, teacher: (N, R) qualities in [0, 1] (:func:`fgbg_kd.ops.prediction_quality`).
        cells: the split of the same cells.
    """
    s, t = cells.best_of_box(student), cells.best_of_box(teacher)  # (N, B)
    background = torch.where(cells.background, _share(teacher, student), 0)
    value = torch.where(cells.foreground, cells.owner(1 - _share(s, t)), background)
    return Gate(value, torch.where(cells.foreground, cells.owner((t - s).clamp(min=0)), 0))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, but at most 1. It is 1 if both are 0."""
    return torch.where(part >= whole, 1.0, part / whole)
