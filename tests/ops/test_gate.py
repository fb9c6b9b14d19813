"""The gate, and the qualities that it compares, against values computed by hand."""

import pytest
import torch
from conftest import make_batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou

from fgbg_kd.detectors.dense import view
from fgbg_kd.ops import prediction_quality, split, teacher_gate


def cells():
    """2 x 2 cells of stride 8; box 0 owns the upper row, the lower left is background."""
    return split([torch.tensor([[0.0, 0, 16, 8]])], [(16, 8)], [(2, 2)], [8], assign="all")


def upper_row():
    return split([torch.tensor([[0.0, 0, 16, 8]])], [(16, 16)], [(2, 2)], [8], assign="all")


def test_quality_is_score_of_the_class_times_iou_or_one_minus_the_best_score():
    """Compares with the same quality, computed per box with Detectron2's functions."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.2)
    batch = make_batch(boxes=(((5, 5, 30, 40), (40, 10, 70, 50)), ((3, 3, 50, 60),)))
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
        logits, deltas = model.head(features)
        gt = [x["instances"] for x in batch]
        boxes = [x.gt_boxes.tensor for x in gt]
        shapes = [f.shape[-2:] for f in features]
        owned = split(boxes, images.image_sizes, shapes, [8, 16, 32], assign="all")
        classes = torch.nn.utils.rnn.pad_sequence([x.gt_classes for x in gt], batch_first=True)
        of = view(model)
        decoded = of.decode(features, (logits, deltas))
        got = prediction_quality(logits, owned, classes, 2, decoded)
        by_score = prediction_quality(logits, owned, classes, 2)

        anchors = Boxes.cat(model.anchor_generator(features)).tensor
        flat_logits, flat_deltas = (
            torch.cat(x, 1) for x in model._transpose_dense_predictions([logits, deltas], [2, 4])
        )
        expected = torch.empty_like(got)
        for n in range(2):
            decoded = model.box2box_transform.apply_deltas(flat_deltas[n], anchors)
            iou = pairwise_iou(Boxes(decoded), Boxes(boxes[n])).reshape(-1, 2, len(boxes[n]))
            p = flat_logits[n].sigmoid().reshape(-1, 2, 2)  # (R, A, K)
            for r, b in enumerate(owned.box_index[n].tolist()):
                if b >= 0:
                    expected[n, r] = (p[r, :, gt[n].gt_classes[b]] * iou[r, :, b]).max()
                else:
                    expected[n, r] = 1 - p[r].max() if b == -1 else 0
    assert owned.foreground.any(1).all() and owned.background.any(1).all()
    assert (owned.box_index == -2).any()
    torch.testing.assert_close(got, expected)
    assert (by_score >= got).all() and (by_score[owned.foreground] > got[owned.foreground]).all()


def test_cell_gate_opens_where_the_teacher_is_better_by_the_margin():
    student, teacher = torch.tensor([[0.1, 0.5, 0.5, 0.9]]), torch.tensor([[0.3, 0.5, 0.55, 0.2]])
    assert teacher_gate(student, teacher, upper_row(), mode="cell", margin=0.0).tolist() == [
        [1, 0, 1, 0]
    ]
    gate = teacher_gate(student, teacher, upper_row(), mode="cell", margin=0.1)
    assert gate.tolist() == [[1, 0, 0, 0]]


def test_object_gate_averages_over_the_cells_of_the_box():
    student, teacher = torch.tensor([[0.1, 0.5, 0.5, 0.1]]), torch.tensor([[0.6, 0.2, 0.4, 0.2]])
    gate = teacher_gate(student, teacher, upper_row(), mode="object", margin=0.0)
    assert gate.tolist() == [[1, 1, 0, 1]]  # +0.5 and -0.3 average to +0.1; background by cell


def test_image_gate_averages_foreground_and_background_apart():
    student, teacher = torch.tensor([[0.1, 0.5, 0.5, 0.1]]), torch.tensor([[0.6, 0.2, 0.3, 0.2]])
    gate = teacher_gate(student, teacher, upper_row(), mode="image", margin=0.0)
    assert gate.tolist() == [[1, 1, 0, 0]]


def test_background_does_not_count_for_the_first_object_nor_padding_for_the_background():
    student = torch.full((1, 4), 0.5)
    worse_below = torch.tensor([[0.6, 0.6, 0.0, 0.0]])
    gate = teacher_gate(student, worse_below, upper_row(), mode="object", margin=0.0)
    assert gate.tolist() == [[1, 1, 0, 0]]
    box = [torch.tensor([[0.0, 0, 8, 8]])]
    right_is_padding = split(box, [(16, 8)], [(2, 2)], [8], assign="all")
    teacher = torch.tensor([[0.6, 0.0, 0.6, 0.0]])
    gate = teacher_gate(student, teacher, right_is_padding, mode="image", margin=0.0)
    assert gate.tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize("mode", ["object", "image"])
def test_the_mean_of_a_group_is_of_its_own_cells_and_compared_with_the_margin(mode):
    """Two cells by 0.2 and 0.1, so 0.15 on average, not 0.3."""
    student, teacher = torch.full((1, 4), 0.5), torch.tensor([[0.7, 0.6, 0.5, 0.5]])
    for margin, opened in ((0.14, 1), (0.16, 0)):
        gate = teacher_gate(student, teacher, upper_row(), mode=mode, margin=margin)
        assert gate.tolist() == [[opened, opened, 0, 0]]


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 0, 6, 4), 1 / 3),
        ((0, 0, 4, 4), (8, 8, 12, 12), 0.0),  # apart on both axes
        ((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5), 1 / 3),  # under a pixel
        ((3, 3, 3, 3), (3, 3, 3, 3), 0.0),  # both empty
    ],
)
def test_the_quality_with_boxes_is_the_score_times_the_iou(a, b, expected):
    owned = split([torch.tensor([b]).float()], [(8, 8)], [(1, 1)], [8], assign="all")
    owned = owned._replace(
        box_index=torch.zeros(1, 1, dtype=torch.int32), boxes=torch.tensor([[b]]).float()
    )
    logits, decoded = torch.zeros(1, 1, 1, 1), torch.tensor(a).float().reshape(1, 4, 1, 1)
    got = prediction_quality([logits], owned, torch.zeros(1, 1, dtype=torch.long), 1, [decoded])
    assert got.item() == pytest.approx(0.5 * expected)


@pytest.mark.parametrize("mode", ["cell", "object", "image"])
def test_the_gate_is_shut_on_padding_and_carries_no_gradient(mode):
    owned = cells()
    student = torch.zeros(1, 4, requires_grad=True)
    gate = teacher_gate(student, torch.ones(1, 4), owned, mode=mode, margin=0.0)
    padding = owned.box_index == -2
    assert padding.sum() == 2 and (gate[padding] == 0).all() and (gate[~padding] == 1).all()
    assert not gate.requires_grad


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'maybe'"):
        teacher_gate(torch.zeros(1, 4), torch.zeros(1, 4), cells(), mode="maybe", margin=0.0)


def test_an_image_may_have_more_objects_than_cells():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 12
    owned = split([torch.cat([corner, corner + 3], 1)], [(16, 16)], [(2, 2)], [8], assign="all")
    assert owned.box_index.max() >= 4
    gate = teacher_gate(torch.zeros(1, 4), torch.ones(1, 4), owned, mode="object", margin=0.0)
    assert gate.tolist() == [[1, 1, 1, 1]]
