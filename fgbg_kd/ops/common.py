"""Helpers of all operators: cell marks, choice of implementation, precision and device."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# Marks of cells that no box owns. Other cells have the index of their box.
BACKGROUND, PADDING = -1, -2
# A vector with a norm of at most 1e-6 counts as zero: its direction is rounding error.
MIN_SQUARE = 1e-12

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether the fused kernels run.

    Args:
        impl: "auto": on CUDA tensors if Triton is installed, unless the environment variable
            FGBG_KD_TRITON is 0. "torch": never. "triton": always. On the CPU "triton" needs
            Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported.
    """
    if impl == "auto":
        return tensor.is_cuda and _HAS_TRITON and os.environ.get("FGBG_KD_TRITON") != "0"
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl is {impl!r}: choose 'auto', 'torch' or 'triton'.")
    return impl == "triton"


def on_device_of(tensor: Tensor):
    """Context in which Triton launches on the tensor's GPU, even if another GPU is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 if any tensor is fp64. Sums over a map overflow fp16."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def levels(maps: Sequence[Tensor]) -> list[tuple[int, int, int, int, int]]:
    """Per map (N, C, H_l, W_l): index of its first cell in R, then N, C, H_l, W_l."""
    rows, first = [], 0
    for x in maps:
        rows.append((first, *x.shape))
        first += x.shape[2] * x.shape[3]
    return rows


def per_level(values: Tensor, level_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, R, M) values of cells -> (N, M, H_l, W_l) per level."""
    parts = values.split([h * w for h, w in level_shapes], dim=1)
    return [x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(parts, level_shapes)]


def empty_map_like(x: Tensor) -> Tensor:
    """An empty map (N, C, H, W) with the memory layout of ``x``, whose ``flatten(2)`` is a view.

    Kernels take flattened maps. Only then does Triton see that neighbouring cells are adjacent in
    memory. Flattening copies a map only if it is a slice of a wider map.
    """
    return torch.empty_like(x.flatten(2)).unflatten(2, x.shape[2:])


def triton_dtype(dtype: torch.dtype):
    """Triton's dtype for an accumulation dtype."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def upload(values, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies numbers from the host to a tensor's device without waiting for the device.

    The host memory is pinned, because PyTorch synchronises the stream for other memory.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)
