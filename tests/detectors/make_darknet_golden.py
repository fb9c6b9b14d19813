"""Records what OpenCV computes from Darknet's files, for tests/detectors/test_darknet.py.

OpenCV 5 no longer reads Darknet's files, so it runs in an environment of its own::

    python tests/detectors/make_darknet_golden.py write /tmp/golden
    python -m venv cv4 && cv4/bin/pip install "opencv-python-headless<5" numpy
    cv4/bin/python tests/detectors/make_darknet_golden.py record /tmp/golden

The networks have an eighth of their channels and two classes, so that the test is fast.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

NETWORKS = ("yolov3", "yolov3-tiny", "yolov4", "yolov4-tiny")
WIDTH, CLASSES = 0.125, 2
GOLDEN = Path(__file__).with_name("darknet_golden.json")
CFGS = Path(__file__).parents[2] / "fgbg_kd" / "detectors" / "networks"
KEPT = 60  # numbers per map


def image() -> np.ndarray:
    """(1, 3, 64, 96) float32 in 0..1."""
    return np.random.default_rng(0).random((1, 3, 64, 96), dtype=np.float32)


def kept(values: np.ndarray) -> np.ndarray:
    """Some numbers of a map, spread evenly."""
    values = np.asarray(values).ravel()
    return values[np.linspace(0, len(values) - 1, KEPT).astype(int)]


def write_weights(path, detector) -> None:
    """Writes a .weights file with seeded numbers of the right size for each convolution."""
    rng = np.random.default_rng(1)
    layers = [m for m in detector.named_modules() if hasattr(m[1], "out_channels")]
    with open(path, "wb") as file:
        np.array([0, 2, 5], "<i4").tofile(file)
        np.array([0], "<i8").tofile(file)
        for _, conv in sorted(layers, key=lambda m: int(m[0].split(".")[-1])):
            n, shape = conv.out_channels, tuple(conv.weight.shape)
            parts = [rng.normal(0, 0.1, n)]  # bias
            if conv.norm is not None:  # factor, mean, variance
                parts += [rng.uniform(0.8, 1.2, n), rng.normal(0, 0.1, n), rng.uniform(1.3, 2.6, n)]
            parts.append(rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape))
            for part in parts:
                part.astype("<f4").tofile(file)


def narrow_cfg(name: str) -> str:
    """The text of a .cfg file with fewer channels and classes, for a reader without WIDTH."""
    sections = re.split(r"(?m)^(?=\[)", (CFGS / f"{name}.cfg").read_text())
    for i, section in enumerate(sections):
        if i + 1 < len(sections) and sections[i + 1].startswith("[yolo]"):
            sections[i] = re.sub(r"filters=\d+", f"filters={3 * (5 + CLASSES)}", section)
        elif section.startswith("[convolutional]"):
            narrow = lambda m: f"filters={int(int(m[1]) * WIDTH)}"  # noqa: E731
            sections[i] = re.sub(r"filters=(\d+)", narrow, section)
        elif section.startswith("[yolo]"):  # OpenCV sets scores to 0 below 0.2 by default
            sections[i] = re.sub(r"classes=\d+", f"classes={CLASSES}\nthresh=0", section)
    return "".join(sections)


def write(folder: Path) -> None:
    from fgbg_kd.detectors import YOLO

    folder.mkdir(exist_ok=True)
    for name in NETWORKS:
        write_weights(
            folder / f"{name}.weights", YOLO(network=name, num_classes=CLASSES, width=WIDTH)
        )
        (folder / f"{name}.cfg").write_text(narrow_cfg(name))


def record(folder: Path) -> None:
    import cv2

    golden: dict = {"opencv": cv2.__version__}
    for name in NETWORKS:
        net = cv2.dnn.readNetFromDarknet(
            str(folder / f"{name}.cfg"), str(folder / f"{name}.weights")
        )
        net.setInput(image())
        outputs = net.getUnconnectedOutLayersNames()  # yolo_82, ...
        convolutions = [f"conv_{int(x.split('_')[1]) - 1}" for x in outputs]
        maps = net.forward(convolutions)
        rows = net.forward(outputs)  # (H * W * A, 5 + K): box, objectness, final scores
        order = sorted(range(len(maps)), key=lambda i: -maps[i].shape[2])  # finest first
        golden[name] = {
            "raw": [[float(f"{v:.7g}") for v in kept(maps[i])] for i in order],
            "decoded": [[float(f"{v:.7g}") for v in kept(rows[i])] for i in order],
        }
    GOLDEN.write_text(json.dumps(golden).replace("], [", "],\n[").replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    {"write": write, "record": record}[sys.argv[1]](Path(sys.argv[2]))
