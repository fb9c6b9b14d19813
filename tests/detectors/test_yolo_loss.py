"""The losses of YOLO have the gradients that Darknet computes by hand."""

import math

import numpy as np
import pytest
import torch
import torchvision

from fgbg_kd.detectors.darknet import YoloLayer
from fgbg_kd.detectors.yolo_loss import (
    ciou,
    decode_boxes,
    matched_anchors,
    per_anchor,
    yolo_losses,
)

ANCHORS = [(10, 14), (23, 27), (37, 58), (81, 82)]
CLASSES = 3
SIZES = [(64, 64), (48, 64)]
# The second and third box of the first image train the same prediction: both are in cell (1, 1) of
# stride 32, and have the shape of the anchor (37, 58). The last box has the corner of the image.
BOXES = [
    [[3.0, 4.0, 12.0, 20.0], [30.0, 6.0, 62.0, 64.0], [28.0, 8.0, 64.0, 64.0]],
    [[41.0, 20.0, 64.0, 48.0], [10.0, 5.0, 40.0, 44.0], [54.0, 36.0, 64.0, 48.0]],
]
LABELS = [[0, 1, 2], [2, 0, 1]]


def layers(v4=False, iou_thresh=1.0, scale=1.0):
    common = {"anchors": ANCHORS, "scale": scale, "ignore_thresh": 0.25}
    common |= {"iou_thresh": iou_thresh, "ciou": v4}
    return [YoloLayer(16, mask=[0, 1], **common), YoloLayer(32, mask=[2, 3], **common)]


