"""The background term: does the student predict what the teacher predicts?"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import accumulation_dtype, use_triton


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
    _check_kind(kind)
    dtype = accumulation_dtype(student, teacher)
    n, _, h, w = student.shape
    s, t = (
        x.to(dtype).reshape(n, -1, num_classes, h, w) / temperature for x in (student, teacher)
    )  # (N, A, K, H, W)
    if kind == "sigmoid":
        # KL(p_t || p_s) = cross-entropy minus entropy; both terms in logits, so that neither
        # a large logit nor a probability of 0 or 1 gives infinity.
        kl = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    else:
        s, t = (F.pad(x, (0, 0, 0, 0, 0, 1)).log_softmax(2) for x in (s, t))
        kl = t.exp() * (t - s)
    return temperature**2 * kl.sum((1, 2))


def kl_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Tensor,
    num_classes: int,
    kind: str = "sigmoid",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Sum over cells of weight * T^2 * KL(teacher || student).

    Args:
        student, teacher: per level (N, A*K, H_l, W_l) class logits. Only the student gets a
            gradient.
        weight: (N, R), R = sum of H_l * W_l. No gradient flows into it.
        num_classes, kind, temperature: see :func:`kl_divergence`.
        impl: "torch": plain PyTorch, the definition; "triton": fused; "auto": Triton on CUDA.

    Returns:
        Scalar in fp32 or better.
    """
    _check_kind(kind)
    weights = weight.detach().split([s.shape[2] * s.shape[3] for s in student], dim=1)
    if use_triton(impl, student[0]):
        from .kl_triton import weighted_kl  # compiled by whoever uses it, on first use

        terms = [
            weighted_kl(s, t, w, num_classes, kind == "softmax", float(temperature))
            for s, t, w in zip(student, teacher, weights)
        ]
    else:
        terms = [
            (w * kl_divergence(s, t.detach(), num_classes, kind, temperature).flatten(1)).sum()
            for s, t, w in zip(student, teacher, weights)
        ]
    return torch.stack(terms).sum()


def _check_kind(kind: str) -> None:
    if kind not in ("sigmoid", "softmax"):
        raise ValueError(f"kind is {kind!r}: it can be 'sigmoid' or 'softmax'.")
