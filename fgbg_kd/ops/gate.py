"""The gate: the student learns only where the teacher's prediction is better, with a tolerance."""

import torch
from torch import Tensor

from . import Split


@torch.no_grad()
def teacher_gate(
    student: Tensor,
    teacher: Tensor,
    split: Split,
    *,
    mode: str = "cell",
    margin: float = 0.0,
    softness: float = 0.0,
) -> Tensor:
    """Where the teacher is better: 1 if quality of teacher > quality of student + margin, else 0.

    Args:
        student, teacher: (N, R) qualities (:func:`fgbg_kd.ops.compare_predictions`).
        mode: over what the advantage of the teacher is averaged first: "cell": nothing; "object":
            all cells of a box (background cells stay on their own); "image": the foreground cells
            of an image, and its background cells.
        margin: how much better the teacher must be; negative: how much worse it may be.
        softness: over 0, the gate is sigmoid((advantage - margin) / softness) instead.

    Returns:
        (N, R) float32 in [0, 1]; 0 on padding. Carries no gradient.
    """
    real = (split.foreground | split.background).float()
    advantage = teacher - student
    if mode == "object":
        owner, boxes = split.box_index.clamp(min=0).long(), split.boxes.shape[1]
        mean = _group_mean(advantage, owner, boxes, split.foreground)
        advantage = torch.where(split.foreground, mean, advantage)
    elif mode == "image":
        everything = torch.zeros_like(split.box_index, dtype=torch.long)
        fg = _group_mean(advantage, everything, 1, split.foreground)
        bg = _group_mean(advantage, everything, 1, split.background)
        advantage = torch.where(split.foreground, fg, bg)
    elif mode != "cell":
        raise ValueError(f"mode is {mode!r}: it can be 'cell', 'object' or 'image'.")
    if softness > 0:
        return real * ((advantage - margin) / softness).sigmoid()
    return real * (advantage > margin)


def _group_mean(value: Tensor, group: Tensor, num_groups: int, mask: Tensor) -> Tensor:
    """(N, R): mean of the masked values of the same image and group, spread to its cells."""
    zeros = value.new_zeros(len(value), num_groups)
    total, count = (zeros.scatter_add(1, group, x) for x in (value * mask, mask.to(value.dtype)))
    return (total / count.clamp(min=1)).gather(1, group)
