"""CWD: compares the spatial distribution of each channel (Shu et al., ICCV 2021)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import kl_div

from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative, check_positive


@METHOD_REGISTRY.register()
class CWD(Method):
    """L = weight * sum over levels of tau^2 / (N C) * sum over images and channels of
    KL(softmax(T / tau) || softmax(phi(S) / tau)); each softmax is over the H*W cells of a channel.

    S, T: features of student and teacher. phi: a 1x1 convolution where channels differ.

    The softmax includes padding, as published. In a batch with different image sizes, padding
    takes probability from the cells of small images. The default weight is the authors' weight for
    FPN features. The authors use 50 for segmentation logits.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
        temperature: float,
    ):
        super().__init__()
        check_not_negative("CWD", weight=weight)
        check_positive("CWD", temperature=temperature)
        self.weight, self.temperature = weight, temperature
        self.adapters = build_adapters(student_channels, teacher_channels)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = 0.0
        for pair in aligned(self.adapters, batch):
            s, t = ((x.flatten(0, 1).flatten(1) / self.temperature).log_softmax(1) for x in pair)
            loss = loss + kl_div(s, t, log_target=True, reduction="batchmean")  # rows: N*C
        return {"loss_kd": self.weight * self.temperature**2 * loss}, {}
