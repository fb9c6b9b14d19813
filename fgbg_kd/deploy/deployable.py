"""The exportable module: a dense detector from pixels to detections."""

from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..distiller import run_dense
from ..matching import channel_order, is_dense
from ..utils.errors import DeployError

OUTPUTS = ["boxes", "scores", "classes"]


def suppress(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, score: float, iou: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS within each class, as Detectron2's dense detectors do it.

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,), the candidates.
        score: candidates up to this score are left out.
        iou: of two that overlap by more than this, the better one stays.
        limit: at most so many detections.

    Returns:
        The same of the detections, best first.
    """
    good = (scores > score).nonzero()[:, 0]
    boxes, scores, classes = boxes[good], scores[good], classes[good]
    # Each class in a place of its own, so that one NMS does for all. The 0: there may be no box.
    corners = torch.cat([boxes.flatten(), boxes.new_zeros(1)])
    offset = classes.to(boxes.dtype) * (corners.max() - corners.min() + 1)
    keep = nms(boxes + offset[:, None], scores, iou)[:limit]
    return boxes[keep], scores[keep], classes[keep]


class Deployable(nn.Module):
    """A dense detector from pixels to detections, with nothing that tracing cannot follow."""

    def __init__(self, detector: nn.Module, nms_inside: bool = True):
        """
        Args:
            detector: a RetinaNet or FCOS.
            nms_inside: False: the output are candidates.

        Raises:
            DeployError: another detector.
        """
        super().__init__()
        check_dense(detector)
        self.detector, self.nms_inside = detector, nms_inside
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(H, W, 3) uint8, RGB, to boxes (M, 4), scores (M,), classes (M,)."""
        detector = self.detector
        pixels = image.permute(2, 0, 1).float()
        if channel_order(detector) == "BGR":
            pixels = pixels.flip(0)
        pixels = (pixels - detector.pixel_mean) / detector.pixel_std
        height, width = pixels.shape[1:]
        divisor = max(detector.backbone.size_divisibility, 1)
        pixels = F.pad(pixels, (0, -width % divisor, 0, -height % divisor))
        features, predictions = run_dense(detector, pixels[None])
        anchors = detector.anchor_generator(features)
        levels = [self._candidates(*level) for level in zip(anchors, *predictions)]
        boxes, scores, classes = (torch.cat(x) for x in zip(*levels))
        if not self.nms_inside:
            return boxes, scores, classes
        boxes, scores, classes = suppress(boxes, scores, classes, **suppression_of(detector))
        # Last, as in Detectron2: boxes are cut off at the image's border, empty ones left out.
        border = torch.stack([torch.as_tensor(x) for x in (width, height, width, height)])
        boxes = boxes.clamp(min=0).minimum(border.to(boxes))
        good = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        return boxes[good], scores[good], classes[good]

    def _candidates(self, anchors: Boxes, logits: Tensor, deltas: Tensor, *centerness: Tensor):
        """The best of one level: boxes (M, 4), scores (M,), classes (M,)."""
        detector, classes = self.detector, self.detector.num_classes
        scores = permute_to_N_HWA_K(logits, classes)[0].sigmoid()
        for x in centerness:  # FCOS has it
            scores = (scores * permute_to_N_HWA_K(x, 1)[0].sigmoid()).sqrt()
        scores = scores.flatten()
        # A tensor, so that tracing sees the minimum.
        count = torch.as_tensor(scores.shape[0]).clamp(max=detector.test_topk_candidates)
        scores, index = scores.topk(count)
        rows = torch.div(index, classes, rounding_mode="floor")
        deltas = permute_to_N_HWA_K(deltas, 4)[0][rows]
        boxes = detector.box2box_transform.apply_deltas(deltas, anchors.tensor[rows])
        return boxes, scores, index - rows * classes


def check_dense(detector: nn.Module) -> None:
    if not is_dense(detector):
        raise DeployError(f"A {type(detector).__name__}: only RetinaNet and FCOS are deployed.")


def suppression_of(detector: nn.Module) -> dict[str, Any]:
    return {
        "score": detector.test_score_thresh,
        "iou": detector.test_nms_thresh,
        "limit": detector.max_detections_per_image,
    }
