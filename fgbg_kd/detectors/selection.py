"""From the predictions of a batch to its detections, for YOLOX and YOLO."""

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import Tensor


def detections(
    detector: DenseDetector,
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
) -> list[Instances]:
    """Selects the detections of each image as Detectron2's RetinaNet does.

    Args:
        detector: has RetinaNet's attributes ``test_score_thresh``, ``test_topk_candidates`` (for
            each level), ``test_nms_thresh`` and ``max_detections_per_image``.
        boxes: per level (N, M_l, 4), XYXY in pixels.
        scores: per level (N, M_l, K).
        image_sizes: N pairs (height, width).
    """
    return [
        _of_image(detector, [x[i] for x in boxes], [x[i] for x in scores], size)
        for i, size in enumerate(image_sizes)
    ]


def _of_image(detector: DenseDetector, boxes, scores, size: tuple[int, int]) -> Instances:
    best = [_best(detector, *level) for level in zip(boxes, scores)]
    found, values, classes = map(torch.cat, zip(*best))
    keep = batched_nms(found, values, classes, detector.test_nms_thresh)
    keep = keep[: detector.max_detections_per_image]
    return Instances(
        size, pred_boxes=Boxes(found[keep]), scores=values[keep], pred_classes=classes[keep]
    )


def _best(detector: DenseDetector, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes, scores and classes of a level's candidates, best first."""
    cells, classes = (scores > detector.test_score_thresh).nonzero().unbind(1)
    values, order = scores[cells, classes].sort(descending=True)
    order = order[: detector.test_topk_candidates]
    return boxes[cells[order]], values[: len(order)], classes[order]
