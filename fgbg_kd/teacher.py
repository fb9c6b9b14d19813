"""The teacher: named by a config, loaded whole or not at all, frozen.

Most failed distillations are teachers that were never loaded. Nothing here goes on with a warning.
"""

import contextlib
import logging
import os
import re
from collections.abc import Sequence

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from .checkpoint import CheckpointError, SafeCheckpointer
from .config import get_fgbg_kd_cfg, student_config, student_model
from .config_files import merge_yaml
from .data import training_classes

logger = logging.getLogger(__name__)


class TeacherError(ValueError):
    """The teacher cannot teach: the message says why and what to do."""


def build_teacher(
    config: str, weights: str = "", sha256: str = "", classes: Sequence[str] = ()
) -> nn.Module:
    """Builds, loads and freezes a teacher.

    Args:
        config: path of a .yaml or .py config, or a name in Detectron2's model zoo.
        weights: path or URL of its checkpoint. "": the zoo's own for a zoo name, else what the
            config names (MODEL.WEIGHTS, train.init_checkpoint).
        sha256: hex digits of that file, or the first of them; "": not checked.
        classes: their names in the order of their numbers; (): those of the config's training set,
            where they are known.

    Returns:
        The detector in eval mode on the CPU, without gradients. Its attribute ``class_names`` is
        None where they are not known; ``weights`` is the path or URL of its checkpoint.

    Raises:
        TeacherError: no such config, no weights, weights that do not fill the model exactly, or
            another number of classes.
    """
    cfg, in_zoo = read_detector_config(config)
    detector = build_detector(cfg)
    if not weights:
        weights = _zoo_weights(config) if in_zoo else _named_weights(cfg)
    if not weights:
        raise TeacherError(
            f"{config} has no weights: give its checkpoint (MODEL.KD.TEACHER.WEIGHTS of a teacher)."
        )
    _load(detector, weights, config, sha256)
    detector.class_names = _class_names(detector, cfg, list(classes))
    detector.weights = weights
    return freeze(detector)


def _class_names(detector: nn.Module, cfg, classes: list[str]) -> list[str] | None:
    number = getattr(detector, "num_classes", None)
    if number is None:  # not dense: only its features are used
        return None
    if classes and len(classes) != number:
        raise TeacherError(
            f"MODEL.KD.TEACHER.CLASSES has {len(classes)} names, the teacher {number} classes."
        )
    names = classes or training_classes(cfg)
    # A config of other data than the detector's, such as one whose data was given on the command
    # line, says nothing.
    return names if names and len(names) == number else None


def read_detector_config(config: str) -> tuple[CfgNode | DictConfig, bool]:
    """A local .yaml or .py config, or one of the model zoo, and whether it is the zoo's.

    Raises:
        TeacherError: it is neither.
    """
    path, in_zoo = _find_config(config)
    if path.endswith(".py"):
        return LazyConfig.load(path), in_zoo
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, path)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.WEIGHTS = ""  # what the checkpoint holds need not be read first
    return cfg, in_zoo


def build_detector(cfg: CfgNode | DictConfig) -> nn.Module:
    """The (student's) detector of a config, with random weights, on the CPU.

    The process's random numbers go on as if it had not been built: a student's must not depend on
    what its teacher looks like.
    """
    with torch.random.fork_rng(devices=[]):
        if isinstance(cfg, CfgNode):
            return build_model(student_config(cfg))
        return instantiate(student_model(cfg.model))


def _named_weights(cfg: CfgNode | DictConfig) -> str:
    if isinstance(cfg, CfgNode):
        return cfg.MODEL.WEIGHTS
    return cfg.get("train", {}).get("init_checkpoint", "")


def check_teacher_file(weights: str, student_weights: str, output_dir: str) -> None:
    """The teacher is neither what the student starts from, nor what its run will write.

    Raises:
        TeacherError: it is.
    """
    path, name = os.path.realpath(weights), os.path.basename(weights)
    if path == os.path.realpath(student_weights or "."):
        raise TeacherError(
            f"Student (MODEL.WEIGHTS) and teacher both start from {weights}: a student that is its "
            "teacher has nothing to learn. To copy parts of a teacher, use MODEL.KD.INHERIT."
        )
    if os.path.dirname(path) == os.path.realpath(output_dir) and re.fullmatch(
        r"model_(\d+|final)\.pth", name
    ):
        raise TeacherError(
            f"The teacher's weights {weights} are what this run will write over: choose another "
            "OUTPUT_DIR."
        )


