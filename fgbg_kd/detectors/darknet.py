"""Networks of Darknet: built from a .cfg file, and filled from a .weights file.

Darknet (Redmon; Bochkovskiy) describes a network as a list of layers. A layer may read any earlier
layer by its number. The ``[yolo]`` layers are the outputs. Before each of them are a 3x3 and a 1x1
convolution, which form the head here. All other layers form the backbone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import ConfigError
from .darknet_cfg import Layer

_ACTIVATIONS = {
    "linear": lambda: None,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),  # saves a map in training
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "swish": nn.SiLU,
    "logistic": nn.Sigmoid,
}


class YoloLayer(NamedTuple):
    """An output of the network.

    Attributes:
        stride: in pixels.
        anchors: (width, height) in pixels of the anchors of all outputs.
        mask: indices of this output's anchors.
        scale: factor ``scale_x_y`` of the sigmoid in a box's centre.
        ignore_thresh: a prediction with a larger IoU with an object is not background.
        iou_thresh: an anchor with a larger IoU with an object predicts it too; 1: only the best
            anchor does.
        ciou: whether boxes are trained by their CIoU (``iou_loss=ciou``, YOLOv4), or by squared
            errors (YOLOv3).
    """

    stride: int
    anchors: list[tuple[float, float]]
    mask: list[int]
    scale: float
    ignore_thresh: float
    iou_thresh: float
    ciou: bool

    @property
    def own_anchors(self) -> list[tuple[float, float]]:
        return [self.anchors[i] for i in self.mask]


class Darknet(Backbone):
    """All layers of a network except the last two convolutions of each output.

    Attributes:
        bottom_up: the layers by their number; layers of the head are empty.
        outputs: the [yolo] layers by the name of their feature map, finest first. The name is "s"
            and the stride: "s8", "s16", "s32".
        pairs: for each output, the two convolutions of the head as (number, arguments of
            :func:`_convolution`).
    """

    def __init__(self, layers: Sequence[Layer], num_classes: int, width: float, norm: str):
        """
        Args:
            layers: the result of :func:`~fgbg_kd.detectors.darknet_cfg.read_cfg`.
            num_classes: replaces the number in the .cfg file.
            width: factor for the number of channels of all layers except the outputs.
            norm: the norm where the file has ``batch_normalize=1``: a name of Detectron2, such as
                "BN", "SyncBN" or "FrozenBN".

        Raises:
            ConfigError: a layer is not supported, or the width is not positive.
        """
        super().__init__()
        if not width > 0:
            raise ConfigError(f"MODEL.YOLO.WIDTH is {width}: it must be over 0.")
        self.num_classes, self.width, self.norm = num_classes, width, norm
        net, *rest = layers
        self._shapes = [ShapeSpec(channels=net.integer("channels", "3"), stride=1)]  # the image
        self._sources: list[list[int]] = []  # numbers of the layers that a layer reads; -1: image
        self.bottom_up = nn.ModuleList()
        self.outputs: dict[str, YoloLayer] = {}
        self.pairs: dict[str, list[tuple[int, dict]]] = {}
        self._features: dict[int, list[str]] = {}
        self._heads = {y.number - back for y in rest if y.kind == "yolo" for back in (0, 1, 2)}
        arguments: dict[int, dict] = {}
        for layer in rest:
            if layer.kind not in _KINDS:
                raise layer.refuse(f"is not supported. These are: {', '.join(_KINDS)}.")
            sources, shape, module = getattr(self, f"_{layer.kind}")(layer, arguments)
            if layer.number not in self._heads and self._heads.intersection(sources):
                raise layer.refuse(
                    "reads an output of the network or the convolution before it, which is not "
                    "supported."
                )
            self._sources.append(sources)
            self._shapes.append(shape)
            self.bottom_up.append(module)
        if not self.outputs:
            raise ConfigError("MODEL.YOLO.CFG: the network has no [yolo] layer.")
        names = sorted(self.outputs, key=lambda name: self.outputs[name].stride)
        self.outputs = {name: self.outputs[name] for name in names}
        self._last_use = {s: i for i, of in enumerate(self._sources) for s in of}

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self._shapes)

    def output_shape(self) -> dict[str, ShapeSpec]:
        at = {name: number for number, names in self._features.items() for name in names}
        return {name: self._shapes[at[name] + 1] for name in self.outputs}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> the maps that the head reads, (N, C, H / stride, W / stride)."""
        maps, found = {-1: image}, {}
        for number, (sources, module) in enumerate(zip(self._sources, self.bottom_up)):
            if number in self._heads:
                continue
            maps[number] = module(*(maps[s] for s in sources))
            for name in self._features.get(number, ()):
                found[name] = maps[number]
            for source in set(sources):  # frees memory in inference
                if self._last_use[source] == number:
                    del maps[source]
        return {name: found[name] for name in self.outputs}

    # Each of the following methods returns the numbers of the layers that a layer reads, its shape
    # and its module.

    def _convolutional(self, layer: Layer, arguments: dict[int, dict]):
        source = self._shapes[layer.number]
        size, stride = layer.integer("size", "1"), layer.integer("stride", "1")
        filters = layer.integer("filters", "1")
        activation = layer.get("activation", "logistic")
        if activation not in _ACTIVATIONS:
            raise layer.refuse(f"has the activation {activation}: use {', '.join(_ACTIVATIONS)}.")
        if layer.integer("xnor", "0"):
            raise layer.refuse("has xnor=1 (binary weights), which is not supported.")
        if self.width != 1:  # an even number, so that a route can halve it
            filters = max(2, 2 * round(filters * self.width / 2))
        arguments[layer.number] = {
            "inputs": source.channels,
            "filters": filters,
            "size": size,
            "stride": stride,
            "padding": size // 2 if layer.integer("pad", "0") else layer.integer("padding", "0"),
            "groups": layer.integer("groups", "1"),
            "norm": self.norm if layer.integer("batch_normalize", "0") else "",
            "activation": activation,
        }
        shape = ShapeSpec(channels=filters, stride=source.stride * stride)
        in_head = layer.number in self._heads
        module = nn.Identity() if in_head else _convolution(**arguments[layer.number])
        return [layer.number - 1], shape, module

    def _shortcut(self, layer: Layer, _):
        sources = [layer.number - 1, *self._named(layer, "from")]
        first, *others = [self._shapes[s + 1] for s in sources]
        if any(x != first for x in others) or layer.get("activation", "linear") != "linear":
            raise layer.refuse("adds maps of different shapes, or has an activation.")
        return sources, first, _Sum()

    def _route(self, layer: Layer, _):
        sources = self._named(layer, "layers")
        shapes = [self._shapes[s + 1] for s in sources]
        if len({shape.stride for shape in shapes}) > 1:
            raise layer.refuse("joins maps of different sizes.")
        groups, group = layer.integer("groups", "1"), layer.integer("group_id", "0")
        parts = [slice(s.channels // groups * group, s.channels // groups * (group + 1))
                 for s in shapes]  # fmt: skip
        channels = sum(part.stop - part.start for part in parts)
        module = _Join(parts if groups > 1 else [])
        return sources, ShapeSpec(channels=channels, stride=shapes[0].stride), module

    def _upsample(self, layer: Layer, _):
        source, stride = self._shapes[layer.number], layer.integer("stride", "2")
        if source.stride % stride:
            raise layer.refuse("makes a map that is larger than the image.")
        shape = ShapeSpec(channels=source.channels, stride=source.stride // stride)
        return [layer.number - 1], shape, nn.Upsample(scale_factor=stride)

    def _maxpool(self, layer: Layer, _):
        source, stride = self._shapes[layer.number], layer.integer("stride", "1")
        shape = ShapeSpec(channels=source.channels, stride=source.stride * stride)
        return [layer.number - 1], shape, _MaxPool(layer.integer("size", str(stride)), stride)

    def _yolo(self, layer: Layer, arguments: dict[int, dict]):
        first, last = (arguments.get(layer.number - back) for back in (2, 1))
        if first is None or last is None or last["norm"]:
            raise layer.refuse("must follow a convolution, and one without batch_normalize.")
        for key, values in (
            ("new_coords", "0"),
            ("truth_thresh", "1 1.0"),
            ("iou_loss", "mse ciou"),
        ):
            if layer.get(key, values.split()[0]) not in values.split():
                raise layer.refuse(f"has {key}={layer[key]}. Supported: {values}.")
        sizes = layer.numbers("anchors")
        anchors = list(zip(sizes[::2], sizes[1::2]))
        mask = [int(i) for i in layer.numbers("mask", ",".join(map(str, range(len(anchors)))))]
        shape = self._shapes[layer.number]
        name = f"s{shape.stride}"
        if name in self.outputs or not all(0 <= i < len(anchors) for i in mask):
            raise layer.refuse("has the stride of another output, or a mask without anchors.")
        last["filters"] = len(mask) * (5 + self.num_classes)
        self.outputs[name] = YoloLayer(
            stride=shape.stride,
            anchors=anchors,
            mask=mask,
            scale=layer.numbers("scale_x_y", "1")[0],
            ignore_thresh=layer.numbers("ignore_thresh", "0.5")[0],
            iou_thresh=layer.numbers("iou_thresh", "1")[0],
            ciou=layer.get("iou_loss", "mse") == "ciou",
        )
        self.pairs[name] = [(layer.number - 2, first), (layer.number - 1, last)]
        self._features.setdefault(layer.number - 3, []).append(name)
        return [layer.number - 1], shape, nn.Identity()

    def _named(self, layer: Layer, key: str) -> list[int]:
        """Numbers of earlier layers. A negative number counts back from the layer."""
        numbers = [int(n) for n in layer.numbers(key)]
        numbers = [n + layer.number if n < 0 else n for n in numbers]
        if not all(0 <= n < layer.number for n in numbers):
            raise layer.refuse(f"reads a layer that is not before it ({key}={layer[key]}).")
        return numbers


_KINDS = ("convolutional", "shortcut", "route", "upsample", "maxpool", "yolo")


class DarknetHead(nn.Module):
    """The last two convolutions of each output of a network.

    The module of an output has its name, and its two convolutions have Darknet's numbers.
    """

    def __init__(self, backbone: Darknet):
        super().__init__()
        for name, pair in backbone.pairs.items():
            parts = {str(number): _convolution(**arguments) for number, arguments in pair}
            self.add_module(name, nn.Sequential(OrderedDict(parts)))
        self.names = list(backbone.outputs)

    def classifiers(self) -> list[Conv2d]:
        """The last convolution of each output."""
        return [getattr(self, name)[-1] for name in self.names]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C_l, H_l, W_l), finest first -> (N, A_l * (5 + K), H_l, W_l).

        The values of an anchor are x, y, width, height, objectness and K classes, all raw.
        """
        return [getattr(self, name)(x) for name, x in zip(self.names, features)]


def _convolution(inputs, filters, size, stride, padding, groups, norm, activation) -> Conv2d:
    """A convolution with Darknet's initial weights: uniform with variance 2 / (3 * fan-in)."""
    conv = Conv2d(
        inputs,
        filters,
        size,
        stride=stride,
        padding=padding,
        groups=groups,
        bias=not norm,
        norm=get_norm(norm, filters),
        activation=_ACTIVATIONS[activation](),
    )
    bound = (2 / conv.weight[0].numel()) ** 0.5
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class _Sum(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        return sum(maps[1:], maps[0])


class _Join(nn.Module):
    """Concatenates maps, or a part of the channels of each map."""

    def __init__(self, parts: list[slice]):
        super().__init__()
        self.parts = parts

    def forward(self, *maps: Tensor) -> Tensor:
        if self.parts:
            maps = tuple(x[:, part] for x, part in zip(maps, self.parts))
        return torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]


class _MaxPool(nn.Module):
    """Darknet's max pooling. With stride 1 it keeps the size of the map."""

    def __init__(self, size: int, stride: int):
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        before, after = (self.size - 1) // 2, self.size // 2
        if before == after:
            return F.max_pool2d(x, self.size, self.stride, padding=before)
        if self.stride < self.size:
            # Only the last row and column are repeated, which does not change the maximum.
            x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        return F.max_pool2d(x, self.size, self.stride, padding=before)
