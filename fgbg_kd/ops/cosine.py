"""The operator of features: cosine similarity of the features of student and teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import MIN_SQUARE, accumulation_dtype, use_triton
from .standardise import standardise


def cosine_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of the angle between the feature vectors of each cell.

    Args:
        student, teacher: (N, C, H, W). Sums are in fp32, or in fp64 if an input is fp64.

    Returns:
        (N, H, W). If a vector is zero (norm of at most 1e-6), cosine and gradient are 0.
    """
    dtype = accumulation_dtype(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    dot = (s * t).sum(1)  # (N, H, W)
    ss, tt = s.square().sum(1), t.square().sum(1)
    valid = ~((ss <= MIN_SQUARE) | (tt <= MIN_SQUARE))  # a NaN stays visible in the loss
    # The inner `where` keeps the gradient of the unused branch finite.
    norm = torch.where(valid, ss, 1).sqrt() * torch.where(valid, tt, 1).sqrt()
    return torch.where(valid, dot / norm, 0)


def standardised_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    real: Tensor,
    used: Tensor,
    impl: str = "auto",
) -> Tensor:
    """cos(z(student), z(teacher)) of each cell, with z of :func:`fgbg_kd.ops.standardise`.

    Args:
        student, teacher: per level (N, C, H_l, W_l). Only the student gets a gradient. It also
            flows through the mean and variance of each channel.
        real: (N, R) bool, False on padding. R = sum of H_l * W_l.
        used: (N, R) bool, the cells whose cosine is needed. Padding is never used.
        impl: "torch": plain PyTorch, the definition; "triton": fused; "auto": Triton on CUDA.

    Returns:
        (N, R) in fp32 or better; 0 in cells that are not used.

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
        from .cosine_triton import fused_cosine  # imported on first use: Triton is optional

        return fused_cosine(list(student), list(teacher), real, used)
    maps = zip(standardise(student, real), standardise([t.detach() for t in teacher], real))
    cosine = torch.cat([cosine_similarity(s, t).flatten(1) for s, t in maps], dim=1)  # (N, R)
    return torch.where(used, cosine, 0)
