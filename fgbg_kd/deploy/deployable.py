"""The exportable module: a dense detector from pixels to detections."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..detectors.dense import DenseView, view
from ..utils.errors import DeployError, DetectorError

OUTPUTS = ["boxes", "scores", "classes"]
METADATA = "fgbg_kd.json"  # key of the metadata in every file format

# Number of image channels for each channel order that a deployed detector may take.
_CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}


def suppress(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, score: float, iou: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS within each class, as Detectron2's dense detectors do it.

    Args:
        boxes, scores, classes: the candidates, (M, 4) XYXY, (M,) and (M,).
        score: candidates with this score or a lower score are left out.
        iou: of two boxes with a larger IoU, the box with the lower score is left out.
        limit: largest number of detections.

    Returns:
        Boxes, scores and classes of the detections, best first.
    """
    good = (scores > score).nonzero()[:, 0]
    boxes, scores, classes = boxes[good], scores[good], classes[good]
    # The boxes of each class are moved to a separate region, so that one NMS handles all classes.
    # The extra 0 makes max() valid for an empty list of boxes.
    corners = torch.cat([boxes.flatten(), boxes.new_zeros(1)])
    offset = classes.to(boxes.dtype) * (corners.max() - corners.min() + 1)
    keep = nms(boxes + offset[:, None], scores, iou)[:limit]
    return boxes[keep], scores[keep], classes[keep]


def in_order(pixels: Tensor, order: str) -> Tensor:
    """(3, H, W) RGB in 0..255 -> the image in the channel order that a detector takes.

    Args:
        order: "RGB", "BGR", or "L": grey, (1, H, W), rounded as Pillow does.
    """
    if order == "BGR":
        return pixels.flip(0)
    if order == "L":
        red, green, blue = pixels.float().unbind(0)
        grey = 19595 * red + 38470 * green + 7471 * blue + 32768  # below 2^24: exact in float32
        return (grey / 65536).floor()[None]
    return pixels


class Deployable(nn.Module):
    """A dense detector from pixels to detections, with operations that tracing supports."""

    def __init__(self, detector: nn.Module, nms_inside: bool = True):
        """
        Args:
            detector: a dense detector.
            nms_inside: False: the outputs are candidates.

        Raises:
            DeployError: the detector is not dense, or takes images that are neither RGB nor grey.
        """
        super().__init__()
        dense_view(detector)
        self.detector, self.nms_inside = detector, nms_inside
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(H, W, 3) uint8 RGB -> boxes (M, 4) XYXY in pixels, scores (M,), classes (M,)."""
        of = dense_view(self.detector)
        pixels = in_order(image.permute(2, 0, 1).float(), of.channel_order)
        mean, std = of.normalization
        pixels = (pixels - mean) / std
        height, width = pixels.shape[1:]
        features = of.features(_padded(of, pixels)[None])
        raw = of.head(features)
        levels = [_candidates(of, *x) for x in zip(of.decode(features, raw), of.scores(raw))]
        boxes, scores, classes = (torch.cat(x) for x in zip(*levels))
        if not self.nms_inside:
            return boxes, scores, classes
        boxes, scores, classes = suppress(boxes, scores, classes, **of.suppression)
        # As in Detectron2: after NMS, boxes are clipped to the image and empty boxes are left out.
        border = torch.stack([torch.as_tensor(x) for x in (width, height, width, height)])
        boxes = boxes.clamp(min=0).minimum(border.to(boxes))
        good = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        return boxes[good], scores[good], classes[good]


def _padded(of: DenseView, pixels: Tensor) -> Tensor:
    """(C, H, W) with the same padding as in the detector's preprocessing."""
    height, width = pixels.shape[1:]
    if of.square_size:
        more = (0, of.square_size - width, 0, of.square_size - height)
    else:
        more = (0, -width % of.size_divisibility, 0, -height % of.size_divisibility)
    return F.pad(pixels, more, value=of.pad_value)


def _candidates(of: DenseView, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The predictions of one level with the highest scores.

    Args:
        boxes, scores: (1, A*4, H, W), (1, A*K, H, W).

    Returns:
        boxes (M, 4), scores (M,), classes (M,).
    """
    # reshape, not unflatten: the ONNX exporter would write the example's sizes into the file.
    scores = scores[0].reshape(-1, of.num_classes, scores[0, 0].numel())  # (A, K, HW)
    scores = scores.permute(2, 0, 1).flatten()  # in Detectron2's order: cells, anchors, classes
    boxes = boxes[0].reshape(-1, 4, boxes[0, 0].numel()).permute(2, 0, 1).reshape(-1, 4)
    # A tensor, so that tracing records the minimum.
    count = torch.as_tensor(scores.shape[0]).clamp(max=of.candidates_per_level)
    scores, index = scores.topk(count)
    rows = torch.div(index, of.num_classes, rounding_mode="floor")
    return boxes[rows], scores, index - rows * of.num_classes


def dense_view(detector: nn.Module) -> DenseView:
    """The view of a detector that can be deployed.

    Raises:
        DeployError: the detector is not dense, is unknown, or takes images that are neither RGB nor
            grey.
    """
    try:
        found = view(detector)
    except DetectorError as error:
        raise DeployError(str(error)) from error
    if not isinstance(found, DenseView):
        raise DeployError(f"A {found.name} cannot be exported: only one-stage detectors can.")
    order, channels = found.channel_order, len(found.normalization[0])
    if _CHANNELS.get(order) != channels:
        raise DeployError(
            f"The {found.name} takes images of {channels} channels in the format {order} "
            "(MODEL.PIXEL_MEAN, INPUT.FORMAT). A deployed detector takes RGB or BGR with 3 "
            "channels, or L with 1: correct these keys and train again."
        )
    return found
