"""Every detector that can be a student, under every detector that can be a teacher."""

import pytest
import torch
from conftest import (
    detector,
    distiller,
    faster_rcnn,
    losses_of,
    make_batch,
    tiny_ssd,
    tiny_yolo_cfg,
    yolox_detector,
)
from detectron2.modeling import build_model

pytest.importorskip("yolox")


def yolo(seed=1):
    torch.manual_seed(seed)
    return build_model(tiny_yolo_cfg())


STUDENTS = {
    "RetinaNet": lambda seed: detector(seed=seed),
    "FCOS": lambda seed: detector("FCOS", seed=seed),
    "SSD": lambda seed: tiny_ssd(seed=seed),
    "YOLOX": lambda seed: yolox_detector(seed=seed),
    "YOLO": yolo,
}
TEACHERS = {**STUDENTS, "GeneralizedRCNN": lambda seed: faster_rcnn()}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.slow
def test_a_pair_trains_a_step(student, teacher):
    model = distiller(STUDENTS[student](1), TEACHERS[teacher](2), gate=False)
    dense = teacher in STUDENTS
    assert model.method.assign == ("teacher" if dense else "scale")
    losses = losses_of(model, make_batch(boxes=(((5, 5, 30, 40), (0, 0, 64, 60)), ())))
    assert losses["loss_kd_fg"] > 0
    assert ("loss_kd_bg_features" in losses) == (student == teacher)
    assert ("loss_kd_bg" in losses) == dense and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lacking = [n for n, p in learning.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking
