"""The gate: the student learns only where the teacher's prediction is better than its own.

It compares qualities, not heads, so an FCOS teacher can gate a RetinaNet student.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ops import Split


@torch.no_grad()
def prediction_quality(
    detector: nn.Module,
    features: Sequence[Tensor],
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    split: Split,
    gt_classes: Tensor,
    strides: Sequence[int],
) -> Tensor:
    """How good a dense detector's prediction is at each cell, in [0, 1].

    - On a foreground cell owned by box b: the largest, over anchors, of
      sigmoid(logit of b's class) * IoU(decoded box, b).
    - On a background (or padding) cell: 1 - the largest sigmoid(logit) over anchors and classes.

    Args:
        detector: a Detectron2 DenseDetector; its anchors and box transform decode the deltas.
        features: per level (N, C, H_l, W_l), for the anchors' positions.
        logits, deltas: per level (N, A*K, H_l, W_l) and (N, A*4, H_l, W_l).
        split: of the same cells.
        gt_classes: (N, B) int64.
        strides: per level; the detector may have more levels.

    Returns:
        (N, R) float32.
    """
    num_classes = detector.num_classes
    anchors = _anchors(detector.anchor_generator, features, strides)  # per level (H*W*A, 4)
    score, overlap, objectness = [], [], []
    sizes = [h * w for h, w in split.level_shapes]
    owner_class = split.owner(gt_classes).split(sizes, dim=1)
    owner_box = split.owner(split.boxes).split(sizes, dim=1)
    for level, (logit, delta) in enumerate(zip(logits, deltas)):
        logit = _per_anchor(logit, num_classes)  # (N, HW, A, K)
        objectness.append(logit.flatten(2).amax(2))
        index = owner_class[level][..., None, None].expand(*logit.shape[:3], 1)
        score.append(logit.gather(3, index).squeeze(3).sigmoid())  # (N, HW, A)
        delta = _per_anchor(delta, 4)
        boxes = detector.box2box_transform.apply_deltas(
            delta.reshape(-1, 4), anchors[level].tensor.float().repeat(len(delta), 1)
        ).reshape(delta.shape)
        overlap.append(_iou(boxes, owner_box[level][:, :, None]))
    foreground = torch.cat([(p * iou).amax(2) for p, iou in zip(score, overlap)], dim=1)
    background = 1 - torch.cat(objectness, dim=1).sigmoid()
    return torch.where(split.foreground, foreground, background)


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
        student, teacher: (N, R) qualities.
        mode: over what the advantage of the teacher is averaged first: "cell": nothing; "object":
            all cells of a box (background cells stay on their own); "image": the foreground cells
            of an image, and its background cells.
        margin: how much better the teacher must be.
        softness: over 0, the gate is sigmoid((advantage - margin) / softness) instead.

    Returns:
        (N, R) float32 in [0, 1]; 0 on padding. Carries no gradient.
    """
    real = (split.foreground | split.background).float()
    advantage = teacher - student
    if mode == "object":
        mean = _group_mean(advantage, split.box_index.clamp(min=0).long(), split.foreground)
        advantage = torch.where(split.foreground, mean, advantage)
    elif mode == "image":
        everything = torch.zeros_like(split.box_index, dtype=torch.long)
        fg = _group_mean(advantage, everything, split.foreground)
        bg = _group_mean(advantage, everything, split.background)
        advantage = torch.where(split.foreground, fg, bg)
    elif mode != "cell":
        raise ValueError(f"mode is {mode!r}: it can be 'cell', 'object' or 'image'.")
    if softness > 0:
        return real * ((advantage - margin) / softness).sigmoid()
    return real * (advantage > margin)


def _group_mean(value: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """(N, R): mean of the masked values of the same image and group, spread to its cells."""
    total, count = (
        torch.zeros_like(value).scatter_add(1, group, x) for x in (value * mask, mask.float())
    )
    return (total / count.clamp(min=1)).gather(1, group)


def _anchors(generator: nn.Module, features: Sequence[Tensor], strides: Sequence[int]) -> list:
    """Anchors of some of a detector's levels: to the others the generator sees empty maps."""
    maps = dict(zip(strides, features))
    levels = [maps.get(s, features[0][..., :0, :0]) for s in generator.strides]
    return [a for s, a in zip(generator.strides, generator(levels)) if s in maps]


def _per_anchor(x: Tensor, channels: int) -> Tensor:
    """(N, A*channels, H, W) -> (N, H*W, A, channels) in fp32, the order of the anchors."""
    n, _, h, w = x.shape
    x = x.float().reshape(n, -1, channels, h * w)
    return x.permute(0, 3, 1, 2)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes pair by pair, (..., 4) with (..., 4), XYXY; 0 where both are empty."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    inter = size.prod(-1)
    area = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return inter / (area[0] + area[1] - inter).clamp(min=1e-6)
