"""The operator of features: cosine distance between the features of student and teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import MIN_SQUARE, accumulation_dtype, use_triton


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
    valid = (ss > MIN_SQUARE) & (tt > MIN_SQUARE)
    # The inner `where` keeps the gradient of the unused branch finite.
    norm = torch.where(valid, ss, 1).sqrt() * torch.where(valid, tt, 1).sqrt()
    return torch.where(valid, dot / norm, 0)


def cosine_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weight: Tensor, impl: str = "auto"
) -> Tensor:
    """Sum over cells of weight * (1 - cos(student, teacher)).

    Args:
        student, teacher: per level (N, C, H_l, W_l). Only the student gets a gradient.
        weight: (N, R), R = sum of H_l * W_l. No gradient flows into it.
        impl: "torch": plain PyTorch, the definition; "triton": fused; "auto": Triton on CUDA.

    Returns:
        Scalar in fp32 or better, in [0, 2 * weight.sum()].
    """
    weight = weight.detach()
    if use_triton(impl, student[0]):
        from .cosine_triton import weighted_cosine  # imported on first use: Triton is optional

        return weighted_cosine(list(student), list(teacher), weight)[0]
    cosine = torch.cat(
        [cosine_similarity(s, t.detach()).flatten(1) for s, t in zip(student, teacher)], dim=1
    )  # (N, R)
    return (weight * (1 - cosine)).sum()
