"""A config from which nothing can be built is refused with the key, before the first iteration."""

import re

import pytest
import torch
from conftest import make_trainer, tiny_cfg, tiny_fcos_cfg

from fgbg_kd.detectors.load import build_detector, load_exactly
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.utils.errors import CheckpointError, ConfigError

LEVEL = "which the network does not give"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.RETINANET.IN_FEATURES", ["p3", "p9"]], f"MODEL.RETINANET.* names 'p9', {LEVEL}"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res9"]], f"MODEL.FPN.* names 'res9', {LEVEL}"),
        (["MODEL.FPN.IN_FEATURES", ["res5", "res3"]], "model cannot be built .* not log2 contig"),
        (["MODEL.TIMM.OUT_FEATURES", []], "MODEL.TIMM.OUT_FEATURES is empty: name at least one"),
        (["MODEL.META_ARCHITECTURE", "Retina"], "The model cannot be built .* 'Retina'"),
        (["MODEL.BACKBONE.NAME", "build_x"], "The model cannot be built .* 'build_x'"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]]], "sizes of length 2 in anchor generator"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD .* is 0: set it to at least 1"),
        (["SOLVER.CHECKPOINT_PERIOD", -5], "SOLVER.CHECKPOINT_PERIOD .* is -5: set it"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam': use SGD or AdamW"),
        (["SOLVER.BASE_LR", -1.0], "The optimizer cannot be built .* learning rate: -1.0"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "X"],
            "LR_SCHEDULER_NAME is .X., .* cannot build this schedule",
        ),
        (["DATASETS.TRAIN", ("no_such_set",), "DATASETS.TRAIN_JSON", ""], "'no_such_set' is not"),
    ],
)
@pytest.mark.slow
def test_a_value_that_cannot_work_is_refused_with_its_key(overrides, message, coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.merge_from_list(overrides)
    with pytest.raises(ConfigError, match=message):
        make_trainer(FgBgTrainer, cfg, tmp_path / "run", 2)


def test_a_level_of_an_fcos_student_that_is_not_there_is_named(distil_cfg, tmp_path):
    fcos = tiny_fcos_cfg().MODEL
    distil_cfg.MODEL.KD.STUDENT, distil_cfg.MODEL.FCOS = "FCOS", fcos.FCOS
    distil_cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p8"]
    with pytest.raises(ConfigError, match=f"MODEL.FCOS.IN_FEATURES names 'p8', {LEVEL}"):
        make_trainer(FgBgTrainer, distil_cfg, tmp_path / "run", 2)


def test_other_tools_name_the_level_too():
    cfg = tiny_cfg()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p9"]
    with pytest.raises(ConfigError, match=f"MODEL.RETINANET.IN_FEATURES names 'p9', {LEVEL}"):
        build_detector(cfg)


@pytest.mark.parametrize("path", ["/nowhere.pth", "https://127.0.0.1:9/weights.pth", "."])
def test_weights_that_cannot_be_read_are_named_before_training(path, coco, tmp_path):
    cfg = tiny_cfg(coco)
    cfg.MODEL.WEIGHTS = path
    trainer = make_trainer(FgBgTrainer, cfg, tmp_path / "run", 2)
    message = f"MODEL.WEIGHTS .* is '{re.escape(path)}', which cannot be read .* random weights"
    with pytest.raises(CheckpointError, match=message):
        trainer.resume_or_load(resume=False)


def test_a_retinanet_of_caffe2_is_refused_with_the_reason(tmp_path):
    """Its heads have names that Detectron2 does not convert."""
    detector = build_detector(tiny_cfg())
    state = detector.state_dict()
    saved = {k: v for k, v in state.items() if not k.startswith("head.")}
    saved |= {f"retnet_{x}_pred_fpn3_w": torch.zeros(1) for x in ("cls", "bbox")}
    torch.save({"model": saved}, tmp_path / "caffe2.pth")
    with pytest.raises(CheckpointError, match="a RetinaNet of Caffe2's Detectron.* model zoo"):
        load_exactly(detector, str(tmp_path / "caffe2.pth"))
