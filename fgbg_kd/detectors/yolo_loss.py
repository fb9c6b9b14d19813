"""Training losses of YOLOv3 (Redmon and Farhadi, 2018) and YOLOv4 (Bochkovskiy et al., 2020).

Shapes: N images, A anchors of a level, K classes, (H, W) cells, B boxes of all images. A row is a
pair of a box and an anchor, so there are R = B * A rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..ops import pack
from ..ops.common import accumulation_dtype, upload
from .darknet import YoloLayer
from .dense import full_precision

# Limit of the logarithm of a box's width and height over the anchor's, in both directions: so boxes
# are finite, and none has the width 0.
_LARGEST_LOG = 10.0
# YOLOv4 takes a prediction for an object only if a class has a larger score.
_CLASS_THRESH = 0.25


def yolo_losses(
    raw: Sequence[Tensor],
    layers: Sequence[YoloLayer],
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    iou_weight: float,
) -> dict[str, Tensor]:
    """Sums over levels, divided by the number of images.

    Every object trains its best anchor among the anchors of all levels. With YOLOv4's iou_thresh it
    also trains other anchors. Every other prediction is background, unless its box overlaps an
    object by more than ignore_thresh.

    - loss_obj: cross-entropy of the objectness.
    - loss_cls: cross-entropy of each class. If several objects train the same prediction, each of
      their classes is right.
    - loss_box_reg of YOLOv3: cross-entropy of x and y, less its smallest value, and half the
      squared error of the logarithms of width and height. The weight is 2 - (share of the image).
      If several objects train the same prediction, the last one counts.
    - loss_box_reg of YOLOv4: ``iou_weight`` * (1 - CIoU). If several objects train the same
      prediction, the sum is divided by the number of their classes.

    The gradients of objectness, classes and YOLOv3's boxes are the numbers that Darknet propagates
    back ("delta"). For YOLOv4's boxes Darknet leaves out the derivative of the sigmoid and the size
    of a cell. Here the derivative is complete.

    Args:
        raw: output of the head, per level (N, A * (5 + K), H, W).
        layers: per level.
        gt_boxes, gt_classes: N tensors (B_i, 4), XYXY in pixels, and (B_i,).
        image_sizes: N pairs (height, width) in pixels, before padding. Padding is background.
    """
    dtype = accumulation_dtype(raw[0])
    truths = pack([x.to(dtype) for x in gt_boxes])  # (N, B_max, 4)
    rows = [(i, h * w) for i, (h, w) in enumerate(image_sizes) for _ in range(len(gt_boxes[i]))]
    image, area = upload([*rows, (0, 0)], truths, torch.long)[:-1].unbind(1)  # (B,) each
    objects = _Objects(
        torch.cat([x.to(dtype) for x in gt_boxes]), torch.cat(list(gt_classes)), image, area
    )
    total: dict[str, Tensor] = {}
    for x, layer in zip(raw, layers):
        losses = _level(per_anchor(x.to(dtype), layer), layer, objects, truths, iou_weight)
        total = {name: total.get(name, 0.0) + loss / len(x) for name, loss in losses.items()}
    return total


class _Objects(NamedTuple):
    """The objects of all images, or the object of each row.

    Attributes:
        boxes: (B, 4).
        classes: (B,).
        image: (B,), index of the box's image.
        area: (B,), number of pixels of this image.
    """

    boxes: Tensor
    classes: Tensor
    image: Tensor
    area: Tensor

    @property
    def sizes(self) -> Tensor:
        """(B, 2), width and height."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def centres(self) -> Tensor:
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