def raw_maps(of, dtype=torch.float64, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, len(x.mask) * (5 + CLASSES), 64 // x.stride, 64 // x.stride) for x in of]
    maps = [spread * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in maps]


def truth(boxes=BOXES, labels=LABELS, dtype=torch.float64):
    boxes = [torch.tensor(b, dtype=dtype).reshape(-1, 4) for b in boxes]
    return boxes, [torch.tensor(c, dtype=torch.long) for c in labels], SIZES


def losses(raw, of, iou_weight=1.0, gt=None):
    return yolo_losses(raw, of, *(gt or truth()), iou_weight)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def iou(a, b):
    """Of two boxes (centre x, centre y, width, height)."""
    sides = []
    for i in (0, 1):
        low = max(a[i] - a[2 + i] / 2, b[i] - b[2 + i] / 2)
        high = min(a[i] + a[2 + i] / 2, b[i] + b[2 + i] / 2)
        sides.append(max(high - low, 0))
    overlap = sides[0] * sides[1]
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def darknets_deltas(raw: np.ndarray, layer: YoloLayer, v4: bool) -> np.ndarray:
    """Darknet's forward_yolo_layer, in its order of loops: minus the gradient of each raw value.

    YOLOv3: the file of its author (pjreddie). YOLOv4: objectness and classes of its author's file
    (AlexeyAB); boxes are left at 0.
    """
    n, _, h, w = raw.shape
    x = raw.reshape(n, len(layer.mask), 5 + CLASSES, h, w)
    delta = np.zeros_like(x)
    for image in range(n):
        height, width = SIZES[image]
        boxes = np.array(BOXES[image])
        centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        truths = np.concatenate([centre, size], axis=1)
        for j in range(h):
            for i in range(w):
                for a, anchor in enumerate(layer.mask):
                    v = x[image, a, :, j, i]
                    box = (
                        (i + layer.scale * sigmoid(v[0]) - (layer.scale - 1) / 2) * layer.stride,
                        (j + layer.scale * sigmoid(v[1]) - (layer.scale - 1) / 2) * layer.stride,
                        math.exp(v[2]) * ANCHORS[anchor][0],
                        math.exp(v[3]) * ANCHORS[anchor][1],
                    )
                    best = max(iou(box, t) for t in truths)
                    if v4 and not any(sigmoid(c) > 0.25 for c in v[5:]):
                        best = 0.0
                    if best <= layer.ignore_thresh:
                        delta[image, a, 4, j, i] = -sigmoid(v[4])
        for t, label in zip(truths, LABELS[image]):
            i, j = int(t[0] / layer.stride), int(t[1] / layer.stride)
            overlaps = [iou((0, 0, *t[2:]), (0, 0, *anchor)) for anchor in ANCHORS]
            chosen = [int(np.argmax(overlaps))]
            chosen += [
                k for k, o in enumerate(overlaps) if o > layer.iou_thresh and k not in chosen
            ]
            for anchor in chosen:
                if anchor not in layer.mask:
                    continue
                a = layer.mask.index(anchor)
                v, d = x[image, a, :, j, i], delta[image, a, :, j, i]
                d[4] = 1 - sigmoid(v[4])
                if d[5:].any():
                    d[5 + label] = 1 - sigmoid(v[5 + label])
                else:
                    for c in range(CLASSES):
                        d[5 + c] = (c == label) - sigmoid(v[5 + c])
                if v4:
                    continue
                scale = 2 - t[2] * t[3] / (width * height)
                d[0] = scale * (t[0] / layer.stride - i - sigmoid(v[0]))
                d[1] = scale * (t[1] / layer.stride - j - sigmoid(v[1]))
                d[2] = scale * (math.log(t[2] / ANCHORS[anchor][0]) - v[2])
                d[3] = scale * (math.log(t[3] / ANCHORS[anchor][1]) - v[3])
    return delta.reshape(raw.shape)


def test_the_gradient_of_yolov3_is_darknets_delta():
    of = layers()
    raw = raw_maps(of)
    sum(losses(raw, of).values()).backward()
    ignored = 0
    for x, layer in zip(raw, of):
        delta = darknets_deltas(x.detach().numpy(), layer, v4=False)
        np.testing.assert_allclose(-x.grad.numpy() * len(SIZES), delta, rtol=0, atol=1e-12)
        assert (per_anchor(x.grad, layer)[:, :, :4].abs().sum((1, 2, 3, 4)) > 0).any()
        ignored += int((per_anchor(x.grad, layer)[:, :, 4] == 0).sum())
    assert ignored > 3  # the example has predictions that are neither object nor background


@pytest.mark.parametrize("iou_thresh", [1.0, 0.213])
def test_the_gradient_of_objectness_and_classes_of_yolov4_is_darknets_delta(iou_thresh):
    of = layers(v4=True, iou_thresh=iou_thresh, scale=1.1)
    raw = raw_maps(of)
    found = losses(raw, of)
    (found["loss_obj"] + found["loss_cls"]).backward()
    trained = 0
    for x, layer in zip(raw, of):
        delta = darknets_deltas(x.detach().numpy(), layer, v4=True)
        np.testing.assert_allclose(-x.grad.numpy() * len(SIZES), delta, rtol=0, atol=1e-12)
        trained += int((per_anchor(x.grad, layer)[:, :, 5] != 0).sum())
    assert trained == (5 if iou_thresh == 1 else 10)


def test_a_class_score_under_a_quarter_is_never_ignored_by_yolov4():
    """A prediction at the very place of an object is background for it without a class."""
    of = layers(v4=True)
    raw = raw_maps(of, spread=0.1)
    for x, layer in zip(raw, of):
        with torch.no_grad():
            per_anchor(x, layer)[:, :, 5:] -= 5
    losses(raw, of)["loss_obj"].backward()
    assert all((per_anchor(x.grad, layer)[:, :, 4] != 0).all() for x, layer in zip(raw, of))


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_the_box_loss_of_yolov3_is_0_for_the_right_box_and_has_darknets_gradient(scale):
    """One box in the middle of a cell, with the size of its anchor: x = y = 0.5, w = h = 1."""
    of = [layers(scale=scale)[1]]
    gt = truth([[[48.0 - 18.5, 48.0 - 29, 48.0 + 18.5, 48.0 + 29]], []], [[1], []])
    raw = [torch.zeros(2, 2 * (5 + CLASSES), 2, 2, dtype=torch.float64, requires_grad=True)]
    assert losses(raw, of, gt=gt)["loss_box_reg"].abs() < 1e-12
    moved = raw[0].detach().clone()
    moved[0, :4, 1, 1] = torch.tensor([0.3, -0.4, 0.5, -0.6])
    moved.requires_grad_()
    losses([moved], of, gt=gt)["loss_box_reg"].backward()
    xy = scale * moved[0, :2, 1, 1].sigmoid() - (scale - 1) / 2 - 0.5
    expected = torch.cat([xy, moved[0, 2:4, 1, 1]]) * (2 - 37 * 58 / 64**2) / 2  # two images
    torch.testing.assert_close(moved.grad[0, :4, 1, 1], expected.detach())


def test_the_box_loss_of_yolov4_is_the_weighted_mean_of_1_minus_ciou():
    """One box that two anchors train, with the formula of Zheng et al. (AAAI 2020)."""
    of = [layers(v4=True, iou_thresh=0.5, scale=1.05)[1]]
    box = [20.0, 10.0, 72.0, 88.0]
    raw = raw_maps(of, spread=0.5)
    gt = ([torch.tensor([box]).double(), torch.zeros(0, 4).double()],
          [torch.tensor([1]), torch.zeros(0, dtype=torch.long)], [(96, 96)] * 2)  # fmt: skip
    assert matched_anchors(torch.tensor([[52.0, 78.0]]), of[0]).tolist() == [[True, True]]
    found = losses(raw, of, 2.5, gt)["loss_box_reg"].item()
    boxes = decode_boxes(per_anchor(raw[0], of[0]), of[0]).detach()
    expected = 0.0
    for a in (0, 1):
        x0, y0, x1, y1 = boxes[0, a, :, 1, 1].tolist()
        c = [((x0 + x1) / 2, (y0 + y1) / 2), (46.0, 49.0)]
        diagonal = (max(x1, 72) - min(x0, 20)) ** 2 + (max(y1, 88) - min(y0, 10)) ** 2
        distance = (c[0][0] - c[1][0]) ** 2 + (c[0][1] - c[1][1]) ** 2
        overlap = iou((*c[0], x1 - x0, y1 - y0), (*c[1], 52, 78))
        v = 4 / math.pi**2 * (math.atan(52 / 78) - math.atan((x1 - x0) / (y1 - y0))) ** 2
        expected += 1 - overlap + distance / diagonal + v * v / (1 - overlap + v)
    assert found == pytest.approx(2.5 * expected / 2, rel=1e-5)  # two images


def test_ciou_is_torchvisions_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    corners = 50 * torch.rand(2, 200, 2, generator=generator, dtype=torch.float64)
    sizes = 1 + 40 * torch.rand(2, 200, 2, generator=generator, dtype=torch.float64)
    a, b = torch.cat([corners, corners + sizes], dim=2)
    assert ((torchvision.ops.box_iou(a, b).diagonal() == 0).sum()) > 20  # some are apart
    a.requires_grad_()
    ours, theirs = 1 - ciou(a, b), torchvision.ops.complete_box_iou_loss(a, b, eps=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (ours_grad,) = torch.autograd.grad(ours.sum(), a)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), a)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-6)


