"""The gate: how far the student follows the teacher at each cell."""

import torch
from torch import Tensor

from .split import Split


@torch.no_grad()
def teacher_gate(student: Tensor, teacher: Tensor, cells: Split) -> Tensor:
    """The gate g: the teacher's lead on an object, and 1 on most of the background.

    - All cells of an object share max(0, t - s). t and s are the highest qualities of teacher and
      student in the cells of the object. A detector predicts an object in few of its cells. In its
      other cells, a comparison would be noise.
    - A background cell has min(1, t / s), with its own qualities. So g is clearly lower only where
      the teacher gives a high score to an object that is not there, and the student a lower one.

    Args:
        student, teacher: (N, R) qualities in [0, 1] (:func:`fgbg_kd.ops.prediction_quality`).
        cells: the split of the same cells.

    Returns:
        (N, R) in [0, 1], without a gradient. It is 0 on padding.
    """
    lead = (cells.best_of_box(teacher) - cells.best_of_box(student)).clamp(min=0)  # (N, B)
    ratio = torch.where(teacher >= student, 1.0, teacher / student)
    return torch.where(cells.foreground, cells.owner(lead), torch.where(cells.background, ratio, 0))
