"""The gate, and the qualities that it compares, against values computed by hand."""

import pytest
import torch
from conftest import make_batch, tiny_cfg
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fgbg_kd.ops import prediction_quality, split, teacher_gate


def cells():
    """2 x 2 cells of stride 8; box 0 owns the upper row, the lower left is background."""
    return split([torch.tensor([[0.0, 0, 16, 8]])], [(16, 8)], [(2, 2)], [8], assign="all")


def upper_row():
    return split([torch.tensor([[0.0, 0, 16, 8]])], [(16, 16)], [(2, 2)], [8], assign="all")


def test_quality_is_the_score_of_the_class_or_one_minus_the_best_score():
    """Compares with a loop over the cells. Detectron2 lists their scores."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    batch = make_batch(boxes=(((5, 5, 30, 40), (40, 10, 70, 50)), ((3, 3, 50, 60),)))
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
        logits, _ = model.head(features)
        gt = [x["instances"] for x in batch]
        boxes = [x.gt_boxes.tensor for x in gt]
        shapes = [f.shape[-2:] for f in features]
        owned = split(boxes, images.image_sizes, shapes, [8, 16, 32], assign="all")
        classes = torch.nn.utils.rnn.pad_sequence([x.gt_classes for x in gt], batch_first=True)
        got = prediction_quality(logits, owned, classes, 2)

        per_level = model._transpose_dense_predictions([logits], [2])[0]
        scores = torch.cat(per_level, 1).sigmoid().reshape(2, -1, 2, 2)  # (N, R, A, K)
        expected = torch.empty_like(got)
        for n in range(2):
            for r, b in enumerate(owned.box_index[n].tolist()):
                if b >= 0:
                    expected[n, r] = scores[n, r, :, gt[n].gt_classes[b]].max()
                else:
                    expected[n, r] = 1 - scores[n, r].max() if b == -1 else 0
    assert owned.foreground.any(1).all() and owned.background.any(1).all()
    assert (owned.box_index == -2).any()
    torch.testing.assert_close(got, expected)


def gate_of(student, teacher, owned=None):
    return teacher_gate(torch.tensor([student]), torch.tensor([teacher]), owned or upper_row())


def test_the_gate_of_an_object_is_twice_the_teachers_best_score_if_it_is_higher():
    """The cells need not be the same: 0.4 against 0.3, not the mean of +0.3 and -0.1."""
    gate = gate_of([0.1, 0.3, 1.0, 1.0], [0.4, 0.2, 1.0, 1.0])
    torch.testing.assert_close(gate, torch.tensor([[0.8, 0.8, 1, 1]]))
    assert gate_of([0.1, 0.5, 1.0, 1.0], [0.4, 0.2, 1.0, 1.0]).tolist() == [[0, 0, 1, 1]]
    assert gate_of([0.1, 0.5, 1.0, 1.0], [0.6, 0.2, 1.0, 1.0]).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("teacher", [0.5, 0.2, 0.0])
def test_an_object_that_the_student_sees_as_well_has_a_closed_gate(teacher):
    assert gate_of([0.5, 0.1, 1.0, 1.0], [teacher, 0.0, 1.0, 1.0]).tolist() == [[0, 0, 1, 1]]


def test_the_gate_of_a_background_cell_is_the_ratio_of_the_qualities_and_at_most_1():
    """0.2 against 0.8: the teacher sees an object there, and the student does not."""
    gate = gate_of([0.0, 0.0, 0.8, 0.5], [1.0, 0.0, 0.2, 0.9])
    torch.testing.assert_close(gate, torch.tensor([[1, 1, 0.25, 1]]))


def test_the_gate_is_open_on_background_where_both_are_sure_of_an_object():
    assert gate_of([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]).tolist() == [[0, 0, 1, 1]]


def test_objects_do_not_share_their_best_cells_nor_take_those_of_the_background():
    boxes = [torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])]
    owned = split(boxes, [(16, 16)], [(2, 2)], [8], assign="all")
    gate = gate_of([0.3, 0.3, 0.1, 0.1], [0.2, 0.4, 1.0, 1.0], owned)
    torch.testing.assert_close(gate, torch.tensor([[0, 0.8, 1, 1]]))


def test_the_best_cell_may_be_on_another_level():
    box = [torch.tensor([[0.0, 0, 16, 16]])]
    owned = split(box, [(16, 16)], [(2, 2), (1, 1)], [8, 16], assign="all")
    gate = gate_of([0.1, 0.1, 0.1, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2, 0.4], owned)
    torch.testing.assert_close(gate, torch.full((1, 5), 0.8))
    gate = gate_of([0.1, 0.1, 0.1, 0.7, 0.2], [0.2, 0.2, 0.2, 0.2, 0.6], owned)
    assert gate.tolist() == [[0] * 5]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_the_gate_equals_a_loop_over_the_objects(seed):
    """Random boxes, some of which own no cell, on two images of different size."""
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for _ in range(2):
        corner = 40 * torch.rand(5, 2, generator=generator)
        boxes.append(torch.cat([corner, corner + 30 * torch.rand(5, 2, generator=generator)], 1))
    owned = split(boxes, [(48, 40), (33, 48)], [(6, 6), (3, 3)], [8, 16], assign="all")
    s, t = torch.rand(2, *owned.box_index.shape, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(s)
    for n in range(2):
        for b in range(5):
            mine = owned.box_index[n] == b
            if mine.any():
                best = t[n, mine].max()
                expected[n, mine] = min(1.0, 2 * best) if best > s[n, mine].max() else 0.0
        for r in (owned.box_index[n] == -1).nonzero()[:, 0]:
            expected[n, r] = min(1.0, float(t[n, r] / s[n, r]))
    torch.testing.assert_close(teacher_gate(s, t, owned), expected)


def test_a_quality_that_is_nan_stays_visible():
    nan = float("nan")
    broken, whole = [nan, 0.1, 0.5, nan], [0.2, 0.2, 0.5, 0.5]
    for pair in ((broken, whole), (whole, broken)):
        assert gate_of(*pair).isnan().tolist() == [[True, True, False, True]]


def test_the_gate_is_0_on_padding_and_has_no_gradient():
    owned = cells()
    student = torch.full((1, 4), 0.25, requires_grad=True)
    gate = teacher_gate(student, torch.ones(1, 4), owned)
    padding = owned.box_index == -2
    assert padding.sum() == 2 and (gate[padding] == 0).all() and (gate[~padding] > 0).all()
    assert not gate.requires_grad


def test_an_image_may_have_more_objects_than_cells():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * 12
    owned = split([torch.cat([corner, corner + 3], 1)], [(16, 16)], [(2, 2)], [8], assign="all")
    assert owned.box_index.max() >= 4
    gate = teacher_gate(torch.zeros(1, 4), torch.ones(1, 4), owned)
    assert gate.tolist() == [[1, 1, 1, 1]]
