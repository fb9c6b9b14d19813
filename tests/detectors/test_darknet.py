"""Darknet's networks: the outputs equal OpenCV's, and the official .weights files load whole."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model
from make_darknet_golden import CLASSES, GOLDEN, NETWORKS, WIDTH, image, kept, write_weights

from fgbg_kd.detectors import YOLO, view
from fgbg_kd.detectors.darknet_weights import read_weights
from fgbg_kd.detectors.load import load_exactly
from fgbg_kd.utils.errors import CheckpointError, ConfigError
from fgbg_kd.utils.safe_checkpoint import SafeCheckpointer

# Bytes of Darknet's own files: the whole network with 80 classes.
OFFICIAL = {
    "yolov3": 248_007_048,
    "yolov3-tiny": 35_434_956,
    "yolov4": 257_717_640,
    "yolov4-tiny": 24_251_276,
}
# Name, network, bytes, and the number of the first layer that the file lacks.
PARTIAL = [
    ("darknet53.conv.74", "yolov3", 162_482_580, 74),
    ("yolov4.conv.137", "yolov4", 170_038_676, 137),
    ("yolov4-tiny.conv.29", "yolov4-tiny", 19_789_716, 29),
]
HEADER = np.array([0, 2, 5, 0, 0], "<i4").tobytes()


def narrow(name, classes=CLASSES):
    return YOLO(network=name, num_classes=classes, width=WIDTH)


def zeros(path, size):
    """A .weights file of a given size without data on the disk."""
    with open(path, "wb") as file:
        file.write(HEADER)
        file.truncate(size)
    return str(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_boxes_equal_opencvs(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())[name]
    detector, path = narrow(name), str(tmp_path / "a.weights")
    write_weights(path, narrow(name))
    load_exactly(detector, path)
    for module in detector.modules():
        if hasattr(module, "eps"):  # OpenCV adds 1e-6 to a variance, Darknet adds 1e-5
            assert module.eps == 1e-5
            module.eps = 1e-6
    of = view(detector.eval())
    with torch.no_grad():
        output = of.run(torch.from_numpy(image()))
        decoded = of.decode(output.features, output.raw)
    assert len(output.raw) == len(golden["raw"]) == len(of.levels)
    for x, expected in zip(output.raw, golden["raw"]):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(kept(x.numpy()), expected, rtol=0, atol=5e-6 * scale)
    for raw, boxes, logits, expected in zip(output.raw, decoded, output.logits, golden["decoded"]):
        n, _, h, w = boxes.shape
        x0, y0, x1, y1 = boxes.reshape(n, 3, 4, h, w).unbind(2)
        objectness = raw.reshape(n, 3, -1, h, w)[:, :, 4].sigmoid()
        xywh = [(x0 + x1) / 2 / 96, (y0 + y1) / 2 / 64, (x1 - x0) / 96, (y1 - y0) / 64]
        scores = logits.sigmoid().reshape(n, 3, CLASSES, h, w).unbind(2)
        rows = torch.stack([*xywh, objectness, *scores], dim=2)  # (N, A, 5 + K, H, W)
        rows = rows.permute(0, 3, 4, 1, 2).numpy()  # in OpenCV's order
        np.testing.assert_allclose(kept(rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.slow
def test_a_file_of_the_official_size_fills_the_whole_network(name, tmp_path):
    path = zeros(tmp_path / f"{name}.weights", OFFICIAL[name])
    with torch.device("meta"):
        detector = YOLO(network=name)
    shapes = {k: v.shape for k, v in detector.state_dict().items()}
    assert {k: v.shape for k, v in read_weights(path, detector).items()} == shapes
    strides = [level.stride for level in view(detector).levels]
    assert strides == ([16, 32] if "tiny" in name else [8, 16, 32])


@pytest.mark.parametrize("file, name, size, layers", PARTIAL)
def test_a_file_of_the_first_layers_fills_these(file, name, size, layers, tmp_path):
    with torch.device("meta"):
        detector = YOLO(network=name, num_classes=3)
    found = read_weights(zeros(tmp_path / file, size), detector)
    # A name is backbone.bottom_up.<number>.<tensor> or head.<output>.<number>.<tensor>.
    assert found.keys() == {k for k in detector.state_dict() if int(k.split(".")[2]) < layers}


def test_a_file_with_other_classes_has_only_other_last_convolutions(tmp_path):
    """As for .pth files, Detectron2 then leaves these convolutions as they are."""
    write_weights(tmp_path / "a.weights", narrow("yolov4-tiny", classes=5))
    detector = narrow("yolov4-tiny")
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    SafeCheckpointer(detector).load(str(tmp_path / "a.weights"))
    kept = {k for k, v in detector.state_dict().items() if torch.equal(v, before[k])}
    last = {f"head.{n}.{part}" for n in ("s32.29", "s16.36") for part in ("weight", "bias")}
    assert kept == last | {k for k in before if k.endswith("num_batches_tracked")}
    with pytest.raises(CheckpointError, match="4 of another shape in the model"):
        load_exactly(detector, str(tmp_path / "a.weights"))


def test_the_first_layers_initialise_a_detector_and_are_no_teacher(tmp_path):
    """Two convolutions, 3 to 4 and 4 to 8 channels, each with four numbers per filter more."""
    path, detector = tmp_path / "my.conv.2", narrow("yolov4-tiny")
    write_weights(path, narrow("yolov4-tiny"))
    size = len(HEADER) + 4 * (4 * (4 + 27) + 8 * (4 + 36))
    path.write_bytes(path.read_bytes()[:size])
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    SafeCheckpointer(detector).load(str(path))
    changed = {k for k, v in detector.state_dict().items() if not torch.equal(v, before[k])}
    parts = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert changed == {f"backbone.bottom_up.{i}.{part}" for i in (0, 1) for part in parts}
    with pytest.raises(CheckpointError, match="missing in the file"):
        load_exactly(detector, str(path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b[:-4], "has 95[0-9]* numbers, but this network has 95[0-9]* with 2 classes"),
        (lambda b: b[:-2], "ends within a number"),
        (lambda b: b + bytes(4), "belongs to another network, or is damaged"),
        (lambda b: b[:10], "is not a .weights file of Darknet"),
        (lambda b: b"PK" + b, "is not a .weights file of Darknet"),
    ],
)
def test_a_wrong_file_is_refused(change, message, tmp_path):
    path, detector = tmp_path / "a.weights", narrow("yolov4-tiny")
    write_weights(path, detector)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_exactly(detector, str(path))


def test_another_detector_does_not_take_a_file_of_darknet(tmp_path):
    with pytest.raises(CheckpointError, match="a RetinaNet. Only .* YOLO reads it"):
        load_exactly(build_model(tiny_cfg()), zeros(tmp_path / "a.weights", 40))


CFG = """[net]
channels=3
[convolutional]
filters=8
size=3
stride=2
pad=1
activation=mish
[convolutional]
filters=8
size=3
pad=1
activation=leaky
[convolutional]
filters=7
activation=linear
[yolo]
anchors=10,14
classes=2
"""


def built(folder, text):
    (folder / "my.cfg").write_text(text)
    return YOLO(network=str(folder / "my.cfg"), num_classes=2)


def test_a_users_own_cfg_is_built(tmp_path):
    detector = built(tmp_path, CFG)
    assert [level[1:] for level in view(detector).levels] == [(2, 8)]
    assert detector.backbone.size_divisibility == 2
    assert detector.head([torch.zeros(1, 8, 4, 6)])[0].shape == (1, 7, 4, 6)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[net]", "[network2]", "must begin with .net."),
        ("filters=8", "filters 8", "line 4: 'filters 8' is not KEY=VALUE"),
        ("filters=8", "filters=x", r"layer 0 \[convolutional\] needs numbers in filters"),
        ("mish", "gelu", "has the activation gelu: use linear, leaky"),
        ("filters=8", "filters=8\nxnor=1", r"layer 0 \[convolutional\] has xnor=1"),
        ("[yolo]", "[region]", r"layer 3 \[region\] is not supported. These are: convolutional"),
        ("classes=2", "classes=2\nnew_coords=1", "new_coords=1. Supported: 0"),
        ("classes=2", "classes=2\niou_loss=giou", "iou_loss=giou. Supported: mse ciou"),
        ("classes=2", "truth_thresh=0.7", "truth_thresh=0.7. Supported: 1"),
        ("classes=2", "mask=0,1", "a mask without anchors"),
        ("anchors=10,14", "", "needs numbers in anchors"),
        ("anchors=10,14", "anchors=10,14\n[route]\nlayers=-3", "reads an output of the network"),
        ("anchors=10,14", "anchors=10,14\n[route]\nlayers=9", "not before it .layers=9."),
        ("filters=7", "filters=7\nbatch_normalize=1", "without batch_normalize"),
    ],
)
def test_a_cfg_that_cannot_be_built_is_refused(old, new, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, CFG.replace(old, new, 1))


def test_any_width_gives_numbers_of_channels_that_can_be_halved():
    detector = YOLO(network="yolov4-tiny", num_classes=2, width=0.05).eval()  # 32 * 0.05 = 1.6
    channels = {m.out_channels for m in detector.backbone.modules() if hasattr(m, "out_channels")}
    assert channels == {2, 4, 6, 12, 26} and all(c % 2 == 0 for c in channels)
    assert detector.backbone(torch.zeros(1, 3, 32, 64))["s32"].shape[2:] == (1, 2)


def test_a_width_of_0_is_refused():
    with pytest.raises(ConfigError, match="WIDTH is 0: it must be over 0"):
        YOLO(network="yolov4-tiny", width=0)


def test_an_unknown_network_is_refused():
    with pytest.raises(
        ConfigError, match="'yolov9', which cannot be read .* one of yolov3, yolov3-t"
    ):
        YOLO(network="yolov9")
