"""MobileNet-SSD's file is read as numbers, and fills this package's SSD."""

import struct

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model

from fgbg_kd import get_fgbg_kd_cfg
from fgbg_kd.experiments.datasets.mobilenet_ssd import (
    MAPS,
    layer_names,
    read_caffe,
    to_ssd,
)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def caffemodel(layers: dict[str, list[np.ndarray]]) -> bytes:
    """The bytes that Caffe writes: NetParameter, LayerParameter, BlobProto, BlobShape."""
    out = field(1, b"a net") + b"\x28\x01"  # its name, and an integer field
    for name, arrays in layers.items():
        blobs = b""
        for a in arrays:
            shape = field(1, b"".join(varint(n) for n in a.shape))
            blobs += field(7, field(5, a.astype("<f4").tobytes()) + field(7, shape))
        weights = varint(3 << 3 | 5) + struct.pack("<f", 1.0)  # a field that is not needed
        out += field(100, field(1, name.encode()) + field(2, b"Convolution") + weights + blobs)
    return out


def test_every_array_of_a_file_comes_back():
    layers = {
        "a": [np.arange(2 * 3 * 300, dtype=np.float32).reshape(2, 3, 300)],
        "b": [np.ones((200, 1, 1, 1), np.float32), np.float32([0.5])],
    }
    found = read_caffe(caffemodel({**layers, "relu": []}))
    assert found.keys() == layers.keys()
    for name, arrays in layers.items():
        assert all(np.array_equal(a, b) for a, b in zip(found[name], arrays, strict=True))


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_file_that_was_cut_is_damaged(cut):
    raw = caffemodel({"a": [np.ones((4, 9), np.float32)]})
    with pytest.raises(ValueError, match="damaged"):
        read_caffe(raw[:-cut])


def config():
    cfg = get_fgbg_kd_cfg()
    cfg.merge_from_file(str(ROOT / "configs/real/voc07_mobilenet_ssd.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def random_layers(model) -> dict[str, list[np.ndarray]]:
    convolutions = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    layers = dict(zip(layer_names(), convolutions, strict=True))
    for i, name in enumerate(MAPS):
        layers[f"{name}_mbox_conf"] = model.head.classification_head.module_list[i]
        layers[f"{name}_mbox_loc"] = model.head.regression_head.module_list[i]
    return {k: [p.detach().numpy().copy() for p in (m.weight, m.bias)] for k, m in layers.items()}


def test_the_layers_fill_the_detector_whole():
    model = build_model(config())
    layers = random_layers(model)
    state = to_ssd(layers)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert sum(v.numel() for v in state.values()) == 5_783_417  # as in the published file
    layers["conv3/dw"][0] = layers["conv3/dw"][0][:1]
    with pytest.raises(ValueError, match="shape"):
        to_ssd(layers)
    del layers["conv0"]
    with pytest.raises(KeyError, match="conv0"):
        to_ssd(layers)


def test_the_default_boxes_are_those_of_the_published_file():
    """Its prototxt: squares of 60, 105, 150, ... pixels, the second one of sqrt(105 * 150), ..."""
    model = build_model(config())
    first, second = model.default_boxes.split(model.boxes_per_level)[:2]
    size = lambda boxes: (boxes[:, 2:] - boxes[:, :2]).tolist()  # noqa: E731
    root = 2**0.5
    expected = [[60, 60], [60 * root, 60 / root], [60 / root, 60 * root]]
    np.testing.assert_allclose(size(first[:3]), expected, rtol=1e-5)
    np.testing.assert_allclose(size(second[:2]), [[105] * 2, [(105 * 150) ** 0.5] * 2], rtol=1e-5)
    centre = (first[3, :2] + first[3, 2:]) / 2
    np.testing.assert_allclose(centre.tolist(), [1.5 * 300 / 19, 0.5 * 300 / 19], rtol=1e-5)
    widest = model.default_boxes[:, 2] - model.default_boxes[:, 0]
    np.testing.assert_allclose(widest.max().item(), 285 * 3**0.5, rtol=1e-5)  # not clipped to 300
