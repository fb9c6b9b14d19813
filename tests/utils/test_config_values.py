"""Values that Detectron2 would refuse in words of its own, or only after the training."""

import pytest
from omegaconf import OmegaConf

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.engine import FgBgTrainer
from fgbg_kd.utils.config_values import check_values
from fgbg_kd.utils.errors import ConfigError


@pytest.mark.parametrize(
    "opts, message",
    (
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER is 0: give a number of at least 1"),
        (["SOLVER.BASE_LR", -0.1], "SOLVER.BASE_LR is -0.1: .*at least 0"),
        (["SOLVER.BASE_LR", float("nan")], "SOLVER.BASE_LR is nan"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD is 0"),
        (["DATALOADER.NUM_WORKERS", -1], "DATALOADER.NUM_WORKERS is -1"),
        (["SOLVER.MAX_ITER", 30000], "SOLVER.STEPS is .30000,. and SOLVER.MAX_ITER is 30000"),
        (["SOLVER.STEPS", (9, 8)], "give steps in increasing order"),
        (["MODEL.META_ARCHITECTURE", "RetinaNett"], "did you mean RetinaNet?"),
        (["MODEL.BACKBONE.NAME", "build_tim_fpn_backbone"], "did you mean build_timm_fpn_back"),
        (["INPUT.FORMAT", "RBG"], "INPUT.FORMAT is 'RBG', which is not known: did you mean RGB"),
        (["INPUT.CROP.TYPE", "relativ"], "did you mean relative?"),
    ),
)
def test_a_value_that_cannot_be_used_is_refused_with_its_key(opts, message):
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_list(opts)
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)


def test_the_defaults_can_be_used_and_a_step_after_the_end_too():
    cfg = get_fgbg_kd_cfg()
    check_values(cfg)
    cfg.SOLVER.MAX_ITER = 9
    check_values(cfg)


@pytest.mark.parametrize("key", ["train.max_iter", "train.checkpointer.period"])
def test_so_is_a_number_of_a_python_config(key):
    cfg = OmegaConf.create({"train": {"max_iter": 9, "checkpointer": {"period": 9}}})
    check_values(cfg)
    OmegaConf.update(cfg, key, 0)
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        check_values(cfg)
    OmegaConf.update(cfg, key, 9e3)
    with pytest.raises(ConfigError, match=f"{key} is 9000.0: give a whole number, such as 9000"):
        check_values(cfg)


def test_a_schedule_that_detectron2_does_not_know_is_refused_with_those_it_knows():
    cfg = get_fgbg_kd_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME = "Cosine"
    with pytest.raises(ConfigError, match="LR_SCHEDULER_NAME is 'Cosine'.*WarmupCosineLR"):
        FgBgTrainer.build_lr_scheduler(cfg, None)


def test_it_is_told_that_there_is_no_test_time_augmentation(caplog):
    cfg = get_fgbg_kd_cfg()
    cfg.TEST.AUG.ENABLED = True
    check_values(cfg)
    assert "TEST.AUG.ENABLED is ignored" in caplog.text


def test_a_distiller_cannot_be_the_student(distil_cfg):
    distil_cfg.MODEL.KD.STUDENT = "FgBgDistiller"
    with pytest.raises(ConfigError, match="MODEL.KD.STUDENT is FgBgDistiller: name"):
        check_values(distil_cfg)


def test_a_warm_up_that_is_as_long_as_the_training_gives_a_warning(distil_cfg, caplog):
    distil_cfg.SOLVER.WARMUP_ITERS, distil_cfg.SOLVER.MAX_ITER = 50, 50
    distil_cfg.SOLVER.STEPS = ()
    with caplog.at_level("WARNING", logger="fgbg_kd"):
        check_values(distil_cfg)
    assert "does not reach SOLVER.BASE_LR" in caplog.text
