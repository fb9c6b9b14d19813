"""Scales each channel of the features, so that all channels count alike in their direction."""

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor

from .common import accumulation_dtype, per_level


def standardise(features: Sequence[Tensor], real: Tensor, eps: float = 1e-5) -> list[Tensor]:
    """(x - mean) / sqrt(variance + eps) per level and channel.

    Mean and variance are taken over all cells of the level that are not padding, in all images of
    all processes. Without this step, all features after a ReLU have a large common part, which
    makes up most of their direction. A channel with large values would also outweigh the others.

    Args:
        features: per level (N, C, H_l, W_l).
        real: (N, R) bool, False on padding.

    Returns:
        Per level (N, C, H_l, W_l), in fp32 or better. The gradient also flows through mean and
        variance.
    """
    shapes = [tuple(x.shape[-2:]) for x in features]
    masks = per_level(real[..., None], shapes)  # (N, 1, H_l, W_l)
    features = [x.to(accumulation_dtype(x)) for x in features]
    moments = [_moments(x, mask.to(x.dtype)) for x, mask in zip(features, masks)]
    if comm.get_world_size() > 1:
        moments = _merged(moments)
    return [
        (x - mean[:, None, None]) * (variance[:, None, None] + eps).rsqrt()
        for x, (_, mean, variance) in zip(features, moments)
    ]


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of cells (1,), mean and variance (C,) of this process."""
    count = mask.sum().reshape(1)
    divisor = count.clamp(min=1)
    mean = (x * mask).sum((0, 2, 3)) / divisor
    variance = ((x - mean[:, None, None]).square() * mask).sum((0, 2, 3)) / divisor
    return count, mean, variance


def _merged(moments: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """The moments of all processes, by one exchange."""
    sums = [torch.cat([n, n * mean, n * (var + mean**2)]) for n, mean, var in moments]
    merged = differentiable_all_reduce(torch.cat(sums)).split([len(x) for x in sums])
    found = []
    for x in merged:
        count = x[:1]
        mean, square = (x[1:] / count.clamp(min=1)).chunk(2)
        found.append((count, mean, (square - mean**2).clamp(min=0)))
    return found