def per_anchor(x: Tensor, layer: YoloLayer) -> Tensor:
    """(N, A * (5 + K), H, W) -> (N, A, 5 + K, H, W)."""
    # reshape with the sizes: an ONNX file with unflatten would hold the sizes of the example.
    n, channels, h, w = x.shape
    return x.reshape(n, len(layer.mask), channels // len(layer.mask), h, w)


def decode_boxes(x: Tensor, layer: YoloLayer) -> Tensor:
    """(N, A, 5 + K, H, W) -> (N, A, 4, H, W), XYXY in pixels, in float32 or better."""
    x = full_precision(x)
    h, w = x.shape[-2:]
    column = torch.arange(w, device=x.device, dtype=x.dtype)
    row = torch.arange(h, device=x.device, dtype=x.dtype)[:, None]
    size = upload(layer.own_anchors, x, x.dtype)[None, :, :, None, None].unbind(2)
    return _corners(x[:, :, :4].unbind(2), column, row, size, layer, dim=2)


def _corners(xywh: Sequence[Tensor], column, row, size, layer: YoloLayer, dim: int) -> Tensor:
    """XYXY from raw x, y, width and height, the cell's indices and the anchor's width, height."""
    x, y = (layer.scale * t.sigmoid() - (layer.scale - 1) / 2 for t in xywh[:2])
    cx, cy = (x + column) * layer.stride, (y + row) * layer.stride
    w, h = (t.clamp(-_LARGEST_LOG, _LARGEST_LOG).exp() * a / 2 for t, a in zip(xywh[2:], size))
    return torch.stack([cx - w, cy - h, cx + w, cy + h], dim=dim)


def _level(
    x: Tensor, layer: YoloLayer, objects: _Objects, truths: Tensor, iou_weight: float
) -> dict[str, Tensor]:
    """The three sums of one level.

    Args:
        x: (N, A, 5 + K, H, W).
        truths: (N, B_max, 4), the boxes of each image, padded with zeros.
    """
    _, anchors, values, h, w = x.shape
    positive = matched_anchors(objects.sizes, layer).flatten()  # (R,)
    objects = _Objects(*(t.repeat_interleave(anchors, 0) for t in objects))  # of each row
    column, row = (objects.centres / layer.stride).long().unbind(1)
    column, row = column.clamp(0, w - 1), row.clamp(0, h - 1)
    anchor = torch.arange(len(row), device=x.device) % anchors
    of_row = x[objects.image, anchor, :, row, column]  # (R, 5 + K)

    logits = x[:, :, 4].flatten()  # (M,), M = N * A * H * W
    key = ((objects.image * anchors + anchor) * h + row) * w + column  # (R,), place in logits
    target, labels, first = _targets(key, positive, objects.classes, len(logits), of_row)
    entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
    trained = (target > 0) | ~_ignored(x, layer, truths)
    classes = binary_cross_entropy_with_logits(of_row[:, 5:], labels, reduction="none").sum(1)
    sizes = upload(layer.own_anchors, x, x.dtype)[anchor]  # (R, 2)
    if layer.ciou:
        found = _corners(
            of_row[:, :4].unbind(1), column, row, sizes.unbind(1), layer, dim=1
        )  # (R, 4)
        box = iou_weight * (1 - ciou(found, objects.boxes))
        box = positive * box / labels.sum(1).clamp(min=1)
    else:
        box = first * _squared(of_row, objects, column, row, sizes, layer)
    return {
        "loss_box_reg": box.sum(),
        "loss_obj": (trained * entropy).sum(),
        "loss_cls": (first * classes).sum(),
    }


def matched_anchors(sizes: Tensor, layer: YoloLayer) -> Tensor:
    """Which anchors of a level each box trains: (B, 2) widths and heights -> (B, A) bool.

    Boxes and anchors are compared by their shapes, as if they had the same centre.
    """
    anchors = upload(layer.anchors, sizes, sizes.dtype)  # (all, 2)
    overlap = torch.minimum(sizes[:, None], anchors).prod(2)
    iou = overlap / (sizes.prod(1)[:, None] + anchors.prod(1) - overlap)  # (B, all)
    mask = upload(layer.mask, sizes, torch.long)
    return (iou.argmax(1)[:, None] == mask) | (iou[:, mask] > layer.iou_thresh)


def _targets(key: Tensor, positive: Tensor, classes: Tensor, count: int, like: Tensor):
    """What each prediction shall be.

    Args:
        key, positive, classes: (R,) each: the prediction of a row, whether its object trains it,
            and the object's class.
        count: M.
        like: (R, 5 + K), for the number of classes and the dtype.

    Returns:
        - (M,), 1 for each prediction that an object trains, otherwise 0.
        - (R, K), for each row the classes of all objects that train its prediction.
        - (R,), 1 for one of the rows of each trained prediction: that of the last object.
    """
    rows = torch.arange(len(key), device=key.device)
    # Rows that train nothing write to one more place at the end, which is not read.
    place = torch.where(positive, key, count)
    last = rows.new_full((count + 1,), -1).scatter_reduce(0, place, rows, "amax")
    owner = torch.where(positive, last[place], len(rows))  # a row of the same prediction
    labels = like.new_zeros(len(rows) + 1, like.shape[1] - 5)
    labels[owner, classes] = 1.0
    return (last[:-1] >= 0).to(like.dtype), labels[owner], (owner == rows).to(like.dtype)


@torch.no_grad()
def _ignored(x: Tensor, layer: YoloLayer, truths: Tensor) -> Tensor:
    """Which predictions overlap an object too much to be background: (M,) bool."""
    boxes = decode_boxes(x, layer).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (N, A*H*W, 4)
    overlap = iou(boxes[:, :, None], truths[:, None])  # (N, A*H*W, B_max)
    ignored = overlap.amax(-1) > layer.ignore_thresh
    if layer.ciou:  # YOLOv4
        ignored &= (x[:, :, 5:].amax(2).sigmoid() > _CLASS_THRESH).flatten(1)
    return ignored.flatten()


def _squared(
    of_row: Tensor, objects: _Objects, column: Tensor, row: Tensor, sizes: Tensor, layer: YoloLayer
) -> Tensor:
    """YOLOv3's loss of each row's box: (R,)."""
    centre = objects.centres / layer.stride - torch.stack([column, row], 1)
    # The gradient of scale * BCE(t, (target + offset) / scale) is the scaled sigmoid minus target.
    # Without the entropy of the target, the loss of a perfect box would not be 0.
    target = (centre + (layer.scale - 1) / 2) / layer.scale
    in_cell = binary_cross_entropy_with_logits(of_row[:, :2], target, reduction="none")
    in_cell = in_cell - torch.special.entr(target) - torch.special.entr(1 - target)
    error = of_row[:, 2:4] - (objects.sizes.clamp(min=1e-3) / sizes).log()
    weight = 2 - objects.sizes.prod(1) / objects.area
    return weight * (layer.scale * in_cell + error.square() / 2).sum(1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes XYXY: (..., 4), (..., 4) -> (...)."""
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    overlap = width * height
    return overlap / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (Zheng et al., AAAI 2020) of boxes XYXY: (R, 4), (R, 4) -> (R,).

    torchvision's complete_box_iou_loss makes the host wait for the device.
    """
    overlap = iou(a, b)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    offset = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2
    distance = offset.square().sum(1) / hull.square().sum(1)
    angles = [torch.atan2(x[:, 2] - x[:, 0], x[:, 3] - x[:, 1]) for x in (a, b)]
    shape = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():  # a weight, as in the paper
        weight = shape / (1 - overlap + shape + 1e-7)
    return overlap - distance - weight * shape
