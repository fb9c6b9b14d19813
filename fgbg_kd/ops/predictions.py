"""Predictions of student and teacher, cell by cell: how far apart, and how good is each?"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import accumulation_dtype, use_triton
from .split import Split


class DenseOutput(NamedTuple):
    """What a dense detector computes for a batch, per level.

    Attributes:
        features: (N, C, H_l, W_l).
        logits: (N, A*K, H_l, W_l) class logits; None where the head was not needed.
        deltas: (N, A*4, H_l, W_l) box deltas; None likewise.
    """

    features: Sequence[Tensor]
    logits: Sequence[Tensor] | None = None
    deltas: Sequence[Tensor] | None = None


class Comparison(NamedTuple):
    """What :func:`compare_predictions` finds, each (N, R) in fp32 or better.

    Attributes:
        kl: the divergence on background cells, 0 elsewhere; carries the gradient.
        student_quality, teacher_quality: :func:`prediction_quality`; no gradient.
    """

    kl: Tensor | None = None
    student_quality: Tensor | None = None
    teacher_quality: Tensor | None = None


def compare_predictions(
    student: DenseOutput,
    teacher: DenseOutput,
    detectors: tuple[nn.Module, nn.Module],
    cells: Split,
    gt_classes: Tensor,
    strides: Sequence[int],
    *,
    same_anchors: bool = True,
    kl: str | None = "sigmoid",
    temperature: float = 1.0,
    quality: bool = True,
    boxes: bool = True,
    impl: str = "auto",
) -> Comparison:
    """KL(teacher || student) on background cells, and the quality of both on all cells.

    The gate needs the qualities and weighs the KL, and both need all logits: one pass gives both.

    Args:
        student, teacher: outputs with logits, and with deltas if ``quality`` of ``boxes``.
        detectors: the two DenseDetectors, which know their anchors and box coding.
        cells: the split of the same cells.
        gt_classes: (N, B) int64.
        strides: in pixels, per level; the detectors may have more levels.
        same_anchors: False: the detectors have other anchors in a cell (RetinaNet and FCOS), and
            the KL compares the largest logit of each class over them.
        kl, temperature: see :func:`kl_divergence`; None: no KL.
        quality: False: no qualities.
        boxes: False: qualities by class scores alone; see :func:`prediction_quality`.
        impl: "torch": plain PyTorch, the definition; "triton": fused; "auto": Triton on CUDA.
            Qualities of a box coding that the kernel does not know are computed in plain PyTorch.
    """
    if kl not in (None, "sigmoid", "softmax"):
        raise ValueError(f"kl is {kl!r}: it can be 'sigmoid', 'softmax' or None.")
    outputs, where = (student, teacher), (detectors, cells, gt_classes, strides)
    if kl and not same_anchors:
        found = compare_predictions(
            *outputs, *where, kl=None, quality=quality, boxes=boxes, impl=impl
        )
        outputs = [
            o._replace(logits=[_best_anchor(x, d.num_classes) for x in o.logits])
            for d, o in zip(detectors, outputs)
        ]
        apart = compare_predictions(
            *outputs, *where, kl=kl, temperature=temperature, quality=False, impl=impl
        )
        return found._replace(kl=apart.kl)
    found = Comparison()
    if use_triton(impl, student.logits[0]):
        from .predictions_triton import box_coding, compare  # compiled on first use

        fused_quality = quality and (not boxes or all(box_coding(d) for d in detectors))
        if kl or fused_quality:
            found = compare(*outputs, *where, kl, temperature, fused_quality, boxes)
        quality = quality and not fused_quality
    elif kl:
        apart = torch.cat(
            [
                kl_divergence(s, t.detach(), detectors[0].num_classes, kl, temperature).flatten(1)
                for s, t in zip(student.logits, teacher.logits)
            ],
            dim=1,
        )
        found = found._replace(kl=torch.where(cells.background, apart, 0))
    if quality:
        good = [
            prediction_quality(d, o, cells, gt_classes, strides, boxes)
            for d, o in zip(detectors, outputs)
        ]
        found = found._replace(student_quality=good[0], teacher_quality=good[1])
    return found


def kl_divergence(
    student: Tensor, teacher: Tensor, num_classes: int, kind: str, temperature: float = 1.0
) -> Tensor:
    """T^2 * KL(teacher || student) of the class predictions of each cell, summed over anchors.

    The factor T^2 keeps the gradient's size independent of the temperature (Hinton et al., 2015).

    Args:
        student, teacher: (N, A*K, H, W) class logits; computed in fp32, or fp64 if given.
        num_classes: K.
        kind: "sigmoid": sum over classes of the KL of Bernoulli distributions, what RetinaNet and
            FCOS predict; "softmax": one KL over the K classes and a background of logit 0.
        temperature: T, divides the logits.

    Returns:
        (N, H, W), not negative up to rounding.
    """
    dtype = accumulation_dtype(student, teacher)
    n, _, h, w = student.shape
    s, t = (x.to(dtype).reshape(n, -1, num_classes, h, w) for x in (student, teacher))
    if temperature != 1:  # a division by 1 copies both maps
        s, t = s / temperature, t / temperature
    if kind == "sigmoid":
        # KL(p_t || p_s) = cross-entropy minus entropy; both terms in logits, so that neither
        # a large logit nor a probability of 0 or 1 gives infinity.
        kl = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    else:
        s, t = (F.pad(x, (0, 0, 0, 0, 0, 1)).log_softmax(2) for x in (s, t))
        kl = t.exp() * (t - s)
    return temperature**2 * kl.sum((1, 2))


@torch.no_grad()
def prediction_quality(
    detector: nn.Module,
    output: DenseOutput,
    cells: Split,
    gt_classes: Tensor,
    strides: Sequence[int],
    boxes: bool = True,
) -> Tensor:
    """How good a dense detector's prediction is at each cell, in [0, 1].

    It compares predictions with the truth, not heads with heads, so an FCOS teacher can gate a
    RetinaNet student.

    - On a foreground cell owned by box b: the largest, over anchors, of
      sigmoid(logit of b's class) * IoU(decoded box, b), or without the IoU.
    - On a background cell: 1 - the largest sigmoid(logit) over anchors and classes.
    - On a padding cell: 0.

    Args:
        detector: a DenseDetector; its anchors and box transform decode the deltas.
        output: logits; for boxes deltas, and features for the anchors' positions.
        cells: the split of the same cells.
        gt_classes: (N, B) int64.
        strides: in pixels, per level; the detector may have more levels.
        boxes: whether the IoU counts. Without it nothing of the detector's boxes is needed.

    Returns:
        (N, R) in fp32 or better.
    """
    owner_class = cells.owner(gt_classes).split([h * w for h, w in cells.level_shapes], dim=1)
    score, highest = [], []
    for logit, owner in zip(output.logits, owner_class):
        logit = _per_anchor(logit, detector.num_classes)  # (N, HW, A, K)
        highest.append(logit.flatten(2).amax(2))
        index = owner[..., None, None].expand(*logit.shape[:3], 1)
        score.append(logit.gather(3, index).squeeze(3))  # (N, HW, A)
    foreground = torch.cat(score, dim=1).sigmoid()  # (N, R, A)
    if boxes:
        foreground = foreground * _overlap(detector, output, cells, strides)
    foreground, background = foreground.amax(2), 1 - torch.cat(highest, dim=1).sigmoid()
    return torch.where(cells.foreground, foreground, torch.where(cells.background, background, 0))


def _overlap(
    detector: nn.Module, output: DenseOutput, cells: Split, strides: Sequence[int]
) -> Tensor:
    """(N, R, A): IoU of each decoded box with the one that owns its cell."""
    anchors = _anchors(detector.anchor_generator, output.features, strides)  # per level (H*W*A, 4)
    anchors = torch.cat([a.tensor for a in anchors])  # (R*A, 4)
    delta = torch.cat([_per_anchor(d, 4) for d in output.deltas], dim=1)  # (N, R, A, 4)
    boxes = detector.box2box_transform.apply_deltas(
        delta.reshape(-1, 4), anchors.to(delta).repeat(len(delta), 1)
    ).reshape(delta.shape)
    return _iou(boxes, cells.owner(cells.boxes)[:, :, None])


def _anchors(generator: nn.Module, features: Sequence[Tensor], strides: Sequence[int]) -> list:
    """Anchors of some of a detector's levels; at the others the generator sees a single cell."""
    maps = dict(zip(strides, features))
    levels = [maps.get(s, features[0][..., :1, :1]) for s in generator.strides]
    return [a for s, a in zip(generator.strides, generator(levels)) if s in maps]


def _best_anchor(logits: Tensor, num_classes: int) -> Tensor:
    """(N, A*K, H, W) -> (N, K, H, W), the largest over anchors: a cell's score of a class."""
    return logits.unflatten(1, (-1, num_classes)).amax(1)


def _per_anchor(x: Tensor, channels: int) -> Tensor:
    """(N, A*channels, H, W) -> (N, H*W, A, channels) in fp32 or better, the order of anchors."""
    n, _, h, w = x.shape
    x = x.to(accumulation_dtype(x)).reshape(n, -1, channels, h * w)
    return x.permute(0, 3, 1, 2)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes pair by pair, (..., 4) with (..., 4), XYXY; 0 where both are empty."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    inter = size.prod(-1)
    area = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return inter / (area[0] + area[1] - inter).clamp(min=1e-6)
