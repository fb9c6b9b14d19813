"""The teacher: a frozen detector with its own input, precision and cache.

In most failed distillations the teacher's weights were not loaded. So a teacher that is not loaded
completely is an error here, not a warning.
"""

import contextlib
import logging
import os
import re
from collections.abc import Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F

from .data import test_size_of, training_classes
from .data.coco_files import names_set_of_another_config
from .detectors.dense import (
    DenseOutput,
    DenseView,
    DetectorView,
    lenient_view,
    num_classes_of,
    view,
    warped,
)
from .detectors.load import load_detector, read_detector_config, weights_of
from .teacher_cache import TeacherCache
from .utils.errors import CheckpointError, ConfigError, TeacherError

logger = logging.getLogger(__name__)

PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """A frozen detector that computes its outputs for the student's batch.

    It is not an nn.Module, so state_dict, the optimizer, DistributedDataParallel and ``train()`` do
    not see it.

    Attributes:
        detector: the frozen detector.
        view: its :class:`~fgbg_kd.detectors.dense.DetectorView`.
        class_names: names of its classes in the order of their indices; None: not known.
        weights: path or URL of its checkpoint; "": not known.
        test_size: smallest and largest side of its test images; None: not known.
        cache: a :class:`~fgbg_kd.teacher_cache.TeacherCache`, or None.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        precision: str = "auto",
        cache: bool = False,
        class_names: Sequence[str] | None = None,
        weights: str = "",
        test_size: tuple[int, int] | None = None,
    ):
        """
        Args:
            detector: is frozen and set to eval mode in place. FgBgDistiller also changes it: see
                :func:`accelerate`.
            precision: precision of its forward pass, "fp32", "bf16" or "fp16"; "auto": the
                student's precision.
            cache: whether to keep its outputs. Images must then be the same in every epoch.
        """
        if precision not in PRECISIONS:
            raise ConfigError(
                f"MODEL.KD.TEACHER.PRECISION is {precision!r}: choose from {tuple(PRECISIONS)}."
            )
        self.detector, self.view = detector.eval().requires_grad_(False), view(detector)
        self.precision = precision
        self.cache = TeacherCache() if cache else None
        self.class_names = None if class_names is None else list(class_names)
        self.weights, self.test_size = weights, test_size
        # A student's detector, and whether it takes the same input.
        self._same_input: tuple[nn.Module, bool] | None = None

    @torch.no_grad()
    def __call__(
        self,
        images: ImageList,
        batched_inputs: list[dict],
        student: DetectorView,
        *,
        logits: bool,
        cached: bool = True,
    ) -> DenseOutput:
        """The teacher's output on its own levels.

        Args:
            images: the student's batch, normalised for the student.
            batched_inputs: Detectron2's inputs of this batch.
            logits: whether class logits are needed.
            cached: False: the cache is not used.
        """
        with autocast(self.precision, images.tensor.device):
            inputs = self.input_of(images, student)
            if self.cache and cached:
                return self.cache(lambda x: self._run(x, logits), inputs, batched_inputs)
            return self._run(inputs, logits)

    def _run(self, inputs: Tensor, logits: bool) -> DenseOutput:
        return self.view.run(inputs, logits=logits, raw=False)

    def input_of(self, images: ImageList, student: DetectorView) -> Tensor:
        """(N, 3, H', W'): the student's batch with the teacher's normalisation and padding.

        If the teacher takes one size only, each image is warped to this size.
        """
        if self._same_input is None or self._same_input[0] is not student.detector:
            # Compared only once, because this waits for the device.
            self._same_input = student.detector, same_input(student, self.view)
        pixels = images.tensor
        if not self._same_input[1]:
            pixels = renormalized(self.view, student, images)
        size = self.view.input_size
        if size is None:
            return padded(self.view, pixels, images.image_sizes)
        if self._fits(images):
            return pixels
        parts = [x[None, :, :h, :w] for x, (h, w) in zip(pixels, images.image_sizes)]
        return torch.cat([warped(x, size) for x in parts])

    def warps(self, images: ImageList) -> bool:
        """Whether the teacher warps the images of a batch to its own size."""
        return self.view.input_size is not None and not self._fits(images)

    def _fits(self, images: ImageList) -> bool:
        sizes = {tuple(images.tensor.shape[-2:]), *map(tuple, images.image_sizes)}
        return sizes == {self.view.input_size}


def build_teacher(
    config: str,
    weights: str = "",
    sha256: str = "",
    classes: Sequence[str] = (),
    precision: str = "auto",
    cache: bool = False,
) -> Teacher:
    """Builds, loads and freezes a teacher.

    Args:
        config: path of a .yaml or .py config, or a name in Detectron2's model zoo.
        weights: path or URL of its checkpoint. "": for a zoo name, the zoo's checkpoint; else the
            checkpoint that the config names (MODEL.WEIGHTS, train.init_checkpoint).
        sha256: sha256 of the checkpoint file in hex digits, or its first digits; "": not checked.
        classes: names of its classes in the order of their indices. (): the names of the config's
            training set, if they are known.
        precision, cache: see :class:`Teacher`.

    Returns:
        The teacher on the CPU.

    Raises:
        TeacherError: there is no such config, there are no weights, the weights do not fill the
            model exactly, or the number of class names is wrong.
    """
    try:
        cfg = read_detector_config(config)
        weights = weights or weights_of(config, cfg)
        detector = load_detector(cfg, weights, sha256)
    except (ConfigError, CheckpointError) as error:
        raise TeacherError(f"The teacher {config} (MODEL.KD.TEACHER): {error}") from error
    names = _class_names(detector, cfg, list(classes))
    return Teacher(
        detector,
        precision=precision,
        cache=cache,
        class_names=names,
        weights=weights,
        test_size=test_size_of(cfg),
    )


def _class_names(detector: nn.Module, cfg, classes: list[str]) -> list[str] | None:
    if not isinstance(lenient_view(detector), DenseView):  # only its features are used
        return None
    number = num_classes_of(detector)
    if classes and len(classes) != number:
        raise TeacherError(
            f"MODEL.KD.TEACHER.CLASSES has {len(classes)} names, but the teacher has {number} "
            "classes: give one name for each class."
        )
    known = None if names_set_of_another_config(cfg) else training_classes(cfg)
    if classes and known and list(classes) != known and sorted(classes) == sorted(known):
        logger.warning(
            f"MODEL.KD.TEACHER.CLASSES (--classes of distill.py) is {', '.join(classes)}. The "
            f"training set of the teacher's config has another order: {', '.join(known)}. "
            "MODEL.KD.TEACHER.CLASSES is used."
        )
    names = classes or known
    # The command line of the teacher's training may have replaced DATASETS.TRAIN of the config.
    # The config's names may then be wrong.
    return names if names and len(names) == number else None


def check_teacher_file(weights: str, student_weights: str, output_dir: str) -> None:
    """Refuses teacher weights that the student also starts from, or that the run would overwrite.

    Args:
        weights: of the teacher. "": not known.

    Raises:
        TeacherError: the weights are such a file.
    """
    if not weights:
        return
    path, name = os.path.realpath(weights), os.path.basename(weights)
    if path == os.path.realpath(student_weights or "."):
        raise TeacherError(
            f"Student (MODEL.WEIGHTS) and teacher both start from {weights}: they are the same "
            "detector. Start the student from other weights; MODEL.KD.INHERIT copies parts of the "
            "teacher."
        )
    if os.path.dirname(path) == os.path.realpath(output_dir) and re.fullmatch(
        r"model_(\d+|final)\.pth", name
    ):
        raise TeacherError(
            f"This run would overwrite the teacher's weights {weights}: choose another OUTPUT_DIR."
        )


def autocast(name: str, device: torch.device):
    """Autocast context for the teacher's forward pass; "auto" keeps the current autocast state."""
    dtype = PRECISIONS[name]
    if dtype is None:
        return contextlib.nullcontext()
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


