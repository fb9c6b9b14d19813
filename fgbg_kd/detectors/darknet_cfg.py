"""Reads .cfg files of Darknet. This package has four of them in the folder networks."""

from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import ConfigError

_PACKAGED = Path(__file__).parent / "networks"


class Layer(dict):
    """A section of a .cfg file: its keys and values as text.

    Attributes:
        kind: the name in brackets, such as "convolutional".
        number: Darknet's number of the layer. The section [net] has the number -1.
    """

    def __init__(self, kind: str, number: int):
        super().__init__()
        self.kind, self.number = kind, number

    def refuse(self, what: str) -> ConfigError:
        """The error that says what is wrong with this layer."""
        return ConfigError(f"MODEL.YOLO.CFG: layer {self.number} [{self.kind}] {what}")

    def numbers(self, key: str, default: str = "") -> list[float]:
        """Values that are separated by commas.

        Raises:
            ConfigError: the key is missing, or a value is not a number.
        """
        text = self.get(key, default)
        try:
            return [float(x) for x in text.strip(", ").split(",")]
        except ValueError:
            raise self.refuse(f"needs numbers in {key}, and has {text!r}.") from None

    def integer(self, key: str, default: str = "") -> int:
        return int(self.numbers(key, default)[0])


def read_cfg(name: str) -> list[Layer]:
    """Reads a network.

    Args:
        name: path of a Darknet .cfg file, or the name of a file that this package has: "yolov3",
            "yolov3-tiny", "yolov4", "yolov4-tiny".

    Returns:
        The section [net], and the layers in their order.

    Raises:
        ConfigError: there is no such file, or it is not a .cfg file.
    """
    packaged = _PACKAGED / f"{name}.cfg"
    path = packaged if packaged.is_file() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(p.stem for p in _PACKAGED.glob("*.cfg")))
        raise ConfigError(
            f"MODEL.YOLO.CFG is {name!r}, which cannot be read ({error}): give the path of a "
            f"Darknet .cfg file, or one of {known}."
        ) from error
    layers: list[Layer] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        key, equals, value = line.partition("=")
        if line.startswith("[") and line.endswith("]"):
            layers.append(Layer(line[1:-1].strip(), len(layers) - 1))
        elif equals and layers:
            layers[-1][key.strip()] = value.strip()
        elif line and line[0] not in "#;":
            raise ConfigError(f"{path}, line {number}: {line!r} is not KEY=VALUE or [layer].")
    if len(layers) < 2 or layers[0].kind not in ("net", "network"):
        raise ConfigError(f"{path} is not a Darknet .cfg file: it must begin with [net].")
    return layers


def set_anchors(layers: Sequence[Layer], sizes: Sequence[Sequence[float]]) -> None:
    """Replaces the anchors of all outputs.

    Args:
        layers: the result of :func:`read_cfg`. They are changed.
        sizes: (width, height) in pixels of each anchor, in the order of the .cfg file.

    Raises:
        ConfigError: the file has another number of anchors, or a size is not two numbers over 0.
    """
    if not all(len(size) == 2 and min(size) > 0 for size in sizes):
        raise ConfigError(
            f"MODEL.YOLO.ANCHORS is {sizes}: each anchor must be [width, height] in pixels."
        )
    for layer in layers:
        if layer.kind == "yolo":
            count = len(layer.numbers("anchors")) // 2
            if len(sizes) != count:
                raise ConfigError(
                    f"MODEL.YOLO.ANCHORS has {len(sizes)} anchors. The network needs {count}: the "
                    f"first of them belong to the output with the smallest stride."
                )
            layer["anchors"] = ",".join(str(x) for size in sizes for x in size)
