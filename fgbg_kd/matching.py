"""Where student and teacher meet: levels, classes, anchors, input, weights to inherit."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F

from .methods import DenseOutput
from .utils.errors import TeacherError

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """A feature level that student and teacher share.

    Attributes:
        stride: in pixels.
        index: its place among the student's and among the teacher's levels.
        channels: the student's and the teacher's.
    """

    stride: int
    index: tuple[int, int]
    channels: tuple[int, int]


def is_dense(detector: nn.Module) -> bool:
    """Whether it predicts classes and boxes per cell, as RetinaNet and FCOS do."""
    return all(hasattr(detector, a) for a in ("head", "head_in_features", "num_classes"))


def level_names(detector: nn.Module) -> list[str]:
    """Of the feature maps that its head takes; without a dense head, all that its backbone has."""
    if hasattr(detector, "head_in_features"):
        return list(detector.head_in_features)
    shapes = detector.backbone.output_shape()
    return sorted(shapes, key=lambda name: shapes[name].stride)


def shared_levels(student: nn.Module, teacher: nn.Module) -> list[Level]:
    """The levels of the same stride, whatever their names.

    Raises:
        TeacherError: a student that is not dense, a teacher without a backbone, no common stride.
    """
    if not is_dense(student):
        raise TeacherError(
            f"The student is a {type(student).__name__}: it must be a DenseDetector (RetinaNet, "
            "FCOS)."
        )
    if not hasattr(teacher, "backbone"):
        raise TeacherError(f"The teacher is a {type(teacher).__name__}, which has no backbone.")
    shapes = [
        [(name, d.backbone.output_shape()[name]) for name in level_names(d)]
        for d in (student, teacher)
    ]
    place = [{shape.stride: i for i, (_, shape) in enumerate(levels)} for levels in shapes]
    common = sorted(place[0].keys() & place[1].keys())
    text = [", ".join(f"{n} (stride {s.stride})" for n, s in levels) for levels in shapes]
    text = f"Student: {text[0]}. Teacher: {text[1]}."
    if not common:
        raise TeacherError(
            f"The levels do not meet. {text} Give both common strides by their IN_FEATURES."
        )
    if len(common) < max(map(len, place)):
        logger.info(f"Student and teacher meet on the strides {common} only. {text}")
    levels = []
    for stride in common:
        index = place[0][stride], place[1][stride]
        channels = tuple(levels[i][1].channels for levels, i in zip(shapes, index))
        levels.append(Level(stride, index, channels))
    return levels


def select(
    output: DenseOutput, index: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> DenseOutput:
    """Some levels of an output, on maps of the given shapes (H_l, W_l).

    Cells keep their place, since a cell stands for the same pixels on a map of any size: what a map
    has more is cut off at its far ends, and what it lacks repeats its last cells. Both are padding,
    up to one cell that two backbones round differently.
    """
    return DenseOutput(
        *(maps and [_resize(maps[i], shape) for i, shape in zip(index, shapes)] for maps in output)
    )


def _resize(x: Tensor, shape: tuple[int, int]) -> Tensor:
    more = [want - have for want, have in zip(shape, x.shape[-2:])]
    return F.pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x


def match_classes(
    student: nn.Module, teacher: nn.Module, classes: Sequence[str] | None = None
) -> None:
    """Leaves a dense teacher the student's classes only, in the student's order, by their names.

    The teacher's names are its ``class_names`` (:func:`build_teacher`). Where either side's names
    are not known, the same number of classes counts as the same classes.

    Args:
        classes: names of the student's.

    Raises:
        TeacherError: the teacher lacks a class of the student, or the numbers differ and no names
            are known.
    """
    theirs = getattr(teacher, "class_names", None)
    if not classes or len(classes) != student.num_classes or not theirs:
        if student.num_classes != teacher.num_classes:
            raise TeacherError(
                f"The student has {student.num_classes} classes, the teacher "
                f"{teacher.num_classes}: name the teacher's in MODEL.KD.TEACHER.CLASSES and the "
                "student's by the metadata of DATASETS.TRAIN, or train the teacher on the "
                "student's classes."
            )
        return
    classes, theirs = list(classes), list(theirs)
    if classes == theirs:
        return
    lacking = [name for name in classes if name not in theirs]
    if lacking:
        raise TeacherError(
            f"The teacher does not know {lacking}.\nThe student's classes: {', '.join(classes)}.\n"
            f"The teacher's: {', '.join(theirs)}.\nIf these are other names for the same, give the "
            "teacher's in the student's words as MODEL.KD.TEACHER.CLASSES."
        )
    _keep_classes(teacher, [theirs.index(name) for name in classes])
    teacher.class_names = classes
    logger.info(f"Of the teacher's {len(theirs)} classes the student's {len(classes)} are used.")


def _keep_classes(teacher: nn.Module, keep: list[int]) -> None:
    """Takes the other classes out of the last convolution, so that they cost nothing."""
    conv = getattr(teacher.head, "cls_score", None)
    if not isinstance(conv, nn.Conv2d):
        raise TeacherError(
            f"The teacher's {type(teacher.head).__name__} has no convolution cls_score of which "
            "the student's classes could be taken: train it on the student's classes."
        )
    for name, _ in list(conv.named_parameters()):  # its weight, and its bias if it has one
        per_class = getattr(conv, name).detach().unflatten(0, (-1, teacher.num_classes))
        kept = per_class[:, keep].flatten(0, 1)  # (A*K, ...)
        setattr(conv, name, nn.Parameter(kept, requires_grad=False))
    conv.out_channels = len(conv.weight)
    teacher.num_classes = len(keep)


def same_anchors(student: nn.Module, teacher: nn.Module, levels: Sequence[Level]) -> bool:
    """Whether both have the same anchors in a cell, in the same order."""
    mine, theirs = (
        [a.tolist() for a in d.anchor_generator.cell_anchors] for d in (student, teacher)
    )
    return all(mine[i] == theirs[j] for i, j in (level.index for level in levels))


def same_input(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether both take the same normalised tensor: mean, std and channel order agree."""
    return channel_order(student) == channel_order(teacher) and all(
        torch.equal(getattr(student, name).cpu(), getattr(teacher, name).cpu())
        for name in ("pixel_mean", "pixel_std")
    )


