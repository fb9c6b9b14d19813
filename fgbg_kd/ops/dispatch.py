"""What the operators share: which implementation runs, in which precision, on which device."""

import contextlib
import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether the fused kernels are to run.

    Args:
        impl: "auto": on CUDA tensors where Triton is installed; "torch": never; "triton": always
            (on the CPU this needs Triton's interpreter: TRITON_INTERPRET=1 before the import).
    """
    if impl == "auto":
        return tensor.is_cuda and _HAS_TRITON
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl is {impl!r}: it can be 'auto', 'torch' or 'triton'.")
    return impl == "triton"


def on_device_of(tensor: Tensor):
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 if any is given so: sums over a map leave the range of fp16."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def levels(maps: Sequence[Tensor]) -> list[tuple[int, int, int, int, int]]:
    """Per level (N, C, H_l, W_l): its first cell among all R cells of an image, N, C, H_l, W_l."""
    rows, first = [], 0
    for x in maps:
        rows.append((first, *x.shape))
        first += x.shape[2] * x.shape[3]
    return rows


def empty_map_like(x: Tensor) -> Tensor:
    """Room for a map (N, C, H, W), laid out like another, whose ``flatten(2)`` is a view.

    Kernels take maps flattened: only so Triton sees that neighbouring cells are neighbours in
    memory. Flattening copies a map only if it is a cut-out of a wider one.
    """
    return torch.empty_like(x.flatten(2)).unflatten(2, x.shape[2:])


def triton_dtype(dtype: torch.dtype):
    """Triton's name of an accumulation dtype."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def upload(values, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of the host on the device of a tensor, without waiting for that device.

    A copy from ordinary memory would: PyTorch then synchronises the stream.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)
