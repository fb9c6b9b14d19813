"""The exportable module: a dense detector from pixels to detections."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..detectors.dense import DenseView, view
from ..utils.errors import DeployError, DetectorError

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
            detector: a dense detector.
            nms_inside: False: the output are candidates.

        Raises:
            DeployError: the detector is not dense.
        """
        super().__init__()
        dense_view(detector)
        self.detector, self.nms_inside = detector, nms_inside
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(H, W, 3) uint8, RGB, to boxes (M, 4), scores (M,), classes (M,)."""
        of = dense_view(self.detector)
        pixels = image.permute(2, 0, 1).float()
        if of.channel_order == "BGR":
            pixels = pixels.flip(0)
        mean, std = of.normalization
        pixels = (pixels - mean) / std
        height, width = pixels.shape[1:]
        divisor = of.size_divisibility
        more = (0, -width % divisor, 0, -height % divisor)
        features = of.features(F.pad(pixels, more, value=of.pad_value)[None])
        raw = of.head(features)
        levels = [self._candidates(of, *x) for x in zip(of.decode(features, raw), of.scores(raw))]
        boxes, scores, classes = (torch.cat(x) for x in zip(*levels))
        if not self.nms_inside:
            return boxes, scores, classes
        boxes, scores, classes = suppress(boxes, scores, classes, **of.suppression)
        # Last, as in Detectron2: boxes are cut off at the image's border, empty ones left out.
        border = torch.stack([torch.as_tensor(x) for x in (width, height, width, height)])
        boxes = boxes.clamp(min=0).minimum(border.to(boxes))
        good = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        return boxes[good], scores[good], classes[good]

    def _candidates(self, of: DenseView, boxes: Tensor, scores: Tensor):
        """The best predictions of one level.

        Args:
            boxes, scores: (1, A*4, H, W), (1, A*K, H, W).

        Returns:
            boxes (M, 4), scores (M,), classes (M,).
        """
        scores = scores[0].flatten(1).unflatten(0, (-1, of.num_classes))  # (A, K, HW)
        scores = scores.permute(2, 0, 1).flatten()  # in Detectron2's order: cells, anchors, classes
        boxes = boxes[0].flatten(1).unflatten(0, (-1, 4)).permute(2, 0, 1).reshape(-1, 4)
        # A tensor, so that tracing sees the minimum.
        count = torch.as_tensor(scores.shape[0]).clamp(max=of.candidates_per_level)
        scores, index = scores.topk(count)
        rows = torch.div(index, of.num_classes, rounding_mode="floor")
        return boxes[rows], scores, index - rows * of.num_classes


def dense_view(detector: nn.Module) -> DenseView:
    """
    Raises:
        DeployError: the detector is not dense, or not known.
    """
    try:
        found = view(detector)
    except DetectorError as error:
        raise DeployError(str(error)) from error
    if not isinstance(found, DenseView):
        raise DeployError(f"A {found.name}: only one-stage detectors are exported.")
    return found
