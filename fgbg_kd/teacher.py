"""The teacher: named by a config, loaded whole or not at all, frozen.

Most failed distillations are teachers that were never loaded. Nothing here goes on with a warning.
"""

import contextlib
import os
import re
from collections.abc import Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .data import training_classes
from .detectors.load import load_detector, read_detector_config, weights_of
from .utils.errors import CheckpointError, ConfigError, TeacherError


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
    try:
        cfg = read_detector_config(config)
        weights = weights or weights_of(config, cfg)
        detector = load_detector(cfg, weights, sha256)
    except (ConfigError, CheckpointError) as error:
        raise TeacherError(f"The teacher {config} (MODEL.KD.TEACHER): {error}") from error
    detector.class_names = _class_names(detector, cfg, list(classes))
    detector.weights = weights
    return detector


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
