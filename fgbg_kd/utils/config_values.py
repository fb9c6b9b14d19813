"""Checks of single values of a config, which Detectron2 would refuse in words of its own."""

import difflib
import logging

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from .errors import ConfigError

logger = logging.getLogger(__name__)

_LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.BASE_LR": 0.0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "DATALOADER.NUM_WORKERS": 0,
}
_CROPS = ["relative_range", "relative", "absolute", "absolute_range"]
_LEAST_IN_PYTHON = {
    "train.max_iter": 1,
    "train.checkpointer.period": 1,
    "optimizer.lr": 0.0,
    "dataloader.train.num_workers": 0,
}


def check_values(cfg: CfgNode | DictConfig) -> None:
    """Checks numbers of a YAML or Python config, and names in a YAML config.

    Raises:
        ConfigError: a number is too small, NaN, or a float instead of a whole number, SOLVER.STEPS
            do not fit SOLVER.MAX_ITER, or there is nothing of a name.
    """
    for key, least in (_LEAST if isinstance(cfg, CfgNode) else _LEAST_IN_PYTHON).items():
        value = _value(cfg, key)
        if isinstance(value, (int, float)) and not value >= least:  # NaN is not >= either
            raise ConfigError(f"{key} is {value}: give a number of at least {least}.")
        if isinstance(least, int) and isinstance(value, float):  # train.max_iter=9e3
            raise ConfigError(f"{key} is {value}: give a whole number, such as {value:.0f}.")
    if isinstance(cfg, CfgNode):
        _check_schedule(cfg.SOLVER)
        _check_names(cfg)
        if cfg.TEST.AUG.ENABLED:
            logger.warning(
                "TEST.AUG.ENABLED is ignored: Detectron2 has test-time augmentation for two-stage "
                "detectors only. AP is that of the image as it is."
            )


def _value(cfg: CfgNode | DictConfig, key: str):
    if not isinstance(cfg, CfgNode):
        return OmegaConf.select(cfg, key)
    group, name = key.split(".")
    return cfg[group][name]


def _check_schedule(solver: CfgNode) -> None:
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS} and SOLVER.MAX_ITER is "
            f"{solver.MAX_ITER}: the learning rate does not reach SOLVER.BASE_LR."
        )
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    steps = list(solver.STEPS)  # those after MAX_ITER are ignored by Detectron2, with a warning
    if steps != sorted(set(steps)) or solver.MAX_ITER in steps or min(steps, default=1) < 1:
        raise ConfigError(
            f"SOLVER.STEPS is {tuple(steps)} and SOLVER.MAX_ITER is {solver.MAX_ITER}: give steps "
            "in increasing order, each over 0 and under MAX_ITER, such as "
            f"({solver.MAX_ITER * 2 // 3}, {solver.MAX_ITER * 8 // 9}); () = no step."
        )


def _check_names(cfg: CfgNode) -> None:
    models = [name for name, _ in META_ARCH_REGISTRY]
    kd = cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller"
    if kd and cfg.MODEL.KD.STUDENT == "FgBgDistiller":
        raise ConfigError(
            "MODEL.KD.STUDENT is FgBgDistiller: name the student's detector, such as RetinaNet."
        )
    for key, name, known in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, models),
        ("MODEL.KD.STUDENT", cfg.MODEL.KD.STUDENT, models if kd else [cfg.MODEL.KD.STUDENT]),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, [name for name, _ in BACKBONE_REGISTRY]),
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, ["BGR", "YUV-BT.601", *Image.MODES]),
        ("INPUT.CROP.TYPE", cfg.INPUT.CROP.TYPE, _CROPS),
    ):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else "."
            raise ConfigError(
                f"{key} is {name!r}, which is not known{hint} If it is your own, give its module "
                "to --import."
            )
