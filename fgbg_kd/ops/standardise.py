"""Scales each channel of the features, so that all channels count alike."""

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor

from .common import accumulation_dtype, per_level

# Added to the variance, as batch normalisation does.
EPS = 1e-5


def standardise(features: Sequence[Tensor], real: Tensor) -> list[Tensor]:
    """(x - mean) / sqrt(variance + EPS) per level and channel.

    Mean and variance are taken over all cells of the level that are not padding, in all images of
    all processes. Without this step, all features after a ReLU have a large common part, which
    makes up most of their direction. A channel with large values would also outweigh the others.

    Args:
        features: per level (N, C, H_l, W_l).
        real: (N, R) bool, False on padding.

    Returns:
        Per level (N, C, H_l, W_l), in fp32 or better; 0 on padding, and in a channel that is
        constant up to the rounding of its dtype, such as any channel of a level with one cell. The
        gradient also flows through mean and variance.
    """
    shapes = [tuple(x.shape[-2:]) for x in features]
    masks = per_level(real[..., None], shapes)  # (N, 1, H_l, W_l)
    dtypes = [x.dtype for x in features]
    features = [x.to(accumulation_dtype(x)) for x in features]
    counts, means = _means(features, masks)
    centred = [
        torch.where(mask, x - mean[:, None, None], 0)
        for x, mean, mask in zip(features, means, masks)
    ]
    # Squares around the common mean, because E[x^2] - mean^2 cancels in fp32.
    sums = summed_over_processes([x.square().sum((0, 2, 3)) for x in centred])
    scales = [scale_of(x / n, *rest) for x, n, *rest in zip(sums, counts, means, dtypes)]
    return [x * scale[:, None, None] for x, scale in zip(centred, scales)]


def scale_of(variance: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / sqrt(variance + EPS) of each channel; 0 if its spread is only the rounding of its mean.

    Scaled up, rounding would be a random direction.

    Args:
        variance, mean: (C,).
        dtype: of the features before they were converted to the dtype of the mean.
    """
    of_sums, of_features = torch.finfo(mean.dtype).eps, torch.finfo(dtype).eps
    rounding = (max(16 * of_sums, of_features) * mean.detach()).square()
    return torch.where(variance > rounding, (variance + EPS).rsqrt(), 0)


def _means(features: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[list, list]:
    """Per level the number of cells (1,), at least 1, and the mean (C,), over all processes."""
    sums = summed_over_processes(
        [
            torch.cat([mask.sum().to(x.dtype)[None], torch.where(mask, x, 0).sum((0, 2, 3))])
            for x, mask in zip(features, masks)
        ]
    )
    counts = [x[:1].clamp(min=1) for x in sums]
    return counts, [x[1:] / n for x, n in zip(sums, counts)]


def summed_over_processes(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums of vectors over all processes, with a gradient, by one exchange."""
    if comm.get_world_size() == 1:
        return parts
    return differentiable_all_reduce(torch.cat(list(parts))).split([len(x) for x in parts])
