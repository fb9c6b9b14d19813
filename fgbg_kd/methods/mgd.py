"""MGD: generates the teacher's features from masked student features (Yang et al., ECCV 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..utils.errors import ConfigError
from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative


@METHOD_REGISTRY.register()
class MGD(Method):
    """L = weight / N * sum over levels and elements of (G(m * phi(S)) - T)^2.

    N: number of images. m: a random mask (N, 1, H, W), 0 with probability ``mask_ratio``, sampled
    in every step. G: 3x3 convolution, ReLU, 3x3 convolution, one per level. phi: a 1x1 convolution
    where channels differ.

    The loss is a sum, not a mean. So it grows with the number of channels and the map size. The
    published weight is for 256 channels, COCO's image sizes and gradient clipping. The sum is in
    fp32, because it overflows fp16. The authors' recipes initialise the student with the teacher's
    neck and head (MODEL.KD.INHERIT).
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
        mask_ratio: float,
    ):
        super().__init__()
        check_not_negative("MGD", weight=weight, mask_ratio=mask_ratio)
        if mask_ratio > 1:
            raise ConfigError(f"MODEL.KD.MGD.MASK_RATIO is {mask_ratio}: it must be at most 1.")
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
        return {"loss_kd": self.weight * loss / len(batch.image_sizes)}, {}
