"""Matches student and teacher: levels, maps, classes, anchors and inherited weights."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .detectors.dense import DenseOutput, DenseView, DetectorView, view
from .methods import Method, get_method
from .ops.common import upload
from .utils.errors import ConfigError, DetectorError, TeacherError

logger = logging.getLogger(__name__)


class SharedLevel(NamedTuple):
    """A feature level that student and teacher share.

    Attributes:
        stride: of the student, in pixels.
        place: index among the student's levels, and index among the teacher's levels.
        channels: number of channels in the student, and in the teacher.
    """

    stride: int
    place: tuple[int, int]
    channels: tuple[int, int]


def dense_student(student: nn.Module) -> DenseView:
    """The view of a student.

    Raises:
        TeacherError: the student is not dense.
        DetectorError: the student is dense, but has no registered view.
    """
    found = view(student)
    if not isinstance(found, DenseView):
        raise TeacherError(f"A {found.name} cannot be a student: it must be a one-stage detector.")
    return found


def shared_levels(
    student: DetectorView, teacher: DetectorView, shrink: float = 1.0
) -> list[SharedLevel]:
    """The levels with equal strides in student and teacher. Their names may differ.

    Args:
        shrink: see :func:`shrink_of`. If it is not 1, each level of the student meets the level of
            the teacher whose stride is nearest in the student's pixels, at most half an octave
            away.

    Raises:
        TeacherError: there is no common stride.
    """
    mine, theirs = student.levels, teacher.levels
    shared: list[SharedLevel] = []
    for i, level in sorted(enumerate(mine), key=lambda x: x[1].stride):
        distance = [abs(math.log2(x.stride * shrink / level.stride)) for x in theirs]
        j = min(range(len(theirs)), key=distance.__getitem__)
        if distance[j] <= (0 if shrink == 1 else 0.5) and j not in (x.place[1] for x in shared):
            channels = level.channels, theirs[j].channels
            shared.append(SharedLevel(level.stride, (i, j), channels))
    names = [", ".join(f"{x.name} (stride {x.stride})" for x in of) for of in (mine, theirs)]
    text = f"Student: {names[0]}. Teacher: {names[1]}."
    if shrink != 1:
        text += f" A pixel of the teacher's input is about {shrink:.2f} pixels of the student's."
    if not shared:
        raise TeacherError(
            f"Student and teacher have no level of equal stride. {text} Give both a common stride "
            "by their IN_FEATURES."
        )
    if len(shared) < max(len(mine), len(theirs)):
        strides = [level.stride for level in shared]
        logger.info(f"Student and teacher share the strides {strides} only. {text}")
    return shared


def shrink_of(
    student: DetectorView, teacher: DetectorView, image_size: tuple[int, int] | None
) -> float:
    """Side of a pixel of the teacher's input, in pixels of the student's input.

    It is 1 unless the teacher warps images to one size.

    Args:
        image_size: usual (height, width) of the student's images; None: not known, which gives 1.
    """
    size = student.input_size or image_size
    if teacher.input_size is None:
        return 1.0
    if size is None:
        logger.warning(
            f"The teacher, a {teacher.name}, warps images to {teacher.input_size} pixels, and the "
            "size of the student's images is not known: levels are matched by their strides alone. "
            "Give FgBgDistiller its image_size."
        )
        return 1.0
    return math.sqrt(math.prod(size) / math.prod(teacher.input_size))


def select(
    output: DenseOutput, index: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> DenseOutput:
    """Selects levels of an output, with maps of the given shapes (H_l, W_l) and without ``raw``.

    A cell covers the same pixels on a map of any size, so cells keep their index. A larger map is
    cropped at the right and bottom. A smaller map repeats its last cells there. This affects only
    padding, and at most one cell where two backbones round differently.
    """
    maps = (output.features, output.logits)
    return DenseOutput(
        *(m and [_resize(m[i], shape) for i, shape in zip(index, shapes)] for m in maps)
    )


def _resize(x: Tensor, shape: tuple[int, int]) -> Tensor:
    more = [want - have for want, have in zip(shape, x.shape[-2:])]
    return F.pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x


def select_unwarped(
    output: DenseOutput,
    index: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
) -> DenseOutput:
    """The same as :func:`select` for the output of images that were warped to one size.

    Each cell gets the values of the cell at the same place of the warped image. A map covers the
    whole image, whatever its nominal stride: ten cells for 300 pixels are 30 pixels apart, not 32.

    Args:
        strides: of the cells wanted, in pixels of the images, per level.
        image_sizes: N pairs (height, width) in pixels, before padding and warping.
    """
    sizes = upload(image_sizes, output.features[0], torch.float32)  # (N, 2)
    places = list(zip(index, shapes, strides, [sizes] * len(index)))
    maps = (output.features, output.logits)
    return DenseOutput(*(m and [_unwarped(m[i], *place) for i, *place in places] for m in maps))


def _unwarped(x: Tensor, shape: tuple[int, int], stride: int, image_sizes: Tensor) -> Tensor:
    """(N, C, H', W') -> (N, C, *shape).

    Args:
        stride: of the cells wanted, in pixels.
        image_sizes: (N, 2), height and width in pixels.
    """
    row, column = (
        ((torch.arange(wanted, device=x.device) + 0.5) * stride * number / size[:, None])
        .long()
        .clamp(max=number - 1)
        for wanted, number, size in zip(shape, x.shape[-2:], image_sizes.T)
    )  # (N, H), (N, W)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return x[image, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def match_classes(
    student: DenseView,
    teacher: DenseView,
    classes: Sequence[str] | None = None,
    teacher_classes: Sequence[str] | None = None,
) -> None:
    """Reduces the teacher to the student's classes, matched by name, in the student's order.

    If the names of student or teacher are not known, class i of the student is class i of the
    teacher.

    Args:
        classes, teacher_classes: class names in the order of their indices; None: not known.

    Raises:
        ConfigError: the student has not as many classes as ``classes``.
        TeacherError: the teacher lacks a class of the student. Or names are not known, and student
            and teacher have different numbers of classes.
    """
    if classes and len(classes) != student.num_classes:
        raise ConfigError(
            f"The training set has {len(classes)} classes, but the student has "
            f"{student.num_classes}: set NUM_CLASSES (num_classes) {len(classes)} for the student."
        )
    if not classes or not teacher_classes:
        if student.num_classes != teacher.num_classes:
            raise TeacherError(
                f"The student has {student.num_classes} classes, but the teacher has "
                f"{teacher.num_classes}: name the teacher's classes in MODEL.KD.TEACHER.CLASSES "
                "(--classes of distill.py) and the student's classes in the metadata of "
                "DATASETS.TRAIN, or train the teacher on the student's classes."
            )
        who, where = "student", "thing_classes in the metadata of DATASETS.TRAIN sets them"
        if classes:
            who, where = "teacher", "MODEL.KD.TEACHER.CLASSES sets them (distill.py: --classes)"
        names = ", ".join(classes or teacher_classes or [])
        order = f": this is right only if their order is {names}" if names else ""
        logger.warning(
            f"The names of the {who}'s classes are not known. Class i of the student is taken for "
            f"class i of the teacher, for all {student.num_classes} classes{order}. {where}."
        )
        return
    classes, theirs = list(classes), list(teacher_classes)
    _check_names(classes, theirs)
    if classes == theirs:
        return
    try:
        teacher.keep_classes([theirs.index(name) for name in classes])
    except DetectorError as error:
        raise TeacherError(str(error)) from error
    logger.info(f"The teacher has {len(theirs)} classes. The student's {len(classes)} are used.")


def _check_names(classes: list[str], theirs: list[str]) -> None:
    if twice := sorted({name for name in theirs if theirs.count(name) > 1}):
        raise TeacherError(
            f"The teacher's class names have {twice} more than once: give each class its own name "
            "in MODEL.KD.TEACHER.CLASSES (--classes of distill.py)."
        )
    if lacking := [name for name in classes if name not in theirs]:
        raise TeacherError(
            f"The teacher does not know {lacking}.\nThe student's classes: {', '.join(classes)}.\n"
            f"The teacher's classes: {', '.join(theirs)}.\nIf these are other names for the same "
            "classes, give the student's names, in the teacher's order, in "
            "MODEL.KD.TEACHER.CLASSES (--classes of distill.py)."
        )


def same_anchors(student: DenseView, teacher: DenseView, levels: Sequence[SharedLevel]) -> bool:
    """Whether both have the same anchors per cell, in the same order."""
    mine, theirs = ([a.tolist() for a in d.cell_anchors] for d in (student, teacher))
    same = all(mine[x.place[0]] == theirs[x.place[1]] for x in levels)
    return same and student.anchor_offset == teacher.anchor_offset


def options_of_pair(
    name: str, options: dict[str, Any], student: DenseView, teacher: DetectorView, pretrained: bool
) -> dict[str, Any]:
    """The options of a method for this pair. pretrained: see :meth:`Method.for_pair`.

    Raises:
        TeacherError: the teacher is not dense, and its features alone leave no term of the method.
    """
    method = get_method(name)
    options = method.for_pair(options, type(student) is type(teacher), pretrained)
    if not isinstance(teacher, DenseView):
        options = method.for_features_only(options)
        if method.is_off(options):
            raise TeacherError(
                f"{name} has no term left, because only the teacher's features can be used: set "
                "the weight of a feature term over 0 (MODEL.KD.FGBG.FG_WEIGHT or "
                "BG_FEATURE_WEIGHT of FgBg), or use another method."
            )
    return options


def check_predictions(
    name: str, method: Method, student: DenseView, teacher: DetectorView, same: bool
) -> None:
    """Refuses a teacher whose predictions the method cannot use.

    Args:
        same: whether both have the same anchors.

    Raises:
        TeacherError: the teacher has no predictions per cell, or other anchors than the student.
    """
    if method.needs_logits and not isinstance(teacher, DenseView):
        raise TeacherError(
            f"MODEL.KD.METHOD {name} compares predictions per cell, but the teacher, a "
            f"{teacher.name}, has no such predictions: use a one-stage teacher, or another method."
        )
    if method.compares_logits and not same:
        sizes = [len(d.cell_anchors[0]) for d in (student, teacher) if isinstance(d, DenseView)]
        raise TeacherError(
            f"Student and teacher have different anchors ({sizes[0]} and {sizes[1]} per cell), but "
            f"MODEL.KD.METHOD {name} compares predictions one by one: give both the same "
            "MODEL.ANCHOR_GENERATOR, or use another method."
        )


# The parts that MODEL.KD.INHERIT can name, with the prefix of their tensors.
_PARTS = {"fpn": "backbone.", "head": "head."}


def inherited_weights(
    student: nn.Module, teacher: nn.Module, parts: Sequence[str]
) -> dict[str, Tensor]:
    """Copies of the teacher's tensors that fit the student by name and shape. Logs the others.

    Args:
        parts: any of "fpn" (the backbone without its bottom-up network) and "head". The module must
            have the same class in both detectors, because equal names in different classes may
            have different meanings.

    Returns:
        Tensors by their names in the student's state dict.

    Raises:
        TeacherError: no weight of a part fits.
        ValueError: a part is unknown.
    """
    found = {}
    for part in parts:
        if part not in _PARTS:
            raise ConfigError(f"MODEL.KD.INHERIT names {part!r}: choose from {tuple(_PARTS)}.")
        prefix = _PARTS[part]
        owners = [type(getattr(d, prefix[:-1], None)) for d in (student, teacher)]
        mine, theirs = (_part(view(d), prefix) for d in (student, teacher))
        fits = {
            k: theirs[k].clone()
            for k, v in mine.items()
            if owners[0] is owners[1] and k in theirs and theirs[k].shape == v.shape
        }
        if not any(v.dim() > 1 for v in fits.values()):  # counters and biases alone do not count
            raise TeacherError(
                f"MODEL.KD.INHERIT {part!r}: no weight of the teacher's {owners[1].__name__} fits "
                f"the student's {owners[0].__name__} by name and shape."
            )
        if len(fits) < len(mine):
            logger.info(f"Not inherited, {part}: {', '.join(k for k in mine if k not in fits)}.")
        found.update(fits)
    return found


def _part(of: DetectorView, prefix: str) -> dict[str, Tensor]:
    state, bottom_up = of.detector.state_dict(), f"backbone.{of.bottom_up}."
    return {k: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(bottom_up)}
