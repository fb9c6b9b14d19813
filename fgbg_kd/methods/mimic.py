"""Mimic: mean squared error between features (FitNets, Romero et al., ICLR 2015)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import mse_loss

from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative


@METHOD_REGISTRY.register()
class Mimic(Method):
    """L = weight * sum over levels of the mean over elements of (phi(S) - T)^2.

    phi: a 1x1 convolution where channels differ. The mean covers the whole map, including padding.
    It makes the scale independent of map size and batch size. Levels and channels with large values
    dominate it. The authors of LD use the default weight in their comparison, but inside boxes
    only.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
    ):
        super().__init__()
        check_not_negative("MIMIC", weight=weight)
        self.weight = weight
        self.adapters = build_adapters(student_channels, teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = sum(mse_loss(s, t) for s, t in aligned(self.adapters, batch))
        return {"loss_kd": self.weight * loss}, {}
