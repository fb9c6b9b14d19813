"""YOLOX trains: as student and as teacher, in mixed precision, resumed.

Several processes are tested in test_distributed.py.
"""

import pytest
import torch
from conftest import (
    FGBG_OFF,
    detector,
    distiller,
    losses_of,
    make_batch,
    make_trainer,
    seen_by,
    tiny_yolox_cfg,
    train,
    weights,
    yolox_detector,
)
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase
from detectron2.modeling import build_model

from fgbg_kd.deploy import Deployable
from fgbg_kd.detectors import view
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.non_finite import not_finite
from fgbg_kd.experiments.cost import cost
from fgbg_kd.utils.errors import TeacherError

pytest.importorskip("yolox")

MAKERS = {
    "YOLOX": yolox_detector,
    "RetinaNet": lambda seed: detector(seed=seed),
    "FCOS": lambda seed: detector("FCOS", seed=seed),
}


@pytest.mark.parametrize(
    "student, teacher, same",
    [
        ("YOLOX", "YOLOX", True),
        ("RetinaNet", "YOLOX", False),
        ("YOLOX", "RetinaNet", False),
        ("YOLOX", "FCOS", True),  # both have one square of the stride's size in a cell
    ],
)
def test_a_pair_trains_a_step(student, teacher, same):
    model = distiller(MAKERS[student](seed=1), MAKERS[teacher](seed=2), gate=False, assign="all")
    assert model.same_anchors == same and [x.stride for x in model.levels] == [8, 16, 32]
    found = losses_of(model)
    assert found["loss_kd_fg"] > 0 and found["loss_kd_bg"] > 0
    found["loss_kd_bg"].backward(retain_graph=True)
    head = model.student.head
    convs = [*head.cls_preds, *head.obj_preds] if student == "YOLOX" else [head.cls_score]
    assert all(conv.weight.grad.any() for conv in convs)
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_method_that_needs_the_normaliser_runs():
    model = distiller(yolox_detector(), yolox_detector(seed=2), name="QFL")
    found = losses_of(model)
    assert all(v.isfinite() and v > 0 for v in found.values())
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_batch_without_boxes_distils():
    model = distiller(yolox_detector(), yolox_detector(seed=2))
    found = losses_of(model, make_batch(boxes=((), ())))
    assert found["loss_kd_fg"] == 0 and found["loss_iou"] == 0 and found["loss_obj"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_of_0_are_plain_training_bit_for_bit():
    plain = losses_of(yolox_detector().train())
    model = distiller(yolox_detector(), yolox_detector(seed=2), **FGBG_OFF)
    assert model.teacher is None
    found = losses_of(model)
    assert found.keys() == plain.keys() and all(torch.equal(found[k], plain[k]) for k in plain)


def test_a_teacher_gets_its_padding_and_a_retinanet_its_own():
    """The pair pads differently: with 114, and with 0 after normalisation."""
    for student, teacher in ((detector(), yolox_detector()), (yolox_detector(), detector())):
        model = distiller(student, teacher)
        inputs = []
        teacher.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        batch = make_batch()
        losses_of(model, batch)
        for x, expected in zip(inputs[0], teacher.preprocess_image(batch).tensor):
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-4)


