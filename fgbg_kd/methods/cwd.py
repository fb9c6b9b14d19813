"""CWD: where each channel is active (Shu et al., ICCV 2021)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import kl_div

from .base import METHOD_REGISTRY, Batch, Method, aligned, build_adapters


@METHOD_REGISTRY.register()
class CWD(Method):
    """L = weight * sum over levels of tau^2 / (N C) * sum over images and channels of
    KL(softmax(T / tau) || softmax(phi(S) / tau)), each softmax over the H*W cells of a channel.

    phi: a 1x1 convolution where channels differ. Padding takes part in the softmax, as published:
    in a batch of unlike images it takes probability from the cells of the small ones.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float = 10.0,  # on FPN features; 50 is for segmentation logits
        temperature: float = 1.0,
    ):
        super().__init__()
        self.accept(CWD, locals())
        self.weight, self.temperature = weight, temperature
        self.adapters = build_adapters(student_channels, teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = 0.0
        for pair in aligned(self.adapters, batch):
            s, t = ((x.flatten(0, 1).flatten(1) / self.temperature).log_softmax(1) for x in pair)
            loss = loss + kl_div(s, t, log_target=True, reduction="batchmean")  # rows: N*C
        return {"loss_kd": self.weight * self.temperature**2 * loss}, {}
