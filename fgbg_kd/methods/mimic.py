"""Mimicking: the teacher's features, element by element (FitNets, Romero et al., ICLR 2015)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import mse_loss

from .base import METHOD_REGISTRY, Batch, Method, aligned, build_adapters


@METHOD_REGISTRY.register()
class Mimic(Method):
    """L = weight * sum over levels of the mean over elements of (phi(S) - T)^2.

    phi: a 1x1 convolution where channels differ. The whole map counts, padding too. The mean makes
    the scale independent of map and batch; levels and channels of large values dominate it.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float = 2.0,  # as where LD's authors compare with it, there inside boxes only
    ):
        super().__init__()
        self.accept(Mimic, locals())
        self.weight = weight
        self.adapters = build_adapters(student_channels, teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = sum(mse_loss(s, t) for s, t in aligned(self.adapters, batch))
        return {"loss_kd": self.weight * loss}, {}
