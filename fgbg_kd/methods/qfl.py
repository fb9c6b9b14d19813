"""QFL: the teacher's scores as soft labels, with the focal factor of Generalized Focal Loss
(Li et al., NeurIPS 2020), as in the classification term of CrossKD (Wang et al., CVPR 2024)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .base import METHOD_REGISTRY, Batch, Method


@METHOD_REGISTRY.register()
class QFL(Method):
    """L = weight / positives * sum over anchors and classes of |sigmoid(x) - t| BCE(x, t),
    x the student's logit, t the teacher's score; no mask.

    Of CrossKD it is the loss of the classes only: its loss of the boxes is left out, and its detour
    through the teacher's head needs heads of one width, which a light student does not have.
    ``positives`` is what the student's own classification loss is divided by in the same step:
    Detectron2's running mean of positive anchors (each worker's own), so it is never 0.
    """

    needs_logits = True
    compares_logits = True

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float = 1.0,
    ):
        super().__init__()
        self.accept(QFL, locals())
        self.weight = weight

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        loss = 0.0
        for logit, label in zip(batch.student.logits, batch.teacher.logits):
            logit, label = logit.float(), label.float().sigmoid()
            entropy = binary_cross_entropy_with_logits(logit, label, reduction="none")
            loss = loss + ((logit.sigmoid() - label).abs() * entropy).sum()
        return {"loss_kd": self.weight * loss / batch.detectors[0].loss_normalizer}, {}