def test_a_teacher_of_more_classes_teaches_fewer():
    def four(cfg):
        cfg.MODEL.YOLOX.NUM_CLASSES = 4

    names = {"teacher_classes": ["d", "stripe", "c", "square"], "classes": ["square", "stripe"]}
    teacher = yolox_detector(four)
    images = teacher.preprocess_image(make_batch()).tensor
    with torch.no_grad():
        before = view(teacher.eval()).run(images).logits[0]
    _, batch = seen_by(distiller(yolox_detector(), teacher, **names))
    expected = before[:, [3, 1]]
    torch.testing.assert_close(batch.teacher.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert teacher.num_classes == 2


@pytest.mark.parametrize("part", ["fpn", "head"])
def test_parts_are_inherited_without_the_bottom_up_network(part):
    student, teacher = yolox_detector(seed=3), yolox_detector(seed=2)
    prefix = {"fpn": "backbone.", "head": "head."}[part]
    saved = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = {k: v.clone() for k, v in student.state_dict().items()}
    distiller(student, teacher, inherit=[part]).inherit()
    for name, value in student.state_dict().items():
        inherited = name.startswith(prefix) and not name.startswith("backbone.backbone.")
        assert torch.equal(value, (saved if inherited else before)[name])


@pytest.mark.parametrize("part", ["fpn", "head"])
def test_parts_of_another_width_or_class_are_refused(part):
    def wider(cfg):
        cfg.MODEL.YOLOX.WIDTH = 0.125

    for teacher in (yolox_detector(wider), detector()):
        with pytest.raises(TeacherError, match="no weight of the teacher's .* fits"):
            distiller(yolox_detector(), teacher, inherit=[part])


def test_losses_in_bf16_are_finite_and_in_fp32():
    model = distiller(yolox_detector(), yolox_detector(seed=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses_of(model)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in found.values())
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_parts_that_are_not_finite_are_named():
    model = yolox_detector()
    torch.nn.init.constant_(model.head.obj_preds[1].bias, float("nan"))
    message = not_finite(model, make_batch())
    assert "objectness of the model on p4" in message
    assert "class logits" not in message and "box deltas" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["cls_preds", "obj_preds", "reg_preds"])
def test_predictions_that_are_not_finite_give_losses_that_are_not(part, value):
    model = yolox_detector().train()
    for conv in getattr(model.head, part):
        torch.nn.init.constant_(conv.bias, value)
    assert not all(loss.isfinite() for loss in losses_of(model).values())


def test_its_cost_is_counted():
    found = cost(yolox_detector().eval(), {"image": torch.zeros(3, 64, 64)}, runs=1)
    wider = yolox_detector(lambda cfg: cfg.MODEL.YOLOX.update(WIDTH=0.125)).eval()
    assert 0 < found["gflops"] < cost(wider, {"image": torch.zeros(3, 64, 64)}, runs=1)["gflops"]


def test_the_padding_of_a_deployed_detector_is_grey():
    seen, model = [], yolox_detector().eval()
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Deployable(model)(torch.zeros(50, 60, 3, dtype=torch.uint8))
    assert seen[0].shape == (1, 3, 64, 64)
    assert (seen[0][:, :, 50:] == 114).all() and (seen[0][:, :, :, 60:] == 114).all()
    assert (seen[0][:, :, :50, :60] == 0).all()


# --- runs ---


@pytest.fixture(scope="module")
def yolox_files(tmp_path_factory):
    """Paths of a teacher's config and weights."""
    folder = tmp_path_factory.mktemp("yolox")
    config, path = folder / "teacher.yaml", folder / "teacher.pth"
    config.write_text(tiny_yolox_cfg().dump())
    torch.save({"model": yolox_detector(seed=2).state_dict()}, path)
    return str(config), str(path)


@pytest.fixture
def distil_cfg(coco, yolox_files):
    cfg = tiny_yolox_cfg(coco)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.KD.STUDENT = "FgBgDistiller", "YOLOX"
    cfg.MODEL.KD.TEACHER.CONFIG, cfg.MODEL.KD.TEACHER.WEIGHTS = yolox_files
    return cfg


class Kill(HookBase):
    def after_step(self):
        if self.trainer.iter == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_the_same(distil_cfg, tmp_path):
    """With averaged weights, and an evaluation on the way."""
    distil_cfg.SOLVER.EMA_DECAY, distil_cfg.SOLVER.CHECKPOINT_PERIOD = 0.5, 2
    distil_cfg.TEST.EVAL_PERIOD = 3
    whole = train(FgBgTrainer, distil_cfg, tmp_path / "whole", 6)
    killed = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "killed", 6)
    killed.register_hooks([Kill()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = train(FgBgTrainer, distil_cfg, tmp_path / "killed", 6, resume=True)
    assert whole.start_iter == 0 and 0 < resumed.start_iter < 6
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    normalizers = [x.student.loss_normalizer for x in (whole.model, resumed.model)]
    assert torch.equal(*normalizers) and normalizers[0] > 0
    assert a.keys() == yolox_detector().state_dict().keys()


@pytest.mark.slow
def test_a_weak_teacher_is_evaluated_and_refused(distil_cfg, tmp_path):
    distil_cfg.MODEL.KD.TEACHER.MIN_AP = 50.0
    with pytest.raises(TeacherError, match=r"The teacher reaches \d+\.\d AP"):
        train(FgBgTrainer, distil_cfg, tmp_path / "run", 1)


LAZY = """
from detectron2.config import LazyCall as L
from fgbg_kd import FgBgDistiller, build_teacher
from fgbg_kd.detectors import YOLOX

model = L(FgBgDistiller)(
    student=L(YOLOX)(width=0.0625, num_classes=2),
    teacher=L(build_teacher)(config={!r}, weights={!r}),
)
"""


def test_yaml_and_python_give_the_same_losses_bit_for_bit(distil_cfg, yolox_files, tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(LAZY.format(*yolox_files))
    found = []
    for build in (
        lambda: build_model(distil_cfg),
        lambda: instantiate(LazyConfig.load(str(path)).model),
    ):
        torch.manual_seed(3)
        found.append(losses_of(build().train()))
    assert found[0].keys() == found[1].keys() and found[0]["loss_kd_fg"] > 0
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
