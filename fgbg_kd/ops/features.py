"""The operator of features: how far the features of student and teacher differ in each cell."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import MIN_SQUARE, accumulation_dtype, use_triton
from .standardise import standardise


class FeatureComparison(NamedTuple):
    """Two measures of each cell; 0 in cells that are not used. z: see :func:`compare_features`.

    Attributes:
        cosine: (N, R) cosine of the angle between z(S) and z(T).
        distance: (N, R) |z(S) - z(T)|^2 / (2 C). With the lengths s = |z(S)| and t = |z(T)| it is
            (2 s t (1 - cosine) + (s - t)^2) / (2 C). So it compares directions, and counts cells
            with long vectors more. It also compares the lengths.
    """

    cosine: Tensor
    distance: Tensor


def compare_features(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    real: Tensor,
    used: Tensor,
    impl: str = "auto",
) -> FeatureComparison:
    """Compares z(S) and z(T), with z of :func:`fgbg_kd.ops.standardise`, in fp32 or better.

    Args:
        student, teacher: S and T, per level (N, C, H_l, W_l). Only the student gets a gradient. It
            also flows through the mean and variance of each channel.
        real: (N, R) bool, False on padding. R = sum of H_l * W_l.
        used: (N, R) bool, the cells to compare. Padding is never used.
        impl: "torch": plain PyTorch, the definition; "triton": fused; "auto": Triton on CUDA.

    Raises:
        ValueError: the shapes do not agree.
    """
    shapes = [tuple(x.shape) for x in student]
    cells = (len(student[0]), sum(h * w for *_, h, w in shapes))
    found = [[tuple(x.shape) for x in teacher], tuple(real.shape), tuple(used.shape)]
    if found != [shapes, cells, cells]:
        raise ValueError(
            f"The student's maps have the shapes {shapes}. The teacher's maps must have the same "
            f"shapes, and real and used {cells}. They have {found[0]}, {found[1]} and {found[2]}."
        )
    used = used & real
    if use_triton(impl, student[0]):
        from .features_triton import fused_products  # imported on first use: Triton is optional

        dot, ss, tt = fused_products(list(student), list(teacher), real, used)
    else:
        maps = zip(standardise(student, real), standardise([t.detach() for t in teacher], real))
        products = [[x.flatten(1) for x in _products(s, t)] for s, t in maps]
        dot, ss, tt = (torch.where(used, torch.cat(x, dim=1), 0) for x in zip(*products))
    squares = (ss + tt - 2 * dot).split([h * w for *_, h, w in shapes], dim=1)
    distance = [x / (2 * c) for x, (_, c, *_) in zip(squares, shapes)]
    return FeatureComparison(_cosine(dot, ss, tt), torch.cat(distance, dim=1))


def cosine_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of the angle between the feature vectors of each cell.

    Args:
        student, teacher: (N, C, H, W). Sums are in fp32, or in fp64 if an input is fp64.

    Returns:
        (N, H, W). If a vector is zero (norm of at most 1e-6), cosine and gradient are 0.
    """
    return _cosine(*_products(student, teacher))


def _products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H, W) each: scalar product of the two vectors of a cell, and their squared lengths."""
    dtype = accumulation_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    return (s * t).sum(1), s.square().sum(1), t.square().sum(1)


def _cosine(dot: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    valid = ~((ss <= MIN_SQUARE) | (tt <= MIN_SQUARE))  # a NaN stays visible in the loss
    # The inner `where` keeps the gradient of the unused branch finite.
    norm = torch.where(valid, ss, 1).sqrt() * torch.where(valid, tt, 1).sqrt()
    return torch.where(valid, dot / norm, 0)
