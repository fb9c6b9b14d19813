"""What a method of distillation is: outputs of both detectors and ground truth in, losses out."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, nn

from ..ops import Comparison, DenseOutput, Split, compare_predictions, pack, split
from ..ops.dispatch import accumulation_dtype

METHOD_REGISTRY = Registry("METHOD")
METHOD_REGISTRY.__doc__ = "Subclasses of Method; MODEL.KD.METHOD names one."


class Batch(NamedTuple):
    """All that a method sees of a batch.

    Attributes:
        student, teacher: outputs on the same levels; the teacher's carry no gradient.
        detectors: the student's and the teacher's module, for their anchors, box coding and heads.
        gt_boxes: N tensors (B_i, 4), XYXY in pixels.
        gt_classes: N tensors (B_i,), int64.
        image_sizes: N pairs (height, width) in pixels, before padding.
        strides: in pixels, per level.
        same_anchors: whether both detectors have the same anchors in a cell.
    """

    student: DenseOutput
    teacher: DenseOutput
    detectors: tuple[nn.Module, nn.Module]
    gt_boxes: Sequence[Tensor]
    gt_classes: Sequence[Tensor]
    image_sizes: Sequence[tuple[int, int]]
    strides: Sequence[int]
    same_anchors: bool = True

    def split(self, assign: str = "all", normalize: str = "object") -> Split:
        """Which box owns each cell: :func:`fgbg_kd.ops.split`."""
        shapes = [tuple(f.shape[-2:]) for f in self.student.features]
        return split(
            self.gt_boxes,
            self.image_sizes,
            shapes,
            self.strides,
            assign=assign,
            normalize=normalize,
        )

    def compare(self, cells: Split, **options) -> Comparison:
        """Both predictions, cell by cell: :func:`fgbg_kd.ops.compare_predictions`, its options."""
        return compare_predictions(
            self.student,
            self.teacher,
            self.detectors,
            cells,
            pack(self.gt_classes),
            self.strides,
            same_anchors=self.same_anchors,
            **options,
        )


class Method(nn.Module):
    """Base of all methods. A subclass takes ``(student_channels, teacher_channels, **options)``
    (channels per level) and computes losses of a :class:`Batch`.

    Its options are its keys in the configuration: MODEL.KD.<NAME>.<OPTION> with the defaults of
    its constructor (those of FgBg stand in MODEL.KD itself). Parameters that it makes are trained
    with the student and are no part of it; each must get a gradient in every batch.
    """

    # Whether the teacher's class logits are needed, and its box deltas: beside its features, and
    # boxes beside logits.
    needs_logits = False
    needs_boxes = False
    # Whether it compares logits one by one, for which both must have the same anchors.
    compares_logits = False
    # Names of the losses that it returns.
    losses: Sequence[str] = ("loss_kd",)
    # The values of options that have but a few, and the options that may be negative.
    choices: dict[str, Sequence[str]] = {}
    signed: Sequence[str] = ()

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Names and defaults of the constructor's keyword arguments."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def accept(self, method: type["Method"], given: dict[str, Any]) -> None:
        """Keeps the options as ``self.option``, by name, if they are what they can be.

        Args:
            method: the class whose constructor calls: a subclass may have other options.
            given: ``locals()`` of that constructor.

        Raises:
            ValueError: an option that is not one of its choices, or out of range.
        """
        node = "" if method.__name__ == "FgBg" else f"{method.__name__.upper()}."
        self.option = {name: given[name] for name in method.options()}
        for name, value in self.option.items():
            key = f"MODEL.KD.{node}{name.upper()}"
            if choices := self.choices.get(name):
                if value not in choices:
                    raise ValueError(f"{key} is {value!r}: choose from {choices}.")
            elif not isinstance(value, int | float):
                continue
            elif name in ("temperature", "num_levels"):
                if not value > 0:
                    raise ValueError(f"{key} is {value}: it must be over 0.")
            elif name not in self.signed and not value >= 0:
                raise ValueError(f"{key} is {value}: it must be >= 0.")

    @classmethod
    def without_predictions(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options for a teacher of which only the features are known (Faster R-CNN)."""
        return options

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Returns:
            The weighted losses, by the names in ``losses``, and statistics to log: both scalars
            on the device.
        """
        raise NotImplementedError


def build_adapters(
    student: Sequence[int], teacher: Sequence[int], mode: str = "auto"
) -> nn.ModuleList:
    """A 1x1 convolution per level from student to teacher channels.

    Args:
        student, teacher: channels per level.
        mode: "auto": where they differ; "conv": always; "none": never.

    Raises:
        ValueError: "none", but the channels differ.
    """
    return nn.ModuleList(_adapter(s, t, mode) for s, t in zip(student, teacher))


def _adapter(student: int, teacher: int, mode: str) -> nn.Module:
    if mode == "conv" or (mode == "auto" and student != teacher):
        return nn.Conv2d(student, teacher, kernel_size=1)
    if student != teacher:
        raise ValueError(
            f"MODEL.KD.ADAPTER is 'none', but the student has {student} channels and the teacher "
            f"{teacher}: use 'auto'."
        )
    return nn.Identity()


def aligned(adapters: nn.ModuleList, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapted student's and teacher's features (N, C, H, W) of each level that has an adapter.

    In fp32, or fp64 if given so.
    """
    for phi, s, t in zip(adapters, batch.student.features, batch.teacher.features):
        dtype = accumulation_dtype(s, t)
        yield phi(s).to(dtype), t.to(dtype)


def per_level(values: Tensor, level_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, R, M) values of cells, as those of :class:`Split` -> (N, M, H_l, W_l) per level."""
    levels = values.split([h * w for h, w in level_shapes], dim=1)
    return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(levels, level_shapes)]


def world_mean(sums: Tensor) -> Tensor:
    """Mean over workers of a per-worker sum; DDP averages gradients, so this makes them whole."""
    size = comm.get_world_size()
    if size > 1:
        torch.distributed.all_reduce(sums)
    return sums / size


def safe(normalizer: Tensor) -> Tensor:
    """A normaliser that is 0 (no object in the batch) becomes 1 and leaves the sum as it is."""
    return torch.where(normalizer > 0, normalizer, 1)
