"""Adapters map the student's channels to the teacher's channels."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..ops.common import accumulation_dtype
from .base import Batch


def build_adapters(student: Sequence[int], teacher: Sequence[int]) -> nn.ModuleList:
    """A 1x1 convolution on each level where the channels differ, and an identity elsewhere.

    Args:
        student, teacher: channels per level.
    """
    return nn.ModuleList(
        nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1)
        for s, t in zip(student, teacher)
    )


def aligned(adapters: nn.ModuleList, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapted student features and teacher features, (N, C, H, W) each, per level with an adapter.

    They are in fp32, or in fp64 if an input is fp64.
    """
    for phi, s, t in zip(adapters, batch.student.features, batch.teacher.features):
        dtype = accumulation_dtype(s, t)
        yield phi(s).to(dtype), t.to(dtype)
