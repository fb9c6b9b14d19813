"""Builds a detector from a config and a checkpoint that must contain all of its weights."""

import logging
import os

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from omegaconf import DictConfig
from torch import nn

from ..config import get_fgbg_kd_cfg, student_config, student_model
from ..utils.build_errors import explained
from ..utils.config_files import expand_paths, merge_yaml
from ..utils.errors import CheckpointError, ConfigError
from ..utils.safe_checkpoint import SafeCheckpointer

logger = logging.getLogger(__name__)


def find_config(config: str) -> str:
    """Path of a config.

    Args:
        config: a local path, or a name of the model zoo.

    Raises:
        ConfigError: it is neither.
    """
    if os.path.isfile(config):
        return config
    try:
        return model_zoo.get_config_file(config)
    except RuntimeError:
        raise ConfigError(
            f"{config} is neither a file here nor a name in Detectron2's model zoo (such as "
            "COCO-Detection/retinanet_R_101_FPN_3x.yaml)."
        ) from None


def read_detector_config(config: str) -> CfgNode | DictConfig:
    """Reads a .yaml or .py config, and expands its paths. A .yaml gets the CPU as its device.

    Args:
        config: see :func:`find_config`.

    Raises:
        ConfigError: there is no such config, or it cannot be used.
    """
    path = find_config(config)
    if path.endswith(".py"):
        cfg = LazyConfig.load(path)
    else:
        cfg = get_fgbg_kd_cfg()
        merge_yaml(cfg, path)
        cfg.MODEL.DEVICE = "cpu"
    expand_paths(cfg, strict=False)  # it can name folders of another machine that are not needed
    return cfg


def starts_trained(cfg: CfgNode) -> bool:
    """Whether a config's student, or its backbone, starts from trained weights.

    Detectron2's own backbones do not read MODEL.TIMM.WEIGHTS, which then does not count.
    """
    builder = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    reads_timm = not builder.__module__.startswith("detectron2.")
    return bool(cfg.MODEL.WEIGHTS or (reads_timm and cfg.MODEL.TIMM.WEIGHTS))


def weights_of(config: str, cfg: CfgNode | DictConfig) -> str:
    """Path or URL of the checkpoint that belongs to a config; "": it names none.

    For a name of the model zoo this is the zoo's checkpoint. Otherwise the config names it
    (MODEL.WEIGHTS, train.init_checkpoint).

    Args:
        config: see :func:`find_config`.
        cfg: the result of :func:`read_detector_config`.

    Raises:
        CheckpointError: the zoo has no checkpoint for this name.
    """
    if os.path.isfile(config):
        if isinstance(cfg, CfgNode):
            return cfg.MODEL.WEIGHTS
        return cfg.get("train", {}).get("init_checkpoint", "")
    try:
        return model_zoo.get_checkpoint_url(config)
    except RuntimeError:
        raise CheckpointError(
            f"Detectron2's model zoo has no weights for {config}: train that model and give its "
            "checkpoint."
        ) from None


def without_pretrained(cfg: CfgNode) -> CfgNode:
    """The config without MODEL.TIMM.WEIGHTS, for a model that a checkpoint will fill.

    The checkpoint replaces these weights, so their file need not exist.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # FG_LOSS auto asks whether the run started from weights. Building reads no MODEL.WEIGHTS.
    if starts_trained(cfg):
        cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.freeze()
    return cfg


def build_detector(cfg: CfgNode | DictConfig) -> nn.Module:
    """Builds a config's detector with random weights. If the config distils, it is the student.

    The random state stays unchanged, so that a student's weights do not depend on its teacher.
    """
    with torch.random.fork_rng(devices=[]):
        if isinstance(cfg, CfgNode):
            with explained(cfg):
                return build_model(without_pretrained(student_config(cfg)))
        with explained(cfg):
            return instantiate(student_model(cfg.model))


def load_detector(cfg: CfgNode | DictConfig, weights: str, sha256: str = "") -> nn.Module:
    """Builds the detector of a config and fills it by :func:`load_exactly`.

    Args:
        cfg: config of the detector. If the config distils, the student is built.
        weights, sha256: see :func:`load_exactly`.

    Returns:
        The detector in eval mode, without gradients.
    """
    detector = build_detector(cfg)
    load_exactly(detector, weights, sha256)
    return detector.eval().requires_grad_(False)


def load_exactly(detector: nn.Module, weights: str, sha256: str = "") -> dict:
    """Loads a checkpoint into a detector. It must contain exactly the detector's tensors.

    Args:
        weights: path or URL of the checkpoint.
        sha256: sha256 of the file in hex digits, or its first digits; "": not checked.

    Returns:
        The other entries of the checkpoint.

    Raises:
        CheckpointError: the file cannot be read, belongs to another detector, or has values that
            are not finite. Do not use the detector then: it may be partly filled.
    """
    if not weights:
        raise CheckpointError("no weights are given: name a checkpoint.")
    checkpointer = _Reporting(detector, sha256=sha256)
    try:
        rest = checkpointer.load(weights)
    except CheckpointError:
        raise
    except Exception as error:  # each kind of path has its own exceptions
        raise CheckpointError(
            f"{weights} cannot be read ({error}). If this machine has no network, download the "
            "file elsewhere and give its path."
        ) from error
    report = checkpointer.report
    shapes = {k: f"{k} {tuple(a)} in the file, {tuple(b)}" for k, a, b in report.incorrect_shapes}
    faults = {
        "missing in the file": [k for k in report.missing_keys if k not in shapes],
        # Old Detectron2 checkpoints contain these two. Their values come from the config.
        "not in the model": [
            k for k in report.unexpected_keys if k not in ("pixel_mean", "pixel_std")
        ],
        "of another shape in the model": list(shapes.values()),
    }
    lines = [_listing(what, keys) for what, keys in faults.items() if keys]
    if any(k.startswith("retnet") for k in faults["not in the model"]):
        raise CheckpointError(
            f"{weights} is a RetinaNet of Caffe2's Detectron. Detectron2 converts its two-stage "
            "detectors, but not its RetinaNets, whose anchors differ: use a RetinaNet of "
            "Detectron2's model zoo."
        )
    if lines:
        raise CheckpointError(
            f"{weights} is not a checkpoint of this {type(detector).__name__}:\n  "
            + "\n  ".join(lines)
            + "\nGive the config that the checkpoint was trained with."
        )
    bad = [k for k, v in detector.state_dict().items() if not v.isfinite().all()]
    if bad:
        raise CheckpointError(_listing(f"tensors of {weights} are not finite", bad))
    parameters = sum(p.numel() for p in detector.parameters())
    logger.info(
        f"{weights}: all {len(detector.state_dict())} tensors loaded, {parameters / 1e6:.2f} M "
        "parameters."
    )
    return rest


class _Reporting(SafeCheckpointer):
    """Keeps the report that DetectionCheckpointer only logs."""

    def _load_model(self, checkpoint):
        self.report = super()._load_model(checkpoint)
        return self.report


def _listing(what: str, keys) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} {what}: {', '.join(keys[:5])}{more}"
