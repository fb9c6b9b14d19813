"""MGD: the teacher's features, generated from a part of the student's (Yang et al., ECCV 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import METHOD_REGISTRY, Batch, Method, aligned, build_adapters


@METHOD_REGISTRY.register()
class MGD(Method):
    """L = weight / N * sum over levels and elements of (G(m * phi(S)) - T)^2.

    m: a random mask (N, 1, H, W) that is 0 with probability ``mask_ratio``, drawn anew each time.
    G: 3x3 convolution, ReLU, 3x3 convolution, one per level. phi: a 1x1 convolution where channels
    differ.

    A sum, not a mean: the scale grows with channels and map, so the published weight belongs to
    256 channels on COCO's image sizes, and clipped gradients. It overflows fp16, so it is
    taken in fp32.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float = 2e-5,
        mask_ratio: float = 0.65,
    ):
        super().__init__()
        self.accept(MGD, locals())
        if mask_ratio > 1:
            raise ValueError(f"MODEL.KD.MGD.MASK_RATIO is {mask_ratio}: a share, at most 1.")
        self.weight, self.mask_ratio = weight, mask_ratio
        self.adapters = build_adapters(student_channels, teacher_channels)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(c, c, kernel_size=3, padding=1),
            )
            for c in teacher_channels
        )

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = 0.0
        for generate, (s, t) in zip(self.generators, aligned(self.adapters, batch)):
            kept = torch.rand_like(s[:, :1]) >= self.mask_ratio
            loss = loss + (generate(s * kept).to(t.dtype) - t).square().sum()
        return {"loss_kd": self.weight * loss / len(t)}, {}