def test_objects_on_one_prediction_share_the_box_loss_of_yolov4():
    """Twice the same object with two classes weighs as much as once."""
    of = layers(v4=True)
    raw = raw_maps(of)
    box = BOXES[0][1:2]
    one = losses(raw, of, gt=truth([box, []], [[1], []]))["loss_box_reg"]
    two = losses(raw, of, gt=truth([box * 2, []], [[1, 2], []]))["loss_box_reg"]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("v4", [False, True])
def test_images_without_boxes_are_background(v4):
    of = layers(v4=v4)
    raw = raw_maps(of)
    found = losses(raw, of, gt=truth([[], []], [[], []]))
    assert found["loss_cls"] == found["loss_box_reg"] == 0
    expected = sum(per_anchor(x, y)[:, :, 4].exp().add(1).log().sum() for x, y in zip(raw, of))
    torch.testing.assert_close(found["loss_obj"], expected / 2)
    sum(found.values()).backward()
    assert all(x.grad.isfinite().all() for x in raw)


@pytest.mark.parametrize("v4", [False, True])
def test_the_loss_is_the_mean_over_images(v4):
    """So it does not depend on how a batch is split over processes."""
    of = layers(v4=v4, iou_thresh=0.213)
    raw = raw_maps(of)
    boxes, labels, sizes = truth()
    whole = losses(raw, of)
    parts = [
        losses(
            [x[i : i + 1] for x in raw], of, gt=(boxes[i : i + 1], labels[i : i + 1], [sizes[i]])
        )
        for i in (0, 1)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(v4, dtype):
    of = layers(v4=v4)
    raw = raw_maps(of, dtype)
    single = [x.detach().float() for x in raw]
    gt = truth(dtype=torch.float32)
    for name, value in losses(raw, of, gt=gt).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, losses(single, of, gt=gt)[name])


@pytest.mark.parametrize("v4", [False, True])
def test_large_values_give_finite_losses_and_gradients(v4):
    of = layers(v4=v4)
    raw = [(x.detach() * 200).requires_grad_() for x in raw_maps(of, torch.float32)]
    found = losses(raw, of, gt=truth(dtype=torch.float32))
    assert all(v.isfinite() for v in found.values())
    sum(found.values()).backward()
    assert all(x.grad.isfinite().all() for x in raw)


@pytest.mark.parametrize("v4", [False, True])
def test_an_empty_box_on_the_border_trains_the_last_cell(v4):
    of = layers(v4=v4)
    raw = raw_maps(of)
    found = losses(raw, of, gt=truth([[[64.0, 64.0, 64.0, 64.0]], []], [[1], []]))
    assert all(v.isfinite() for v in found.values())
    sum(found.values()).backward()
    assert all(x.grad.isfinite().all() for x in raw)
    trained = per_anchor(raw[0].grad, of[0])[0, :, 5].nonzero()
    assert trained.tolist() == [[0, 3, 3]]  # anchor, row, column
