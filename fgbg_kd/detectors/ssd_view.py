"""View of SSD for distillation and export."""

from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import ImageList
from torch import Tensor

from .dense import DenseOutput, DenseView, FeatureLevel, Maps, decoded, register_view
from .ssd import SSD


@register_view(SSD)
class SSDView(DenseView):
    """View of SSD.

    The scores are a softmax over the classes and a background. So ``logits`` are those of a
    classifier whose sigmoid gives the same score: log p - log(1 - p).
    """

    behind_activation = True

    def __init__(self, detector: SSD):
        super().__init__(detector)
        self.input_size = detector.size, detector.size

    @property
    def num_classes(self) -> int:
        kept = self.detector.kept_classes
        return self.detector.num_classes if kept is None else len(kept)

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
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x.reshape(n, -1, self.detector.num_classes + 1, h * w).log_softmax(2)[:, :, 1:]
        if self.detector.kept_classes is not None:
            x = x[:, :, self.detector.kept_classes]
        return x.reshape(n, -1, h, w)

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
        # The head stays whole, because the softmax needs all classes.
        before = self.detector.kept_classes or range(self.num_classes)
        self.detector.kept_classes = [before[i] for i in keep]
