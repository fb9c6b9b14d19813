"""QFL: the teacher's scores as soft labels, with the focal factor of Generalized Focal Loss
(Li et al., NeurIPS 2020), as in the classification term of CrossKD (Wang et al., CVPR 2024)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..utils.errors import ConfigError
from .base import METHOD_REGISTRY, Batch, Method, check_not_negative


@METHOD_REGISTRY.register()
class QFL(Method):
    """L = weight / positives * sum over anchors and classes of |sigmoid(x) - t| BCE(x, t),
    where x is the student's logit and t is the teacher's score. There is no mask.

    positives: the number by which the student divides its own classification loss in the same step.
    In Detectron2 each process keeps a running mean of its number of positive anchors. So this
    number is never 0.

    Differences from CrossKD: only its classification loss is used, without its box loss. CrossKD
    also passes student features through the teacher's head. This needs heads of equal width and is
    left out here. CrossKD leaves out padding, and the anchors that its assigner ignores. Both count
    here.
    """

    needs_logits = True
    compares_logits = True

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        weight: float,
    ):
        super().__init__()
        check_not_negative("QFL", weight=weight)
        self.weight = weight

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.loss_normalizer is None:
            raise ConfigError(
                "MODEL.KD.METHOD QFL divides by the student's attribute loss_normalizer, and this "
                "student has none: set it in the student's losses, or use another method."
            )
        loss = 0.0
        for logit, label in zip(batch.student.logits, batch.teacher.logits):
            logit, label = logit.float(), label.float().sigmoid()
            entropy = binary_cross_entropy_with_logits(logit, label, reduction="none")
            loss = loss + ((logit.sigmoid() - label).abs() * entropy).sum()
        return {"loss_kd": self.weight * loss / batch.loss_normalizer}, {}