def freeze(detector: nn.Module) -> nn.Module:
    """Eval mode, no gradients."""
    return detector.eval().requires_grad_(False)


PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name: str, device: torch.device):
    """Context of the teacher's pass; "auto" leaves the autocast that is in force as it is."""
    dtype = PRECISIONS[name]
    if dtype is None:
        return contextlib.nullcontext()
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


_FIXED_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


@torch.no_grad()
def accelerate(detector: nn.Module) -> nn.Module:
    """Makes a frozen detector faster in place, with the same output up to rounding.

    Batch norms of fixed statistics that follow a convolution (Detectron2 keeps them inside its
    Conv2d) become part of it; weights are laid out channels-last.
    """
    for conv in detector.modules():
        norm = getattr(conv, "norm", None)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _FIXED_NORMS):
            continue
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight.mul_(scale.reshape(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias, requires_grad=False)
        conv.norm = None
    return detector.to(memory_format=torch.channels_last)


def _find_config(config: str) -> tuple[str, bool]:
    if os.path.isfile(config):
        return config, False
    try:
        return model_zoo.get_config_file(config), True
    except RuntimeError:
        raise TeacherError(
            f"No teacher config {config!r}: it is neither a file here nor a name in Detectron2's "
            "model zoo (such as COCO-Detection/retinanet_R_101_FPN_3x.yaml)."
        ) from None


def _zoo_weights(config: str) -> str:
    try:
        return model_zoo.get_checkpoint_url(config)
    except RuntimeError:
        raise TeacherError(
            f"Detectron2's model zoo has no weights for {config}: train that model and give its "
            "checkpoint as MODEL.KD.TEACHER.WEIGHTS."
        ) from None


class ReportingCheckpointer(SafeCheckpointer):
    """Keeps the load report that DetectionCheckpointer only logs."""

    def _load_model(self, checkpoint):
        self.report = super()._load_model(checkpoint)
        return self.report


def _load(detector: nn.Module, weights: str, config: str, sha256: str) -> None:
    checkpointer = ReportingCheckpointer(detector, sha256=sha256)
    try:
        checkpointer.load(weights)
    except CheckpointError as error:
        raise TeacherError(f"The weights of {config}: {error}") from error
    except Exception as error:  # absent, unreachable: each kind of path has its own
        raise TeacherError(
            f"The weights {weights} of {config} cannot be read ({error}). If they are on the "
            "network, fetch them where there is one and give that file."
        ) from error
    report = checkpointer.report
    # Detectron2 kept these in its checkpoints once; the config says them.
    unexpected = [k for k in report.unexpected_keys if k not in ("pixel_mean", "pixel_std")]
    faults = []
    if report.missing_keys:
        faults.append(_listing("missing in the file", report.missing_keys))
    if unexpected:
        faults.append(_listing("not in the model", unexpected))
    if report.incorrect_shapes:
        rows = [f"{k} {tuple(a)} in the file, {tuple(b)}" for k, a, b in report.incorrect_shapes]
        faults.append(_listing("of another shape in the model", rows))
    if faults:
        raise TeacherError(
            f"{weights} is not a checkpoint of {config}:\n  "
            + "\n  ".join(faults)
            + "\nGive the config that the checkpoint was trained with."
        )
    bad = [k for k, v in detector.state_dict().items() if not v.isfinite().all()]
    if bad:
        raise TeacherError(_listing(f"{weights} has values that are not finite", bad))
    parameters = sum(p.numel() for p in detector.parameters())
    logger.info(
        f"{config}: all {len(detector.state_dict())} tensors loaded from {weights}, "
        f"{parameters / 1e6:.2f} M parameters."
    )


def _listing(what: str, keys) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} {what}: {', '.join(keys[:5])}{more}"
