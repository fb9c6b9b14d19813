"""The base class of distillation methods, and their input."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..config import method_defaults
from ..detectors.dense import DenseOutput
from ..ops import Comparison, Split, compare_predictions, pack, split
from ..utils.errors import ConfigError

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = "Subclasses of Method; MODEL.KD.METHOD names one."


class Batch(NamedTuple):
    """The input of a method for one batch.

    Attributes:
        student, teacher: outputs on the same levels, with maps of equal size. The teacher's outputs
            have no gradient.
        gt_boxes: N tensors (B_i, 4), XYXY in pixels.
        gt_classes: N tensors (B_i,), int64.
        image_sizes: N pairs (height, width) in pixels, before padding.
        strides: in pixels, per level.
        num_classes: K, the same for student and teacher.
        same_anchors: whether both detectors have the same anchors per cell.
        loss_normalizer: the number by which the student divides its own losses in this step; None:
            the student has none.
    """

    student: DenseOutput
    teacher: DenseOutput
    gt_boxes: Sequence[Tensor]
    gt_classes: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    strides: Sequence[int]
    num_classes: int
    same_anchors: bool = True
    loss_normalizer: float | Tensor | None = None

    def split(self, assign: str) -> Split:
        """Which box owns each cell: :func:`fgbg_kd.ops.split`."""
        shapes = [tuple(f.shape[-2:]) for f in self.student.features]
        return split(self.gt_boxes, self.image_sizes, shapes, self.strides, assign=assign)

    def compare(self, cells: Split, **options) -> Comparison:
        """Compares both predictions per cell: :func:`fgbg_kd.ops.compare_predictions`.

        Args:
            options: "kl", "temperature", "quality".
        """
        return compare_predictions(
            self.student.logits,
            self.teacher.logits,
            cells,
            pack(self.gt_classes),
            self.num_classes,
            same_anchors=self.same_anchors,
            **options,
        )


class Method(nn.Module):
    """Base class of all methods.

    The constructor of a subclass takes ``(student_channels, teacher_channels, *, option, ...)``,
    with channels per level. The options of a method ``Name`` are the keys of MODEL.KD.NAME in the
    config. The method's parameters are trained with the student, but do not belong to the student.
    Every parameter must get a gradient in every batch.
    """

    # Whether the method needs the class logits of both detectors.
    needs_logits = False
    # Whether it compares logits anchor by anchor. Both detectors must then have the same anchors.
    compares_logits = False
    # Names of its losses.
    losses: Sequence[str] = ("loss_kd",)
    # Raise it if the same options give other losses than before. A comparison then does not mix
    # runs of both versions.
    version = 1

    @classmethod
    def is_off(cls, options: dict[str, Any]) -> bool:
        """Whether these options switch the method off. The teacher is then not built."""
        return options.get("weight") == 0

    @classmethod
    def for_features_only(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options for a teacher that predicts nothing per cell (Faster R-CNN)."""
        return options

    @classmethod
    def for_pair(cls, options: dict[str, Any], alike: bool, pretrained: bool) -> dict[str, Any]:
        """The options for this student and teacher, with values in place of "depends on the pair".

        Args:
            alike: whether both are the same kind of detector, such as two FCOS.
            pretrained: whether the student, or its backbone, starts from trained weights.
        """
        return options

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Returns:
            The weighted losses, with the names in ``losses``, and statistics to log. All values are
            scalars on the device.
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
        key: config key below MODEL.KD.

    Raises:
        ValueError: the value is not one of the choices.
    """
    if value not in choices:
        raise ConfigError(f"MODEL.KD.{key} is {value!r}: choose from {tuple(choices)}.")


def check_not_negative(node: str, **values: float) -> None:
    """
    Args:
        node: config node below MODEL.KD; "": MODEL.KD itself.
        values: values by option.

    Raises:
        ValueError: a value is under 0 or NaN.
    """
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{_key(node, name)} is {value}: it must be >= 0.")


def check_positive(node: str, **values: float) -> None:
    """The same as :func:`check_not_negative`, but also refuses 0."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{_key(node, name)} is {value}: it must be over 0.")


def _key(node: str, name: str) -> str:
    return ".".join(["MODEL.KD", *([node] if node else []), name.upper()])


def or_one(normalizer: Tensor) -> Tensor:
    """Replaces a normaliser of 0 (no object in the batch) by 1."""
    return torch.where(normalizer == 0, 1, normalizer)
