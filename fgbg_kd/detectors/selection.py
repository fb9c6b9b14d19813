"""From the predictions of an image to its detections, for YOLOX and YOLO."""

from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor


def detections(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    size: tuple[int, int],
    *,
    score: float,
    candidates: int,
    iou: float,
    limit: int,
) -> Instances:
    """Selects detections as Detectron2's RetinaNet does.

    Args:
        boxes: per level (M_l, 4), XYXY in pixels.
        scores: per level (M_l, K).
        size: (height, width) of the image.
        score: predictions with this score or a lower score are left out.
        candidates: number of predictions per level that enter NMS.
        iou: of two boxes of a class with a larger IoU, the one with the lower score is left out.
        limit: largest number of detections.
    """
    best = [_best(*level, score, candidates) for level in zip(boxes, scores)]
    found, values, classes = map(torch.cat, zip(*best))
    keep = batched_nms(found, values, classes, iou)[:limit]
    return Instances(
        size, pred_boxes=Boxes(found[keep]), scores=values[keep], pred_classes=classes[keep]
    )


def _best(
    boxes: Tensor, scores: Tensor, score: float, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes, scores and classes of a level's candidates, best first."""
    cells, classes = (scores > score).nonzero().unbind(1)
    values, order = scores[cells, classes].sort(descending=True)
    order = order[:candidates]
    return boxes[cells[order]], values[: len(order)], classes[order]
