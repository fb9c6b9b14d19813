"""The gate: how far the student follows the teacher at each cell."""

import torch
from torch import Tensor

from .split import Split


@torch.no_grad()
def teacher_gate(student: Tensor, teacher: Tensor, cells: Split) -> Tensor:
    """The gate g of each cell. On an object, it is min(1, 2 t) or 0.

    - All cells of an object have min(1, 2 t) if t > s, otherwise 0. s and t are the highest
      qualities of student and teacher in the cells of the object. A detector predicts an object in
      few of its cells. In its other cells, a comparison would be noise. A teacher with a score of
      1/2 or more is sure of the object.
    - A background cell has min(1, t / s), with its own qualities. So g is clearly lower only where
      the teacher gives a high score to an object that is not there, and the student a lower one.

    Args:
        student, teacher: (N, R) qualities in [0, 1] (:func:`fgbg_kd.ops.prediction_quality`).
        cells: the split of the same cells.

    Returns:
        (N, R) in [0, 1], without a gradient; 0 on padding.
    """
    s, t = cells.best_of_box(student), cells.best_of_box(teacher)  # (N, B)
    followed = torch.where(t > s, (2 * t).clamp(max=1), 0 * (s + t))  # 0, but a NaN stays visible
    share = torch.where(teacher >= student, 1.0, teacher / student)  # 1 if both are 0
    return torch.where(cells.foreground, cells.owner(followed), cells.background * share)
