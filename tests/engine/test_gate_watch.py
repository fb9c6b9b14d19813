"""Log messages and errors about the teacher before and at the start of a run."""

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_batch, make_trainer, tiny_cfg
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.engine.gate_watch import GateWatch
from fgbg_kd.engine.hooks import TeacherCheck
from fgbg_kd.utils.errors import TeacherError

WARNING = "hardly follows the teacher"


class Teacher(HookBase):
    """Sets all class logits of the teacher to one value."""

    def __init__(self, logit):
        self.logit = logit

    def before_train(self):
        torch.nn.init.zeros_(self.trainer.model.teacher.detector.head.cls_score.weight)
        self.trainer.model.teacher.detector.head.cls_score.bias.data.fill_(self.logit)


def messages(cfg, folder, caplog, logit, steps):
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # objects in every batch
    trainer = make_trainer(FgBgTrainer, cfg, folder, steps)
    trainer.register_hooks([Teacher(logit)])
    with caplog.at_level(logging.INFO, logger="fgbg_kd"):
        trainer.train()
    return "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("fgbg_kd"))


def test_before_the_first_step_the_log_tells_teacher_student_and_keys(distil_cfg, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fgbg_kd"):
        trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 1)
    text = caplog.text
    student = sum(p.numel() for p in trainer.model.student.parameters()) / 1e6
    assert re.search(r"teacher.pth: all \d+ tensors loaded, \d\.\d\d M parameters", text)
    assert f"Student RetinaNet: {student:.2f} M parameters" in text


@pytest.mark.slow
def test_the_first_batchs_gates_are_logged_and_a_good_teacher_is_not_warned_of(
    distil_cfg, tmp_path, caplog
):
    distil_cfg.SOLVER.BASE_LR = 0.001  # this teacher finds objects everywhere
    text = messages(distil_cfg, tmp_path / "run", caplog, 3.0, 20)
    first = re.findall(r"First batch: kd/fg_gate ([\d.]+), kd/bg_gate", text)
    assert len(first) == 1 and float(first[0]) > 0.5
    assert WARNING not in text


@pytest.mark.slow
def test_a_teacher_that_finds_nothing_is_warned_of_once(distil_cfg, tmp_path, caplog):
    text = messages(distil_cfg, tmp_path / "run", caplog, -20.0, 20)
    assert text.count(WARNING) == 1 and "the objects was 0.000" in text
    assert "MIN_AP" in text


def test_batches_without_objects_have_no_mean_gate_and_a_mean_of_0_counts(distil_cfg):
    model = build_model(distil_cfg).train()
    model.teacher.detector.head.cls_score.bias.data.fill_(-20.0)  # finds nothing: 0 on objects
    with EventStorage(19) as storage:
        model(make_batch())
        assert storage.latest()["kd/fg_gate"] == (0.0, 19)
    with EventStorage(19) as storage:
        model(make_batch(boxes=((), ())))
        assert "kd/fg_gate" not in storage.latest() and "kd/bg_gate" in storage.latest()


@pytest.mark.slow
def test_a_run_that_resumes_is_not_judged_anew(distil_cfg, tmp_path, caplog):
    make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 2).train()
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 20)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([Teacher(-20.0)])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fgbg_kd"):
        trainer.train()
    assert "First batch" not in caplog.text and WARNING not in caplog.text


@pytest.mark.slow
def test_without_a_gate_nothing_is_said(distil_cfg, tmp_path, caplog):
    distil_cfg.MODEL.KD.METHOD = "PKD"
    assert "First batch" not in messages(distil_cfg, tmp_path / "run", caplog, -20.0, 20)
    distil_cfg.MODEL.KD.METHOD, distil_cfg.MODEL.KD.FGBG.GATE = "FgBg", False
    text = messages(distil_cfg, tmp_path / "other", caplog, -20.0, 20)
    assert "First batch: kd/fg_gate 1.000, kd/bg_gate 1.000." in text and WARNING not in text


def test_a_teacher_that_cannot_be_measured_is_no_teacher_of_0_ap(distil_cfg, tmp_path):
    trainer = make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 1)
    check = TeacherCheck(30, lambda teacher: {})
    check.trainer = trainer
    trainer.iter = 0
    with pytest.raises(TeacherError, match="the evaluation gives no AP for the teacher"):
        check.before_train()


def test_weights_without_a_config_are_refused_and_no_teacher_is_told(distil_cfg, caplog):
    distil_cfg.MODEL.KD.TEACHER.CONFIG = ""
    with pytest.raises(TeacherError, match="MODEL.KD.TEACHER.CONFIG is empty: name the config"):
        build_model(distil_cfg)
    distil_cfg.MODEL.KD.TEACHER.WEIGHTS = ""
    build_model(distil_cfg)
    assert "this is plain training" in caplog.text


# --- a teacher that is the student's own file ---


def test_a_student_that_starts_as_its_teacher_is_refused(distil_cfg, tmp_path):
    distil_cfg.MODEL.WEIGHTS = distil_cfg.MODEL.KD.TEACHER.WEIGHTS
    with pytest.raises(TeacherError, match="both start from .* the same detector.*INHERIT"):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 1)


@pytest.mark.parametrize("name", ["model_final.pth", "model_0000099.pth"])
def test_a_teacher_that_the_run_would_write_over_is_refused(distil_cfg, tmp_path, name):
    (tmp_path / "run").mkdir()
    shutil.copy(distil_cfg.MODEL.KD.TEACHER.WEIGHTS, tmp_path / "run" / name)
    # Named by the teacher's config.
    teacher = yaml.safe_load(Path(distil_cfg.MODEL.KD.TEACHER.CONFIG).read_text())
    teacher["MODEL"]["WEIGHTS"] = str(tmp_path / "run" / name)
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    distil_cfg.MODEL.KD.TEACHER.CONFIG = str(tmp_path / "teacher.yaml")
    distil_cfg.MODEL.KD.TEACHER.WEIGHTS = ""
    with pytest.raises(TeacherError, match=f"would overwrite the teacher's weights .*{name}"):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 1)


def test_a_plain_detector_needs_no_teacher(coco, tmp_path):
    make_trainer(FgBgTrainer, tiny_cfg(coco), tmp_path / "run", 1).train()


@pytest.mark.parametrize("gate, warned", [(0.19, True), (0.21, False)])
def test_a_mean_gate_under_a_fifth_is_warned_of(gate, warned, caplog):
    watch = GateWatch()
    watch.trainer = SimpleNamespace(start_iter=0, max_iter=500)
    with EventStorage(0) as watch.trainer.storage, caplog.at_level(logging.INFO, "fgbg_kd"):
        for watch.trainer.iter in range(101):
            watch.trainer.storage.iter = watch.trainer.iter
            if watch.trainer.iter % 20 == 19:
                watch.trainer.storage.put_scalar("kd/fg_gate", gate)
            watch.after_step()
    assert caplog.text.count(WARNING) == warned
