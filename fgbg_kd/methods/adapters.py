"""Adapters: from the student's channels to the teacher's."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..ops.common import accumulation_dtype
from .base import Batch


def build_adapters(student: Sequence[int], teacher: Sequence[int]) -> nn.ModuleList:
    """A 1x1 convolution on each level where the channels differ, an identity elsewhere.

    Args:
        student, teacher: channels per level.
    """
    return nn.ModuleList(
        nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1)
        for s, t in zip(student, teacher)
    )


def aligned(adapters: nn.ModuleList, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (N, C, H, W) of the adapted student and the teacher, per level with an adapter.

    In fp32, or fp64 if given.
    """
    for phi, s, t in zip(adapters, batch.student.features, batch.teacher.features):
        dtype = accumulation_dtype(s, t)
        yield phi(s).to(dtype), t.to(dtype)