def channel_order(detector: nn.Module) -> str:
    """ "RGB" or "BGR": a detector that does not say it takes Detectron2's default."""
    return getattr(detector, "input_format", None) or "BGR"


def renormalized(teacher: nn.Module, student: nn.Module, images: ImageList) -> Tensor:
    """The student's batch with the teacher's mean, std and channel order.

    From the student's, which is on the device: a copy of the images would wait for its pass.

    Returns:
        (N, 3, H, W), the shape of ``images.tensor``; padding is 0 after normalisation.
    """
    pixels = images.tensor * student.pixel_std + student.pixel_mean
    if channel_order(student) != channel_order(teacher):
        pixels = pixels.flip(1)
    out = (pixels - teacher.pixel_mean) / teacher.pixel_std
    for image, (height, width) in zip(out, images.image_sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return out


def padded(teacher: nn.Module, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """A batch (N, 3, H, W) with the padding that the teacher's backbone wants.

    Images stay in the upper left corner, so that the cells of student and teacher meet.

    Raises:
        TeacherError: an image larger than the square of a teacher that pads to one (ViTDet).
    """
    backbone, (height, width) = teacher.backbone, images.shape[-2:]
    constraints = getattr(backbone, "padding_constraints", {})  # v0.6 has none
    square = constraints.get("square_size", 0)
    if square:
        largest = max(map(max, image_sizes))
        if largest > square:
            raise TeacherError(
                f"The teacher pads its input to {square}x{square} pixels, and an image has "
                f"{largest}: set INPUT.MAX_SIZE_TRAIN {square}."
            )
        more = square - height, square - width
    else:
        divisor = max(constraints.get("size_divisibility", backbone.size_divisibility), 1)
        more = -height % divisor, -width % divisor
    return F.pad(images, (0, more[1], 0, more[0])) if any(more) else images


# What MODEL.KD.INHERIT can name: the prefix of its tensors.
_PARTS = {"fpn": "backbone.", "head": "head."}


def inherited_weights(
    student: nn.Module, teacher: nn.Module, parts: Sequence[str]
) -> dict[str, Tensor]:
    """Copies of the teacher's tensors that fit the student by name and shape; logs what does not.

    Args:
        parts: of "fpn" (the backbone without its bottom-up network) and "head". A part is
            inherited from one of the same class only: in others the same name means another thing.

    Returns:
        Tensors by their names in the student's state dict.

    Raises:
        TeacherError: a part of which no weight (a bias alone is none) fits.
        ValueError: an unknown part.
    """
    found = {}
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"MODEL.KD.INHERIT names {part!r}: choose from {tuple(_PARTS)}.")
        prefix = _PARTS[part]
        owners = [type(getattr(d, prefix[:-1], None)) for d in (student, teacher)]
        mine, theirs = (
            {
                k: v
                for k, v in d.state_dict().items()
                if k.startswith(prefix) and not k.startswith("backbone.bottom_up.")
            }
            for d in (student, teacher)
        )
        fits = {
            k: theirs[k].clone()
            for k, v in mine.items()
            if owners[0] is owners[1] and k in theirs and theirs[k].shape == v.shape
        }
        if not any(v.dim() > 1 for v in fits.values()):  # counters and biases alone say nothing
            raise TeacherError(
                f"MODEL.KD.INHERIT {part!r}: no weight of the teacher's {owners[1].__name__} fits "
                f"the student's {owners[0].__name__} by name and shape."
            )
        if len(fits) < len(mine):
            logger.info(f"Does not fit, {part}: {', '.join(k for k in mine if k not in fits)}.")
        found.update(fits)
    return found
