"""The code in docs/extending.md runs unchanged: a user's method, detector and training loop."""

import itertools
import re
import sys

import pytest
import torch
from conftest import ROOT, make_batch, tiny_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.config import student_config
from fgbg_kd.deploy import Deployable
from fgbg_kd.detectors import view
from fgbg_kd.methods import build_method
from fgbg_kd.utils.errors import DetectorError

PAGE = (ROOT / "docs" / "extending.md").read_text()
METHOD, DETECTOR, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_are_as_short_as_the_page_says():
    assert len(METHOD.strip().splitlines()) <= 25
    assert len(DETECTOR.strip().splitlines()) <= 45


def test_a_method_from_outside_has_keys_and_trains(distil_cfg):
    exec(METHOD, {})
    assert get_fgbg_kd_cfg().MODEL.KD.L1.WEIGHT == 1.0
    assert build_method("L1", [3], [3]).weight == 1.0
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_other_cfg(distil_cfg)
    cfg.merge_from_list(["MODEL.KD.METHOD", "L1", "MODEL.KD.L1.WEIGHT", "0.5"])
    model = build_model(cfg).train()
    assert model.method.weight == 0.5
    with EventStorage():
        losses = model(make_batch())
    assert losses["loss_kd"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


class MyDetector(nn.Module):
    """The page's detector: objectness, classes and distances to the sides, two levels."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.num_classes = 2
        self.predict = nn.Conv2d(cfg.MODEL.FPN.OUT_CHANNELS, 1 + 2 + 4, kernel_size=1)
        for name in ("mean", "std"):
            value = torch.tensor(cfg.MODEL[f"PIXEL_{name.upper()}"]).reshape(3, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std
                  for x in batched_inputs]  # fmt: skip
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def losses(self, raw, boxes, gt_instances):
        return {"loss_objectness": sum(x[:, 0].square().mean() for x in raw)}


@pytest.fixture
def my_detector(monkeypatch):
    """The config of a student whose view is the page's."""
    META_ARCH_REGISTRY.register(MyDetector)
    monkeypatch.setitem(sys.modules, "my_detector", sys.modules[__name__])
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "MyDetector"
    return cfg


def test_a_detector_from_outside_learns_from_a_retinanet(my_detector, teacher_files):
    exec(DETECTOR, {})
    cfg = my_detector
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.KD.STUDENT = "FgBgDistiller", "MyDetector"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = teacher_files
    model = build_model(cfg).train()
    torch.nn.init.constant_(model.teacher.detector.head.cls_score.bias, 2.0)  # the gate opens
    assert [level.stride for level in model.levels] == [8, 16] and not model.same_anchors
    with EventStorage(19) as storage:
        losses = model(make_batch())
        assert "kd/fg_gate" in storage.latest()
    assert set(losses) == {"loss_objectness", "loss_kd_fg", "loss_kd_bg"}
    assert losses["loss_kd_fg"] > 0 and losses["loss_kd_bg"] > 0
    sum(losses.values()).backward()
    assert model.student.predict.weight.grad.abs().sum() > 0


def test_a_detector_from_outside_predicts_its_final_score_and_is_exported(my_detector):
    exec(DETECTOR, {})
    torch.manual_seed(0)
    detector = build_model(my_detector).eval()
    of = view(detector)
    images = torch.randn(1, 3, 64, 96)
    output = of.run(images)
    for x, logits in zip(output.raw, output.logits):
        score = x[:, :1].sigmoid() * x[:, 1:-4].sigmoid()
        torch.testing.assert_close(logits.sigmoid(), score, atol=1e-6, rtol=1e-5)
    boxes, scores, classes = Deployable(detector)(torch.zeros(64, 96, 3, dtype=torch.uint8))
    assert len(boxes) == len(scores) == len(classes) > 0
    assert (boxes[:, 2] <= 96).all() and (boxes[:, 3] <= 64).all() and (boxes >= 0).all()


def test_a_dense_detector_without_a_view_is_refused_with_the_page(monkeypatch):
    from detectron2.modeling.meta_arch.dense_detector import DenseDetector

    class Unknown(DenseDetector):
        def __init__(self):
            nn.Module.__init__(self)
            self.backbone = nn.Identity()

    with pytest.raises(
        DetectorError, match=r"Unknown is a dense .*register_view\(Unknown\).*docs/"
    ):
        view(Unknown())


def test_a_loop_of_the_user_trains_the_student(distil_cfg):
    names = {}
    exec(LOOP, names)
    student = build_model(student_config(distil_cfg))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    teacher = distil_cfg.MODEL.KD.TEACHER
    batches = itertools.repeat(make_batch())
    found = names["distil"](student, teacher.CONFIG, teacher.WEIGHTS, batches, 2, pretrained=False)
    assert found is student
    assert not torch.equal(found.head.cls_score.weight, before["head.cls_score.weight"])
    assert found.state_dict().keys() == before.keys()
