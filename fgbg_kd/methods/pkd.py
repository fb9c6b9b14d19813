"""PKD: features that correlate with the teacher's (Cao et al., NeurIPS 2022)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import mse_loss

from .base import METHOD_REGISTRY, Batch, Method, aligned, build_adapters


@METHOD_REGISTRY.register()
class PKD(Method):
    """L = weight * sum over levels of the mean over elements of 0.5 (z(phi(S)) - z(T))^2, with
    z(F) = (F - mean) / (std + 1e-6).

    Mean and standard deviation are those of a channel over the images and cells (N*H*W) of the
    batch, padding too, so that a level's term is 1 - Pearson's r, averaged over channels (the
    published code divides by one element less).

    - The statistics are each worker's own by definition: with few images a GPU they are those of
      few images.
    - A student channel that is constant over a batch gets a gradient of 1 / 1e-6: no bug, the
      formula. Gradient clipping tames it.
    - The published method has no phi and needs equal channels; here a 1x1 convolution stands in
      where they differ.
    - Published for the first four levels (P3 to P6 of RetinaNet): all where there are fewer.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float = 10.0,  # for one-stage teachers; 6 for two-stage ones
        num_levels: int = 4,
    ):
        super().__init__()
        self.accept(PKD, locals())
        self.weight = weight
        # Levels without a loss get no adapter: its parameters would get no gradient.
        self.adapters = build_adapters(student_channels[:num_levels], teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = sum(
            0.5 * mse_loss(standardise(s), standardise(t)) for s, t in aligned(self.adapters, batch)
        )
        return {"loss_kd": self.weight * loss}, {}


def standardise(x: Tensor) -> Tensor:
    """(N, C, H, W), each channel with mean 0 and standard deviation 1 over images and cells."""
    over = (0, 2, 3)
    centred = x - x.mean(over, keepdim=True)
    return centred / (x.std(over, correction=0, keepdim=True) + 1e-6)
