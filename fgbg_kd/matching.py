"""Where student and teacher meet: levels, maps, classes, anchors, inherited weights."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .detectors.dense import DenseOutput, DenseView, DetectorView, view
from .methods import Method, get_method
from .utils.errors import DetectorError, TeacherError

logger = logging.getLogger(__name__)


class SharedLevel(NamedTuple):
    """A feature level that student and teacher share.

    Attributes:
        stride: in pixels.
        place: its index among the levels of the student, and among those of the teacher.
        channels: of the student, and of the teacher.
    """

    stride: int
    place: tuple[int, int]
    channels: tuple[int, int]


def dense_student(student: nn.Module) -> DenseView:
    """The view of a student.

    Raises:
        TeacherError: it is not dense.
        DetectorError: it is dense, but not known.
    """
    found = view(student)
    if not isinstance(found, DenseView):
        raise TeacherError(f"A {found.name} cannot be a student: it must be a one-stage detector.")
    return found


def shared_levels(student: DetectorView, teacher: DetectorView) -> list[SharedLevel]:
    """The levels of equal stride, whatever their names.

    Raises:
        TeacherError: there is no common stride.
    """
    levels = student.levels, teacher.levels
    at = [{level.stride: i for i, level in enumerate(of)} for of in levels]
    common = sorted(at[0].keys() & at[1].keys())
    names = [", ".join(f"{x.name} (stride {x.stride})" for x in of) for of in levels]
    text = f"Student: {names[0]}. Teacher: {names[1]}."
    if not common:
        raise TeacherError(
            f"Student and teacher have no level of equal stride. {text} Give both a common stride "
            "by their IN_FEATURES."
        )
    if len(common) < max(map(len, at)):
        logger.info(f"Student and teacher share the strides {common} only. {text}")
    shared = []
    for stride in common:
        place = at[0][stride], at[1][stride]
        channels = levels[0][place[0]].channels, levels[1][place[1]].channels
        shared.append(SharedLevel(stride, place, channels))
    return shared


def select(
    output: DenseOutput, index: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> DenseOutput:
    """Some levels of an output, on maps of the given shapes (H_l, W_l), without ``raw``.

    A cell stands for the same pixels on a map of any size, so cells keep their place. A larger map
    is cut at its far ends; a smaller one repeats its last cells. Both concern padding, up to one
    cell that two backbones round differently.
    """
    maps = (output.features, output.logits, output.boxes)
    return DenseOutput(
        *(m and [_resize(m[i], shape) for i, shape in zip(index, shapes)] for m in maps)
    )


def _resize(x: Tensor, shape: tuple[int, int]) -> Tensor:
    more = [want - have for want, have in zip(shape, x.shape[-2:])]
    return F.pad(x, (0, more[1], 0, more[0]), mode="replicate") if any(more) else x


def match_classes(
    student: DenseView,
    teacher: DenseView,
    classes: Sequence[str] | None = None,
    teacher_classes: Sequence[str] | None = None,
) -> None:
    """Leaves the teacher the student's classes only, in the student's order, by their names.

    Where the names of either side are not known, equal numbers count as equal classes.

    Args:
        classes, teacher_classes: names in the order of their numbers; None: not known.

    Raises:
        TeacherError: the teacher lacks a class of the student, or the numbers differ and names are
            not known.
    """
    named = classes and len(classes) == student.num_classes
    if not named or not teacher_classes:
        if student.num_classes != teacher.num_classes:
            raise TeacherError(
                f"The student has {student.num_classes} classes, the teacher "
                f"{teacher.num_classes}: name the teacher's in MODEL.KD.TEACHER.CLASSES and the "
                "student's by the metadata of DATASETS.TRAIN, or train the teacher on the "
                "student's classes."
            )
        logger.warning(
            f"The names of the {'teacher' if named else 'student'}'s classes are not known. "
            f"Class i of the student is taken for class i of the teacher, for all "
            f"{student.num_classes}. MODEL.KD.TEACHER.CLASSES names the teacher's."
        )
        return
    classes, theirs = list(classes), list(teacher_classes)
    if classes == theirs:
        return
    lacking = [name for name in classes if name not in theirs]
    if lacking:
        raise TeacherError(
            f"The teacher does not know {lacking}.\nThe student's classes: {', '.join(classes)}.\n"
            f"The teacher's: {', '.join(theirs)}.\nIf these are other names for the same classes, "
            "give the teacher's classes the student's names by MODEL.KD.TEACHER.CLASSES."
        )
    try:
        teacher.keep_classes([theirs.index(name) for name in classes])
    except DetectorError as error:
        raise TeacherError(str(error)) from error
    logger.info(f"Of the teacher's {len(theirs)} classes the student's {len(classes)} are used.")


def same_anchors(student: DenseView, teacher: DenseView, levels: Sequence[SharedLevel]) -> bool:
    """Whether both have the same anchors in a cell, in the same order."""
    mine, theirs = ([a.tolist() for a in d.cell_anchors] for d in (student, teacher))
    return all(mine[i] == theirs[j] for i, j in (level.place for level in levels))


def features_only(name: str, options: dict[str, Any], teacher: DetectorView) -> dict[str, Any]:
    """The options of a method for a teacher that is not dense. Logs what they switch off.

    Raises:
        TeacherError: they leave no term of the method.
    """
    changed = get_method(name).for_features_only(options)
    node = f"MODEL.KD.{name.upper()}"
    off = [f"{node}.{k.upper()} {v}" for k, v in changed.items() if options[k] != v]
    logger.warning(
        f"The teacher, a {teacher.name}, predicts no classes per cell. It teaches by its features "
        f"alone{', with ' if off else ''}{', '.join(off)}."
    )
    if get_method(name).is_off(changed):
        raise TeacherError(
            f"{name} has no term left for a teacher that teaches by its features alone: set the "
            f"weight of its feature term ({node}.FG_WEIGHT of FgBg) over 0, or use another method."
        )
    return changed


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
            f"MODEL.KD.METHOD {name} compares predictions per cell, and the teacher, a "
            f"{teacher.name}, has none: use a one-stage teacher, or another method."
        )
    if method.compares_logits and not same:
        sizes = [len(d.cell_anchors[0]) for d in (student, teacher) if isinstance(d, DenseView)]
        raise TeacherError(
            f"Student and teacher have different anchors ({sizes[0]} and {sizes[1]} a cell), and "
            f"MODEL.KD.METHOD {name} compares predictions one by one: give both the same "
            "MODEL.ANCHOR_GENERATOR, or use another method."
        )


# What MODEL.KD.INHERIT can name: the prefix of its tensors.
_PARTS = {"fpn": "backbone.", "head": "head."}


def inherited_weights(
    student: nn.Module, teacher: nn.Module, parts: Sequence[str]
) -> dict[str, Tensor]:
    """Copies of the teacher's tensors that fit the student by name and shape. Logs the others.

    Args:
        parts: of "fpn" (the backbone without its bottom-up network) and "head". Both detectors
            must have the same class of module there: in another class the same name means another
            thing.

    Returns:
        Tensors by their names in the student's state dict.

    Raises:
        TeacherError: no weight of a part fits.
        ValueError: an unknown part.
    """
    found = {}
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"MODEL.KD.INHERIT names {part!r}: choose from {tuple(_PARTS)}.")
        prefix = _PARTS[part]
        owners = [type(getattr(d, prefix[:-1], None)) for d in (student, teacher)]
        mine, theirs = (_part(d, prefix) for d in (student, teacher))
        fits = {
            k: theirs[k].clone()
            for k, v in mine.items()
            if owners[0] is owners[1] and k in theirs and theirs[k].shape == v.shape
        }
        if not any(v.dim() > 1 for v in fits.values()):  # counters and biases alone are no weights
            raise TeacherError(
                f"MODEL.KD.INHERIT {part!r}: no weight of the teacher's {owners[1].__name__} fits "
                f"the student's {owners[0].__name__} by name and shape."
            )
        if len(fits) < len(mine):
            logger.info(f"Not inherited, {part}: {', '.join(k for k in mine if k not in fits)}.")
        found.update(fits)
    return found


def _part(detector: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = detector.state_dict()
    return {
        k: v
        for k, v in state.items()
        if k.startswith(prefix) and not k.startswith("backbone.bottom_up.")
    }
