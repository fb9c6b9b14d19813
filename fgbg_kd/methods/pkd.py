"""PKD: Pearson correlation between features (Cao et al., NeurIPS 2022)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import mse_loss

from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative, check_positive


@METHOD_REGISTRY.register()
class PKD(Method):
    """L = weight * sum over levels of the mean over elements of 0.5 (z(phi(S)) - z(T))^2, with
    z(F) = (F - mean) / (std + 1e-6).

    Mean and standard deviation are computed per channel, over all images and cells (N*H*W) of the
    batch, including padding. So a level's term is 1 - Pearson's r, averaged over channels. (In the
    published code the divisor of the variance is N*H*W - 1.)

    - Each process has its own statistics, by definition.
    - A student channel that is constant over a batch gets a gradient of the order of 1 / 1e-6. This
      follows from the formula. Gradient clipping limits it.
    - The published method has no phi and needs equal channels. Here phi is a 1x1 convolution where
      channels differ.
    - The authors compare the first four levels (P3 to P6 of RetinaNet).
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
        num_levels: int,
    ):
        super().__init__()
        check_not_negative("PKD", weight=weight)
        check_positive("PKD", num_levels=num_levels)
        self.weight = weight
        # A level without a loss gets no adapter, because its parameters would get no gradient.
        self.adapters = build_adapters(student_channels[:num_levels], teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = sum(
            0.5 * mse_loss(normalised(s), normalised(t)) for s, t in aligned(self.adapters, batch)
        )
        return {"loss_kd": self.weight * loss}, {}


def normalised(x: Tensor) -> Tensor:
    """Scales each channel of (N, C, H, W) to mean 0 and std 1 over images and cells."""
    over = (0, 2, 3)
    centred = x - x.mean(over, keepdim=True)
    return centred / (x.std(over, correction=0, keepdim=True) + 1e-6)