def same_input(student: DetectorView, teacher: DetectorView) -> bool:
    """Whether both use the same mean, std, channel order and padding value."""
    pairs = zip(student.normalization, teacher.normalization)
    return (
        student.channel_order == teacher.channel_order
        and student.pad_value == teacher.pad_value
        and all(torch.equal(a, b) for a, b in pairs)
    )


def check_same_format(student: DetectorView, teacher: DetectorView) -> None:
    """
    Raises:
        TeacherError: one of them reads grey images, the other colour images, or their colour
            spaces differ.
    """
    counts = [len(of.normalization[0]) for of in (student, teacher)]
    if counts[0] != counts[1]:
        raise TeacherError(
            f"The student reads images with {counts[0]} channels, the teacher with {counts[1]} "
            "(MODEL.PIXEL_MEAN and INPUT.FORMAT): both must read colour images, or both grey ones."
        )
    orders = [of.channel_order for of in (student, teacher)]
    if orders[0] != orders[1] and set(orders) != {"RGB", "BGR"}:
        raise TeacherError(
            f"The student reads {orders[0]} images, the teacher {orders[1]} (INPUT.FORMAT): give "
            "both the same format. Only RGB and BGR are converted into each other."
        )


def renormalized(teacher: DetectorView, student: DetectorView, images: ImageList) -> Tensor:
    """The student's batch with the teacher's mean, std, channel order and padding value.

    It is computed from the student's batch, which is on the device already.

    Returns:
        (N, 3, H, W), the shape of ``images.tensor``.
    """
    mean, std = student.normalization
    pixels = images.tensor * std + mean
    if student.channel_order != teacher.channel_order:
        pixels = pixels.flip(1)
    mean, std = teacher.normalization
    out = (pixels - mean) / std
    for image, (height, width) in zip(out, images.image_sizes):
        image[:, height:] = teacher.pad_value
        image[:, :, width:] = teacher.pad_value
    return out


def padded(teacher: DetectorView, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """A batch (N, 3, H, W) with the padding that the teacher needs.

    Images stay in the upper left corner, so that cells of student and teacher cover the same
    pixels.

    Raises:
        TeacherError: an image is larger than the square to which the teacher pads.
    """
    height, width = images.shape[-2:]
    side = teacher.square_size
    if side:
        largest = [max(size) for size in zip(*image_sizes)]
        if max(largest) > side:
            raise TeacherError(
                f"The teacher pads its input to {side}x{side} pixels, but an image has "
                f"{largest[0]}x{largest[1]}: set INPUT.MAX_SIZE_TRAIN {side}."
            )
        more = side - height, side - width
    else:
        divisor = teacher.size_divisibility
        more = -height % divisor, -width % divisor
    if not any(more):
        return images
    return F.pad(images, (0, more[1], 0, more[0]), value=teacher.pad_value)


_FIXED_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


@torch.no_grad()
def accelerate(detector: nn.Module) -> nn.Module:
    """Makes a frozen detector faster in place, with the same output up to rounding.

    Batch norms with fixed statistics are folded into the convolutions before them. (In Detectron2
    the norm is an attribute of the Conv2d.) The weights get the memory format channels_last.
    """
    for conv in detector.modules():
        norm = getattr(conv, "norm", None)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _FIXED_NORMS):
            continue
        if norm.weight is None or norm.running_var is None:  # such a batch norm stays
            continue
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight.mul_(scale.reshape(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias, requires_grad=False)
        conv.norm = None
    return detector.to(memory_format=torch.channels_last)
