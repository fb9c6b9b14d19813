"""Which implementation of an operator runs, and where."""

import contextlib
import importlib.util

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
