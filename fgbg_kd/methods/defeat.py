"""DeFeat: separate feature losses for foreground and background (Guo et al., CVPR 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common import per_level
from ..utils.processes import world_mean
from .adapters import aligned
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative


@METHOD_REGISTRY.register()
class DeFeat(Method):
    """L = weight * (L_fg + bg_ratio * L_bg). Each term is the mean over levels of
    sum over its cells of (phi(S) - T)^2 / max(1, 2 N C). N: number of its cells in the batch. C:
    number of channels.

    phi: a 3x3 convolution on every level, even where channels are equal. Its initial weights are
    near 0. Each box is foreground on the one level that fits its size, and background on the
    others.

    Differences from the published code:

    - This package's split assigns cells: by their centres, at least one cell for each box. Padding
      is neither foreground nor background. In the published code it is background.
    - N C is a number of elements. The factor 2 comes from half a square, which the published
      weights include. N counts the cells of all processes. A level without a box still counts in
      the mean.
    - Only the features of the neck are compared. The paper adds terms on the backbone and on the
      heads of two-stage detectors.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
        bg_ratio: float,
    ):
        super().__init__()
        check_not_negative("DEFEAT", weight=weight, bg_ratio=bg_ratio)
        self.weight, self.bg_ratio = weight, bg_ratio
        self.adapters = nn.ModuleList(
            nn.Conv2d(s, t, kernel_size=3, padding=1)
            for s, t in zip(student_channels, teacher_channels)
        )
        for phi in self.adapters:
            nn.init.trunc_normal_(phi.weight, std=1e-4, a=-2e-4, b=2e-4)
            nn.init.zeros_(phi.bias)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cells = batch.split("scale")
        masks = torch.stack([cells.foreground, cells.background], dim=2).float()  # (N, R, 2)
        terms = []
        pairs = aligned(self.adapters, batch)
        for mask, (s, t) in zip(per_level(masks, cells.level_shapes), pairs):
            error = (s - t).square().sum(1, keepdim=True)  # (N, 1, H, W)
            count = world_mean(mask.sum((0, 2, 3)))
            terms.append((error * mask).sum((0, 2, 3)) / (2 * t.shape[1] * count).clamp(min=1))
        fg, bg = sum(terms) / len(self.adapters)
        return {"loss_kd": self.weight * (fg + self.bg_ratio * bg)}, {}
