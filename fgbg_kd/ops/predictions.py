"""Compares the predictions of student and teacher per cell: KL divergence and quality.

Shapes: N images, L levels of (H_l, W_l) cells, R = sum of H_l * W_l, K classes, A_l anchors per
cell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .common import accumulation_dtype, use_triton
from .split import Split

Maps = Sequence[Tensor]  # one per level


class Comparison(NamedTuple):
    """Result of :func:`compare_predictions`; each (N, R) in fp32 or better.

    Attributes:
        kl: the divergence on background cells, 0 elsewhere. Only it has a gradient.
        student_quality, teacher_quality: :func:`prediction_quality`, without a gradient.
    """

    kl: Tensor | None = None
    student_quality: Tensor | None = None
    teacher_quality: Tensor | None = None


def compare_predictions(
    student: Maps,
    teacher: Maps,
    cells: Split,
    gt_classes: Tensor,
    num_classes: int,
    *,
    boxes: tuple[Maps, Maps] | None = None,
    same_anchors: bool = True,
    kl: str | None = "sigmoid",
    temperature: float = 1.0,
    quality: bool = True,
    impl: str = "auto",
) -> Comparison:
    """KL(teacher || student) on background cells, and the quality of both on all cells.

    KL and quality need all logits, so one pass over the logits computes both.

    Args:
        student, teacher: per level (N, A_l*K, H_l, W_l) class logits.
        cells: the split of the same cells.
        gt_classes: (N, B) int64, classes of the boxes in ``cells.boxes``.
        num_classes: K.
        boxes: decoded boxes of student and teacher, per level (N, A_l*4, H_l, W_l), XYXY in pixels.
            Quality on foreground is then class score times IoU. None: class score alone.
        same_anchors: False: student and teacher have different anchors (RetinaNet and FCOS). The
            KL then compares the largest logit of each class over the anchors of a cell.
        kl, temperature: see :func:`kl_divergence`. kl None: no KL.
        quality: whether to compute qualities.
        impl: "torch": plain PyTorch, the definition. "triton": fused. "auto": Triton on CUDA.
    """
    if kl not in (None, "sigmoid", "softmax"):
        raise ValueError(f"kl is {kl!r}: choose 'sigmoid', 'softmax' or None.")
    rest = (cells, gt_classes, num_classes)
    if kl and not same_anchors:
        found = compare_predictions(
            student, teacher, *rest, boxes=boxes, kl=None, quality=quality, impl=impl
        )
        best = [[_best_anchor(x, num_classes) for x in maps] for maps in (student, teacher)]
        apart = compare_predictions(
            best[0], best[1], *rest, kl=kl, temperature=temperature, quality=False, impl=impl
        )
        return found._replace(kl=apart.kl)
    if use_triton(impl, student[0]):
        from .predictions_triton import compare  # imported on first use: Triton is optional

        return Comparison(*compare(student, teacher, boxes, *rest, kl, temperature, quality))
    return _compare_plain(student, teacher, boxes, *rest, kl, temperature, quality)


def _compare_plain(
    student: Maps,
    teacher: Maps,
    boxes: tuple[Maps, Maps] | None,
    cells: Split,
    gt_classes: Tensor,
    num_classes: int,
    kl: str | None,
    temperature: float,
    quality: bool,
) -> Comparison:
    """The definition, in plain PyTorch."""
    found = Comparison()
    if kl:
        apart = [
            kl_divergence(s, t.detach(), num_classes, kl, temperature).flatten(1)
            for s, t in zip(student, teacher)
        ]
        found = found._replace(kl=torch.where(cells.background, torch.cat(apart, dim=1), 0))
    if quality:
        good = [
            prediction_quality(logits, cells, gt_classes, num_classes, decoded)
            for logits, decoded in zip((student, teacher), boxes or (None, None))
        ]
        found = found._replace(student_quality=good[0], teacher_quality=good[1])
    return found


def kl_divergence(
    student: Tensor, teacher: Tensor, num_classes: int, kind: str, temperature: float = 1.0
) -> Tensor:
    """T^2 * KL(teacher || student) of the class predictions of each cell, summed over anchors.

    The factor T^2 keeps the size of the gradient independent of the temperature (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015, section 2).

    Args:
        student, teacher: (N, A*K, H, W) class logits. The KL is computed in fp32, or in fp64 if an
            input is fp64.
        num_classes: K.
        kind: "sigmoid": KL of Bernoulli distributions, summed over classes. RetinaNet and FCOS
            predict such distributions. "softmax": one KL over the K classes and a background class
            with logit 0.
        temperature: T, which divides the logits.

    Returns:
        (N, H, W), not negative up to rounding.
    """
    dtype = accumulation_dtype(student, teacher)
    n, _, h, w = student.shape
    s, t = (x.to(dtype).reshape(n, -1, num_classes, h, w) for x in (student, teacher))
    if temperature != 1:  # a division by 1 would copy both maps
        s, t = s / temperature, t / temperature
    if kind == "sigmoid":
        # KL(p_t || p_s) is cross-entropy minus entropy. Both are written in logits, so neither a
        # large logit nor a probability of 0 or 1 gives infinity.
        kl = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    else:
        s, t = (F.pad(x, (0, 0, 0, 0, 0, 1)).log_softmax(2) for x in (s, t))
        kl = t.exp() * (t - s)
    return temperature**2 * kl.sum((1, 2))


@torch.no_grad()
def prediction_quality(
    logits: Maps, cells: Split, gt_classes: Tensor, num_classes: int, boxes: Maps | None = None
) -> Tensor:
    """How good a detector's prediction is at each cell, in [0, 1].

    It compares predictions with the ground truth, not with another head. So the gate works for an
    FCOS teacher and a RetinaNet student.

    - On a foreground cell of box b: the maximum over anchors of sigmoid(logit of b's class). If
      boxes are given, it is the maximum of sigmoid(logit of b's class) * IoU(decoded box, b).
    - On a background cell: 1 - the maximum of sigmoid(logit) over anchors and classes.
    - On a padding cell: 0.

    Args:
        logits: per level (N, A_l*K, H_l, W_l).
        cells: the split of the same cells.
        gt_classes: (N, B) int64.
        num_classes: K.
        boxes: per level (N, A_l*4, H_l, W_l), decoded, XYXY in pixels; None: class score alone.

    Returns:
        (N, R) in fp32 or better.
    """
    sizes = [h * w for h, w in cells.level_shapes]
    owner_class = cells.owner(gt_classes).split(sizes, dim=1)
    owner_box = cells.owner(cells.boxes).split(sizes, dim=1) if boxes else None
    own, highest = [], []
    for level, x in enumerate(logits):
        x = _per_anchor(x, num_classes)  # (N, HW, A, K)
        highest.append(x.flatten(2).amax(2))
        index = owner_class[level][..., None, None].expand(*x.shape[:3], 1)
        score = x.gather(3, index).squeeze(3).sigmoid()  # (N, HW, A)
        if boxes:
            score = score * _iou(_per_anchor(boxes[level], 4), owner_box[level][:, :, None])
        own.append(score.amax(2))
    foreground, background = torch.cat(own, dim=1), 1 - torch.cat(highest, dim=1).sigmoid()
    return torch.where(cells.foreground, foreground, torch.where(cells.background, background, 0))


def _best_anchor(logits: Tensor, num_classes: int) -> Tensor:
    """(N, A*K, H, W) -> (N, K, H, W), the largest logit over anchors."""
    return logits.unflatten(1, (-1, num_classes)).amax(1)


def _per_anchor(x: Tensor, channels: int) -> Tensor:
    """(N, A*channels, H, W) -> (N, H*W, A, channels) in fp32 or better."""
    n, _, h, w = x.shape
    x = x.to(accumulation_dtype(x)).reshape(n, -1, channels, h * w)
    return x.permute(0, 3, 1, 2)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise IoU of boxes (..., 4) and (..., 4), XYXY; 0 where both are empty."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return inter / (area[0] + area[1] - inter).clamp(min=1e-6)
