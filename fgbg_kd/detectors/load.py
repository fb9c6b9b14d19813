"""A detector by its config and its checkpoint: read, built, and filled exactly or not at all."""

import logging
import os

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..config import get_fgbg_kd_cfg, student_config, student_model
from ..utils.config_files import merge_yaml
from ..utils.errors import CheckpointError, ConfigError
from ..utils.safe_checkpoint import SafeCheckpointer

logger = logging.getLogger(__name__)


def find_config(config: str) -> str:
    """Path of a config: a local one, or one of the model zoo by its name.

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
    """The .yaml or .py config of :func:`find_config`; the device of a .yaml is the CPU.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    path = find_config(config)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, path)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def weights_of(config: str, cfg: CfgNode | DictConfig) -> str:
    """The checkpoint that belongs to a config: the zoo's own for a zoo name, else what the config
    names (MODEL.WEIGHTS, train.init_checkpoint); "": none.

    Args:
        config, cfg: what :func:`read_detector_config` takes, and gives.

    Raises:
        CheckpointError: the zoo has none.
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
    """The config of a model that a checkpoint fills: it holds what MODEL.TIMM.WEIGHTS, the start
    of a training, would give, so that file need not be there."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.freeze()
    return cfg


def build_detector(cfg: CfgNode | DictConfig) -> nn.Module:
    """The (student's) detector of a config, with random weights, for a checkpoint to fill.

    The process's random numbers go on as if it had not been built: a student's must not depend on
    what its teacher looks like.
    """
    with torch.random.fork_rng(devices=[]):
        if isinstance(cfg, CfgNode):
            return build_model(without_pretrained(student_config(cfg)))
        return instantiate(student_model(cfg.model))


def load_detector(cfg: CfgNode | DictConfig, weights: str, sha256: str = "") -> nn.Module:
    """The (student's) detector of a config with a checkpoint's weights: :func:`load_exactly`.

    Returns:
        It is in eval mode and without gradients.
    """
    detector = build_detector(cfg)
    load_exactly(detector, weights, sha256)
    return detector.eval().requires_grad_(False)


def load_exactly(detector: nn.Module, weights: str, sha256: str = "") -> dict:
    """Fills a detector from a checkpoint that has all of its tensors, no others, and finite values.

    Args:
        weights: path or URL of the checkpoint.
        sha256: hex digits of that file, or the first of them; "": not checked.

    Returns:
        What else the checkpoint holds.

    Raises:
        CheckpointError: it cannot be read, or is another detector's. The detector is spoilt then.
    """
    if not weights:
        raise CheckpointError("no weights are given: name a checkpoint.")
    checkpointer = _Reporting(detector, sha256=sha256)
    try:
        rest = checkpointer.load(weights)
    except CheckpointError:
        raise
    except Exception as error:  # absent, unreachable: each kind of path has its own
        raise CheckpointError(
            f"{weights} cannot be read ({error}). If it is on the network, fetch it where there is "
            "one and give that file."
        ) from error
    report = checkpointer.report
    shapes = {k: f"{k} {tuple(a)} in the file, {tuple(b)}" for k, a, b in report.incorrect_shapes}
    faults = {
        "missing in the file": [k for k in report.missing_keys if k not in shapes],
        # Detectron2 kept these two in its checkpoints once; the config says them.
        "not in the model": [
            k for k in report.unexpected_keys if k not in ("pixel_mean", "pixel_std")
        ],
        "of another shape in the model": list(shapes.values()),
    }
    lines = [_listing(what, keys) for what, keys in faults.items() if keys]
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
