"""Means over all processes of a training."""

import torch
from detectron2.utils import comm
from torch import Tensor


def world_mean(sums: Tensor) -> Tensor:
    """Mean of the given sums over all processes, a new tensor of their shape without a gradient.

    DistributedDataParallel averages gradients over processes. If a loss is divided by this mean,
    its gradient is that of the loss of all processes, divided by the sum over all processes.
    """
    size = comm.get_world_size()
    total = sums.detach().clone()
    if size > 1:
        torch.distributed.all_reduce(total)
    return total / size
