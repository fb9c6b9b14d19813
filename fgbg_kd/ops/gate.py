"""The gate: it selects the cells in which the teacher's prediction is better."""

import torch
from torch import Tensor

from .split import Split

MODES = ("cell", "object", "image")


@torch.no_grad()
def teacher_gate(
    student: Tensor, teacher: Tensor, cells: Split, *, mode: str, margin: float
) -> Tensor:
    """1 where the teacher's quality > the student's quality + margin, else 0.

    Args:
        student, teacher: (N, R) qualities (:func:`fgbg_kd.ops.prediction_quality`).
        cells: the split of the same cells.
        mode: the cells that share one decision, by their mean advantage. "cell": each cell decides
            alone. "object": all cells of a box; each background cell decides alone. "image": all
            foreground cells of an image, and separately all its background cells.
        margin: the advantage (teacher's quality - student's quality) must exceed it. A negative
            margin allows a worse teacher.

    Returns:
        (N, R) float32, without a gradient. It is 0 on padding.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: choose one of {MODES}.")
    real = (cells.foreground | cells.background).float()
    advantage = teacher - student
    if mode == "object":
        owner, num_boxes = cells.box_index.clamp(min=0).long(), cells.boxes.shape[1]
        mean = _group_mean(advantage, owner, num_boxes, cells.foreground)
        advantage = torch.where(cells.foreground, mean, advantage)
    elif mode == "image":
        whole = torch.zeros_like(cells.box_index, dtype=torch.long)
        fg = _group_mean(advantage, whole, 1, cells.foreground)
        bg = _group_mean(advantage, whole, 1, cells.background)
        advantage = torch.where(cells.foreground, fg, bg)
    return real * (advantage > margin)


def _group_mean(value: Tensor, group: Tensor, num_groups: int, mask: Tensor) -> Tensor:
    """(N, R): for each cell, the mean of the masked values in its image and group."""
    zeros = value.new_zeros(len(value), num_groups)
    total, count = (zeros.scatter_add(1, group, x) for x in (value * mask, mask.to(value.dtype)))
    return (total / count.clamp(min=1)).gather(1, group)
