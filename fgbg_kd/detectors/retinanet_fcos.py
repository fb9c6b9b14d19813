"""Views of Detectron2's own one-stage detectors, RetinaNet and FCOS."""

from typing import Any

from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..utils.errors import DetectorError
from .dense import DenseOutput, DenseView, Maps, decoded, register_view


class _Detectron2View(DenseView):
    """View of Detectron2's DenseDetector. It predicts class logits first, then box deltas."""

    @property
    def cell_anchors(self) -> list[Tensor]:
        return list(self.detector.anchor_generator.cell_anchors)

    @property
    def anchor_offset(self) -> float:
        return self.detector.anchor_generator.offset

    def class_logits(self, features: Maps) -> Maps:
        head = self.detector.head
        if type(head) not in (RetinaNetHead, FCOSHead):  # a user's head may work differently
            return super().class_logits(features)
        return [head.cls_score(head.cls_subnet(x)) for x in features]

    def logits(self, raw: Any) -> Maps:
        return raw[0]

    def decode(self, features: Maps, raw: Any) -> Maps:
        anchors = self.detector.anchor_generator(features)
        coder = self.detector.box2box_transform
        return [decoded(coder, a.tensor, d) for a, d in zip(anchors, raw[1])]

    def named_predictions(self, output: DenseOutput) -> dict[str, Maps]:
        return {"class logits": output.raw[0], "box deltas": output.raw[1]}

    def keep_classes(self, keep: list[int]) -> None:
        conv = getattr(self.detector.head, "cls_score", None)
        if not isinstance(conv, nn.Conv2d):
            raise DetectorError(
                f"The {type(self.detector.head).__name__} of the teacher has no convolution "
                "cls_score from which classes can be removed: train it on the student's classes."
            )
        for name, _ in list(conv.named_parameters()):  # the weight, and the bias if there is one
            per_class = getattr(conv, name).detach().unflatten(0, (-1, self.num_classes))
            kept = per_class[:, keep].flatten(0, 1)  # (A*K, ...)
            setattr(conv, name, nn.Parameter(kept, requires_grad=False))
        conv.out_channels = len(conv.weight)
        self.detector.num_classes = len(keep)


@register_view(RetinaNet)
class RetinaNetView(_Detectron2View):
    """View of Detectron2's RetinaNet."""

    anchors_in_config = True


@register_view(FCOS)
class FCOSView(_Detectron2View):
    """View of Detectron2's FCOS. Centerness ranks detections; distillation does not use it."""

    def scores(self, raw: Any) -> Maps:
        logits, _, centerness = raw
        return [self._ranked(x.sigmoid(), c.sigmoid()) for x, c in zip(logits, centerness)]

    def _ranked(self, score: Tensor, centerness: Tensor) -> Tensor:
        """(N, A*K, H, W), (N, A, H, W) -> (N, A*K, H, W)."""
        per_class = score.unflatten(1, (-1, self.num_classes))
        return (per_class * centerness[:, :, None]).sqrt().flatten(1, 2)
