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
        same_anchors: False: student and teacher have different anchors (RetinaNet and FCOS). The
            KL then compares the largest logit of each class over the anchors of a cell.
        kl, temperature: see :func:`kl_divergence`. kl None: no KL.
        quality: whether to compute qualities.
        impl: "torch": plain PyTorch, the definition. "triton": fused. "auto": Triton on CUDA.
    """
    if kl not in (None, "sigmoid", "softmax"):
        raise ValueError(f"kl is {kl!r}: choose 'sigmoid', 'softmax' or None.")
    rest = (cells, gt_classes, num_classes)
    if kl and not same_anchors:  # the quality is that of the best anchors anyway
        student, teacher = ([_best_anchor(x, num_classes) for x in m] for m in (student, teacher))
    if use_triton(impl, student[0]):
        from .predictions_triton import compare  # imported on first use: Triton is optional

        return Comparison(*compare(student, teacher, *rest, kl, temperature, quality))
    return _compare_plain(student, teacher, *rest, kl, temperature, quality)


def _compare_plain(
    student: Maps,
    teacher: Maps,
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
        good = [prediction_quality(x, cells, gt_classes, num_classes) for x in (student, teacher)]
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
def prediction_quality(logits: Maps, cells: Split, gt_classes: Tensor, num_classes: int) -> Tensor:
    """How good a detector's prediction is at each cell, in [0, 1].

    It compares predictions with the ground truth, not with another head. So the gate works for an
    FCOS teacher and a RetinaNet student.

    - On a foreground cell of box b: the maximum over anchors of sigmoid(logit of b's class).
    - On a background cell: 1 - the maximum of sigmoid(logit) over anchors and classes.
    - On a padding cell: 0.

    Args:
        logits: per level (N, A_l*K, H_l, W_l).
        cells: the split of the same cells.
        gt_classes: (N, B) int64.
        num_classes: K.

    Returns:
        (N, R) in fp32 or better.
    """
    best = torch.cat([_best_anchor(x, num_classes).flatten(2) for x in logits], dim=2)  # (N, K, R)
    own = best.gather(1, cells.owner(gt_classes)[:, None])[:, 0]
    score = torch.where(cells.foreground, own, best.amax(1)).to(accumulation_dtype(best)).sigmoid()
    return torch.where(cells.foreground, score, torch.where(cells.background, 1 - score, 0))


def _best_anchor(logits: Tensor, num_classes: int) -> Tensor:
    """(N, A*K, H, W) -> (N, K, H, W), the largest logit over anchors."""
    return logits.unflatten(1, (-1, num_classes)).amax(1)
