"""The network of YOLOX: modules of the package pixeltable-yolox under Detectron2's interface.

Importing this file imports that package, which is optional. Only yolox.py imports it, when it
builds a detector. The tensors have the names of Megvii's checkpoints.
"""

import warnings
from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn
from yolox.models import YoloPafpn, YoloxHead

# The library calls torch.cuda.amp.autocast, which warns that it has a new name.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"yolox\.models\.")

# Channels of each level at width 1, and strides in pixels.
_CHANNELS = {"p3": 256, "p4": 512, "p5": 1024}
_STRIDES = {"p3": 8, "p4": 16, "p5": 32}


class PAFPN(YoloPafpn, Backbone):
    """CSPDarknet and PAFPN: (N, 3, H, W) -> the maps "p3", "p4" and "p5" of strides 8, 16, 32."""

    def __init__(self, depth: float, width: float, act: str, depthwise: bool):
        super().__init__(depth, width, depthwise=depthwise, act=act)
        self._out_features = list(_STRIDES)
        self._out_feature_strides = dict(_STRIDES)
        self._out_feature_channels = {k: int(c * width) for k, c in _CHANNELS.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(_STRIDES, super().forward(images)))

    @property
    def size_divisibility(self) -> int:
        return max(_STRIDES.values())


class Head(YoloxHead):
    """The decoupled head. The library's class computes losses or boxes; this one stops before."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per level (N, C, H, W) -> (N, 4 + 1 + K, H, W): box, objectness and classes, raw."""
        return [self._level(i, x) for i, x in enumerate(features)]

    def _level(self, i: int, x: Tensor) -> Tensor:
        x = self.stems[i](x)
        classes, box = self.cls_convs[i](x), self.reg_convs[i](x)
        parts = self.reg_preds[i](box), self.obj_preds[i](box), self.cls_preds[i](classes)
        return torch.cat(parts, dim=1)

    def get_assignments(self, image: int, *args):
        """The library's SimOTA for one image, which also runs on predictions that are not finite.

        The library takes a cross entropy of scores. For NaN that is an error, and on CUDA it ends
        the process. Here the losses are then NaN, and the trainer says where NaN comes from.
        """
        rest, (classes, objectness, *mode) = args[:7], args[7:]
        logits = (x[image].detach().nan_to_num()[None] for x in (classes, objectness))
        return super().get_assignments(0, *rest, *logits, *mode)

    def _apply(self, *args, **kwargs):
        # The library keeps grids of cells by their size alone: on another device they would fail.
        self.grids = [torch.zeros(1)] * len(self.strides)
        return super()._apply(*args, **kwargs)


def build_network(
    depth: float,
    width: float,
    act: str,
    depthwise: bool,
    num_classes: int,
    in_features: Sequence[str],
    prior_prob: float,
) -> tuple[PAFPN, Head]:
    """Backbone and head with the initial weights of Megvii's training code.

    Args:
        depth, width: factors for the number of blocks and of channels.
        act: "silu", "relu" or "lrelu".
        depthwise: whether 3x3 convolutions are depthwise.
        in_features: the backbone's maps that the head takes.
        prior_prob: initial objectness, and initial score of each class.
    """
    backbone = PAFPN(depth, width, act, depthwise)
    head = Head(
        num_classes,
        width,
        strides=[_STRIDES[name] for name in in_features],
        in_channels=[_CHANNELS[name] for name in in_features],
        act=act,
        depthwise=depthwise,
    )
    for module in (*backbone.modules(), *head.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    head.initialize_biases(prior_prob)
    return backbone, head
