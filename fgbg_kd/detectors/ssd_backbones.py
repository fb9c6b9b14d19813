"""Backbones of SSD: six feature maps of falling size from an image of fixed size.

The maps are named "0" to "5", finest first. The torchvision backbones keep torchvision's tensor
names, so its checkpoints load.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops.misc import Conv2dNormActivation

from ..utils.errors import ConfigError
from .timm_backbone import TimmBackbone, build_timm_backbone

# The batch norm of torchvision's SSDlite.
norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)

# Position of the block whose expansion gives MobileNetV3-Large's map of stride 16.
_C4 = 13


def _describe(backbone: Backbone, size: int) -> None:
    """Sets what Detectron2 asks of a backbone, measured on an image of zeros.

    A stride is ``size / cells of the map``, rounded to a power of two that is at most 10 % away:
    16, not 300 / 19. So a map meets the map of an FPN that was made by the same convolutions.
    """
    was_training = backbone.training
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 3, size, size))
    backbone.train(was_training)
    backbone._out_features = list(maps)
    backbone._out_feature_channels = {k: m.shape[1] for k, m in maps.items()}
    backbone._out_feature_strides = {k: _stride(size / m.shape[2]) for k, m in maps.items()}
    # (height, width) of each map
    backbone.grids = [tuple(m.shape[2:]) for m in maps.values()]


def _stride(exact: float) -> int:
    power = 2 ** round(math.log2(exact))
    return power if abs(exact - power) <= 0.1 * power else round(exact)


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): m for i, m in enumerate(maps)}


class SSDVGG16(SSDFeatureExtractorVGG, Backbone):
    """torchvision's backbone of SSD300: VGG-16 and four extra blocks."""

    def __init__(self, size: int):
        super().__init__(make_layers(cfgs["D"]), highres=False)
        _describe(self, size)


class SSDMobileNetV3(SSDLiteFeatureExtractorMobileNet, Backbone):
    """torchvision's backbone of SSDlite320: MobileNetV3-Large and four extra blocks."""

    def __init__(self, size: int, width: float):
        """
        Args:
            width: factor for the number of channels; 1 fits torchvision's checkpoint.
        """
        body = mobilenet_v3_large(width_mult=width, reduced_tail=True, norm_layer=norm_layer)
        super().__init__(body.features, _C4, norm_layer, width_mult=width)
        _describe(self, size)


class SSDMobileNetV1(Backbone):
    """MobileNet-SSD's backbone (Howard et al., "MobileNets", 2017) without batch norms.

    Trained weights have the batch norms merged into the convolutions.
    """

    # (channels, stride) of each depthwise separable convolution; the maps are taken after two
    _BODY = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5)
    _END = ((1024, 2), (1024, 1))
    _EXTRA = ((256, 512), (128, 256), (128, 256), (64, 128))

    def __init__(self, size: int, width: float):
        """
        Args:
            width: factor for the number of channels; 1 fits the published weights.
        """
        super().__init__()
        channels = round(32 * width)
        stem: list[nn.Module] = [_conv(3, channels, 3, 2)]
        body: list[nn.Module] = []
        for part, blocks in ((stem, self._BODY), (body, self._END)):
            for out, stride in blocks:
                out = round(out * width)
                part += [_conv(channels, channels, 3, stride, groups=channels)]
                part += [_conv(channels, out, 1)]
                channels = out
        self.features = nn.ModuleList([nn.Sequential(*stem), nn.Sequential(*body)])
        self.extra = nn.ModuleList()
        for inner, out in self._EXTRA:
            inner, out = round(inner * width), round(out * width)
            self.extra.append(nn.Sequential(_conv(channels, inner, 1), _conv(inner, out, 3, 2)))
            channels = out
        _describe(self, size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        for block in (*self.features, *self.extra):
            x = block(x)
            maps.append(x)
        return _named(maps)


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return Conv2dNormActivation(channels, out, kernel, stride, groups=groups, norm_layer=None)


class SSDTimm(Backbone):
    """Any timm feature extractor, and extra blocks as in SSDlite (Sandler et al., 2018).

    Attributes:
        bottom_up: the timm model; its maps of strides 16 and 32 are the first two maps.
        extra: blocks of stride 2: 1x1, depthwise 3x3, 1x1.
    """

    def __init__(self, bottom_up: TimmBackbone, size: int, extra_channels: Sequence[int]):
        super().__init__()
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        channels = shapes[max(shapes, key=lambda name: shapes[name].stride)].channels
        self.extra = nn.ModuleList()
        for out in extra_channels:
            self.extra.append(_extra_block(channels, out))
            channels = out
        _describe(self, size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = list(self.bottom_up(x).values())
        for block in self.extra:
            maps.append(block(maps[-1]))
        return _named(maps)


def _extra_block(channels: int, out: int) -> nn.Sequential:
    conv: Callable = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.ReLU6)
    inner = out // 2
    return nn.Sequential(
        conv(channels, inner, 1), conv(inner, inner, 3, 2, groups=inner), conv(inner, out, 1)
    )


@BACKBONE_REGISTRY.register()
def build_ssd_vgg16_backbone(cfg, input_shape: ShapeSpec | None = None) -> SSDVGG16:
    """torchvision's SSD300: HEAD conv, SIZE 300."""
    return SSDVGG16(cfg.MODEL.SSD.SIZE)


@BACKBONE_REGISTRY.register()
def build_ssd_mobilenetv3_backbone(cfg, input_shape: ShapeSpec | None = None) -> SSDMobileNetV3:
    """torchvision's SSDlite320: HEAD lite, SIZE 320."""
    return SSDMobileNetV3(cfg.MODEL.SSD.SIZE, cfg.MODEL.SSD.WIDTH)


@BACKBONE_REGISTRY.register()
def build_ssd_mobilenetv1_backbone(cfg, input_shape: ShapeSpec | None = None) -> SSDMobileNetV1:
    """MobileNet-SSD: HEAD linear, SIZE 300."""
    return SSDMobileNetV1(cfg.MODEL.SSD.SIZE, cfg.MODEL.SSD.WIDTH)


@BACKBONE_REGISTRY.register()
def build_ssd_timm_backbone(cfg, input_shape: ShapeSpec | None = None) -> SSDTimm:
    """A timm model (MODEL.TIMM.*) and the extra blocks of MODEL.SSD.EXTRA_CHANNELS."""
    ssd = cfg.MODEL.SSD
    if not ssd.EXTRA_CHANNELS:
        raise ConfigError("MODEL.SSD.EXTRA_CHANNELS is empty: name the channels of each block.")
    body = build_timm_backbone(cfg, input_shape)
    strides = [shape.stride for shape in body.output_shape().values()]
    if strides != [16, 32]:
        raise ConfigError(
            f"MODEL.TIMM.OUT_FEATURES gives maps of the strides {strides}, but SSD needs 16 and "
            "32: set it to [res4, res5]."
        )
    return SSDTimm(body, ssd.SIZE, ssd.EXTRA_CHANNELS)
