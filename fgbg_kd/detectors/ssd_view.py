"""View of SSD for distillation and export."""

from typing import Any

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import ImageList
from torch import Tensor, nn

from .dense import (
    DenseOutput,
    DenseView,
    FeatureLevel,
    Maps,
    decoded,
    full_precision,
    register_view,
)
from .ssd import SSD


@register_view(SSD)
class SSDView(DenseView):
    """View of SSD.

    The scores are a softmax over the classes and a background. So ``logits`` are those of a
    classifier whose sigmoid gives the same score: log p - log(1 - p).
    """

    def __init__(self, detector: SSD):
        super().__init__(detector)
        self.input_size = detector.size, detector.size

    @property
    def num_classes(self) -> int:
        return self.detector.kept_classes

    @property
    def levels(self) -> list[FeatureLevel]:
        shapes = self.detector.backbone.output_shape()
        return [FeatureLevel(name, x.stride, x.channels) for name, x in shapes.items()]

    @property
    def cell_anchors(self) -> list[Tensor]:
        found = []
        for boxes, (height, width) in zip(self._default_boxes(), self.detector.backbone.grids):
            first = boxes[: len(boxes) // (height * width)]
            centre = (first[:, :2] + first[:, 2:]) / 2
            found.append(first - centre.repeat(1, 2))
        return found

    def _default_boxes(self) -> tuple[Tensor, ...]:
        return self.detector.default_boxes.split(self.detector.boxes_per_level)

    def head(self, features: Maps) -> Any:
        return self.detector.predict(features)

    def class_logits(self, features: Maps) -> Maps:
        convolutions = self.detector.head.classification_head.module_list
        return self.logits(([conv(x) for conv, x in zip(convolutions, features)], None))

    def logits(self, raw: Any) -> Maps:
        return [self._logit(x) for x in self._log_probabilities(raw)]

    def scores(self, raw: Any) -> Maps:
        return [x.exp() for x in self._log_probabilities(raw)]

    def _log_probabilities(self, raw: Any) -> Maps:
        """Per level (N, A*K, H, W), without the background."""
        return [self._log_probability(x) for x in raw[0]]

    def _log_probability(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = full_precision(x).reshape(n, -1, self.detector.num_classes + 1, h * w)
        return x.log_softmax(2)[:, :, 1 : 1 + self.num_classes].reshape(n, -1, h, w)

    def _logit(self, log_p: Tensor) -> Tensor:
        log_p = log_p.clamp(max=-1e-7)  # so that log(1 - p) is finite
        return log_p - (-log_p.expm1()).log()

    def decode(self, features: Maps, raw: Any) -> Maps:
        coder = Box2BoxTransform(self.detector.box_coder.weights)
        boxes = [decoded(coder, *x) for x in zip(self._default_boxes(), raw[1])]
        return [x.clamp(0, self.detector.size) for x in boxes]  # as torchvision does before NMS

    def named_predictions(self, output: DenseOutput) -> dict[str, Maps]:
        return {"class logits": output.raw[0], "box deltas": output.raw[1]}

    def as_seen(self, batched_inputs: list[dict]) -> list[dict]:
        return self.detector.warped(batched_inputs)

    def losses(self, images: ImageList, output: DenseOutput, gt_instances: list) -> dict:
        return self.detector.losses(output.raw, gt_instances)

    @property
    def suppression(self) -> dict[str, Any]:
        return {
            "score": self.detector.score_thresh,
            "iou": self.detector.nms_thresh,
            "limit": self.detector.detections_per_img,
        }

    @property
    def candidates_per_level(self) -> int:
        # torchvision limits the candidates of each class, over all levels.
        return self.detector.topk_candidates * self.num_classes

    def keep_classes(self, keep: list[int]) -> None:
        # The head stays whole, because the softmax needs all classes. The kept ones come first.
        total = self.detector.num_classes
        order = [0, *(1 + k for k in [*keep, *(set(range(total)) - set(keep))])]
        for module in self.detector.head.classification_head.module_list:
            last = [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]
            for value in last.state_dict(keep_vars=True).values():
                per_class = value.detach().unflatten(0, (-1, total + 1))
                per_class.copy_(per_class[:, order])
        self.detector.kept_classes = len(keep)
