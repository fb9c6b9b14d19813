"""Which implementation of an operator runs."""

import importlib.util

from torch import Tensor


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether the fused kernels are to run.

    Args:
        impl: "auto": on CUDA tensors where Triton is installed; "torch": never; "triton": always
            (on the CPU this needs Triton's interpreter: TRITON_INTERPRET=1 before the import).
    """
    if impl == "auto":
        return tensor.is_cuda and importlib.util.find_spec("triton") is not None
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl is {impl!r}: it can be 'auto', 'torch' or 'triton'.")
    return impl == "triton"
