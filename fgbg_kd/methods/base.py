"""What a method of distillation is: outputs of both detectors and ground truth in, losses out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..config import method_defaults
from ..detectors.dense import DenseOutput
from ..ops import Comparison, Split, compare_predictions, pack, split
from ..utils.errors import ConfigError

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = "Subclasses of Method; MODEL.KD.METHOD names one."


class Batch(NamedTuple):
    """Everything that a method sees of a batch.

    Attributes:
        student, teacher: outputs on the same levels and maps; the teacher's carry no gradient.
        gt_boxes: N tensors (B_i, 4), XYXY in pixels.
        gt_classes: N tensors (B_i,), int64.
        image_sizes: N pairs (height, width) in pixels, before padding.
        strides: in pixels, per level.
        num_classes: K, the same for student and teacher.
        same_anchors: whether both detectors have the same anchors in a cell.
        loss_normalizer: the number by which the student divides its own losses in this step.
    """

    student: DenseOutput
    teacher: DenseOutput
    gt_boxes: Sequence[Tensor]
    gt_classes: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    strides: Sequence[int]
    num_classes: int
    same_anchors: bool = True
    loss_normalizer: float | None = None

    def split(self, assign: str) -> Split:
        """Which box owns each cell: :func:`fgbg_kd.ops.split`."""
        shapes = [tuple(f.shape[-2:]) for f in self.student.features]
        return split(self.gt_boxes, self.image_sizes, shapes, self.strides, assign=assign)

    def compare(self, cells: Split, *, boxes: bool = False, **options) -> Comparison:
        """Both predictions, cell by cell: :func:`fgbg_kd.ops.compare_predictions`.

        Args:
            boxes: whether qualities contain the IoU; both outputs then have decoded boxes.
            options: "kl", "temperature", "quality".
        """
        return compare_predictions(
            self.student.logits,
            self.teacher.logits,
            cells,
            pack(self.gt_classes),
            self.num_classes,
            boxes=(self.student.boxes, self.teacher.boxes) if boxes else None,
            same_anchors=self.same_anchors,
            **options,
        )


class Method(nn.Module):
    """Base class of all methods.

    A subclass takes ``(student_channels, teacher_channels, *, option, ...)``, channels per level.
    The options of a method ``Name`` are the keys of MODEL.KD.NAME in the config. Its parameters
    are trained with the student and are no part of it. Each of them must get a gradient in every
    batch.
    """

    # Whether it needs the class logits of both detectors, and their decoded boxes.
    needs_logits = False
    needs_boxes = False
    # Whether it compares logits one by one, so that both detectors must have the same anchors.
    compares_logits = False
    # Names of the losses that it returns.
    losses: Sequence[str] = ("loss_kd",)

    @classmethod
    def is_off(cls, options: dict[str, Any]) -> bool:
        """Whether these options leave plain training. The teacher is not built then."""
        return options.get("weight") == 0

    @classmethod
    def for_features_only(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options for a teacher that predicts nothing per cell (Faster R-CNN)."""
        return options

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Returns:
            The weighted losses by the names in ``losses``, and statistics to log. Both are scalars
            on the device.
        """
        raise NotImplementedError


def build_method(
    name: str, student_channels: Sequence[int], teacher_channels: Sequence[int], **options
) -> Method:
    """A method by its name. Options that are not given have the defaults of the config.

    Raises:
        ValueError: no such method, an unknown option, or a value out of range.
    """
    return get_method(name)(student_channels, teacher_channels, **complete_options(name, options))


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: no such method.
    """
    if name not in METHOD_REGISTRY:
        names = sorted(name for name, _ in METHOD_REGISTRY)
        raise ConfigError(f"MODEL.KD.METHOD is {name!r}: choose from {names}.")
    return METHOD_REGISTRY.get(name)


def complete_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The given options of a method, and the config's defaults for the others.

    Raises:
        ValueError: an unknown option.
    """
    defaults = method_defaults(name)
    if unknown := sorted(options.keys() - defaults.keys()):
        raise ConfigError(f"{name} has no option {unknown}: choose from {sorted(defaults)}.")
    return {**defaults, **options}


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """
    Args:
        key: of the config, below MODEL.KD.

    Raises:
        ValueError: the value is not one of the choices.
    """
    if value not in choices:
        raise ConfigError(f"MODEL.KD.{key} is {value!r}: choose from {tuple(choices)}.")


def check_not_negative(node: str, **values: float) -> None:
    """
    Args:
        node: of the method in the config, below MODEL.KD.
        values: by option.

    Raises:
        ValueError: a value under 0, or NaN.
    """
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"MODEL.KD.{node}.{name.upper()} is {value}: it must be >= 0.")


def check_positive(node: str, **values: float) -> None:
    """:func:`check_not_negative` that refuses 0 too."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"MODEL.KD.{node}.{name.upper()} is {value}: it must be over 0.")


def world_mean(sums: Tensor) -> Tensor:
    """Mean over processes of each process's sum.

    DistributedDataParallel averages gradients. A loss that is divided by this mean has therefore
    the gradient of the whole batch divided by the whole sum.
    """
    size = comm.get_world_size()
    if size > 1:
        torch.distributed.all_reduce(sums)
    return sums / size


def or_one(normalizer: Tensor) -> Tensor:
    """A normaliser that is 0 (no object in the batch) becomes 1 and leaves the sum unchanged."""
    return torch.where(normalizer > 0, normalizer, 1)
