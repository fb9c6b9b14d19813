"""Reads .weights files of Darknet. They hold a header and 32-bit floats, nothing else."""

import os

import numpy as np
import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..utils.errors import CheckpointError

_MAX_CLASSES = 10_000  # a larger number means that the file belongs to another network


def read_weights(path: str, detector: nn.Module) -> dict[str, Tensor]:
    """The tensors of a .weights file by their names in a YOLO.

    The file may be of three kinds:

    - It fills the whole network.
    - It fills the first layers, and the other tensors are left out (darknet53.conv.74). Darknet
      starts training from such files.
    - It belongs to the same network with another number of classes. The last convolution of each
      output then has another shape than in the detector.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: the file belongs to another network, or is damaged.
    """
    values = _floats(path)
    convolutions = _convolutions(detector)
    sizes = [_size(conv) for _, conv in convolutions]
    last = detector.head.classifiers()
    per_class = sum(_size(conv) for conv in last) // (5 + detector.num_classes)
    more, rest = divmod(len(values) - sum(sizes), per_class)
    classes, ends = detector.num_classes + more, np.cumsum(sizes)
    if not (rest == 0 and 1 <= classes <= _MAX_CLASSES):
        if len(values) not in ends:
            raise CheckpointError(
                f"{path} has {len(values)} numbers, but this network has {sum(sizes)} with "
                f"{detector.num_classes} classes. The file belongs to another network, or is "
                "damaged: set MODEL.YOLO.CFG and WIDTH to those of the file, or download it again."
            )
        convolutions = convolutions[: int(np.searchsorted(ends, len(values))) + 1]
        classes = detector.num_classes
    found: dict[str, Tensor] = {}
    start = 0
    for name, conv in convolutions:
        filters = conv.out_channels
        if conv in last:
            filters = filters // (5 + detector.num_classes) * (5 + classes)
        for key, shape in _parts(name, conv, filters).items():
            stop = start + int(np.prod(shape))
            found[key] = torch.from_numpy(values[start:stop]).reshape(shape)
            start = stop
        if hasattr(conv.norm, "num_batches_tracked"):  # Darknet does not count
            found[f"{name}.norm.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    return found


def _floats(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        version = np.fromfile(file, "<i4", 3)  # major, minor, revision
        if len(version) < 3 or not 0 < version[0] * 10 + version[1] < 1000:
            raise CheckpointError(f"{path} is not a .weights file of Darknet: download it again.")
        file.seek(8 if version[0] * 10 + version[1] >= 2 else 4, os.SEEK_CUR)  # images seen
        if (os.path.getsize(path) - file.tell()) % 4:
            raise CheckpointError(f"{path} ends within a number: download it again.")
        return np.fromfile(file, "<f4")


def _convolutions(detector: nn.Module) -> list[tuple[str, Conv2d]]:
    """Names and modules in the order of Darknet's layers, which is the order of the file."""
    found = [(name, m) for name, m in detector.named_modules() if isinstance(m, Conv2d)]
    return sorted(found, key=lambda x: int(x[0].rpartition(".")[2]))


def _parts(name: str, conv: Conv2d, filters: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a convolution's tensors in the order of the file."""
    names = ["bias"]
    if conv.norm is not None:
        names = ["norm.bias", "norm.weight", "norm.running_mean", "norm.running_var"]
    shapes = {f"{name}.{part}": (filters,) for part in names}
    return {**shapes, f"{name}.weight": (filters, *conv.weight.shape[1:])}


def _size(conv: Conv2d) -> int:
    shapes = _parts("", conv, conv.out_channels).values()
    return sum(int(np.prod(shape)) for shape in shapes)
