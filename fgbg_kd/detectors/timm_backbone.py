"""timm's feature extractors as Detectron2 backbones, for light students and strong teachers."""

import difflib
import logging
import os

import numpy as np
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from timm.layers import freeze_batch_norm_2d
from timm.models import load_state_dict
from torch import Tensor

logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """A timm model's feature maps, under Detectron2's names: res2 has stride 4, res3 8, ..."""

    def __init__(
        self,
        name: str,
        out_features: tuple[str, ...] = ("res3", "res4", "res5"),
        weights: str = "",
        freeze_bn: bool = False,
    ):
        """
        Args:
            name: a timm model that supports ``features_only``; with a tag ("resnet18.tv_in1k")
                it says which weights, too.
            out_features: names of the maps to return.
            weights: path of a state dict (.pth, .safetensors) in the names of the timm model; it
                may hold more (the classifier), not less. "" = random weights.
            freeze_bn: fix statistics and affine parameters of the batch norms.

        Raises:
            ValueError: no such model, no such map of it, or not all of its weights in the file.
        """
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models())
            raise ValueError(f"MODEL.TIMM.NAME: timm has no {name!r}. Near it: {near}.")
        strides = {f"res{i}": 2**i for i in range(1, 7)}
        info = timm.create_model(name, features_only=True, pretrained=False).feature_info
        index = {r: i for i, r in enumerate(info.reduction())}
        absent = [f for f in out_features if strides.get(f) not in index]
        if absent:
            has = [f for f, s in strides.items() if s in index]
            raise ValueError(f"MODEL.TIMM.OUT_FEATURES: {name} has {has}, not {absent}.")
        out_features = sorted(out_features)
        self.body = timm.create_model(
            name,
            features_only=True,
            pretrained=False,
            out_indices=[index[strides[f]] for f in out_features],
        )
        pretrained = self.body.pretrained_cfg
        # What ImageNet weights of this name take, RGB in 0..255.
        self.pixel_mean, self.pixel_std = (
            [round(255 * v, 3) for v in pretrained[key]] for key in ("mean", "std")
        )
        if weights:
            _load(self.body, weights, name)
        if freeze_bn:
            self.body = freeze_batch_norm_2d(self.body)
        channels = self.body.feature_info.channels()
        self._out_features = list(out_features)
        self._out_feature_strides = {f: strides[f] for f in out_features}
        self._out_feature_channels = dict(zip(out_features, channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> per output (N, C, H / stride, W / stride), rounded up."""
        return dict(zip(self._out_features, self.body(x)))

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())


def _load(body: torch.nn.Module, path: str, name: str) -> None:
    """timm's feature extractors flatten some names ("blocks.0" to "blocks_0"): both are taken."""
    if not os.path.isfile(path):
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS: no file {path}. Where there is a network, this makes it:\n"
            f"  python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
            f"pretrained=True).state_dict(), '{path}')\"\n"
            'Where MODEL.WEIGHTS holds the whole detector, set MODEL.TIMM.WEIGHTS "".'
        )
    saved = load_state_dict(path, weights_only=True)
    saved = {k.replace(".", "_"): v for k, v in saved.items()}
    state = body.state_dict()
    missing = [
        k
        for k, v in state.items()
        if getattr(saved.get(k.replace(".", "_")), "shape", None) != v.shape
    ]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(state)} tensors of timm's {name}, such as "
            f"{missing[:3]}: it is not that model's state dict."
        )
    body.load_state_dict({k: saved[k.replace(".", "_")] for k in state})


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec | None = None) -> TimmBackbone:
    """The backbone alone, from MODEL.TIMM.*."""
    if input_shape is not None and input_shape.channels != 3:
        raise ValueError(f"MODEL.PIXEL_MEAN has {input_shape.channels} values: timm takes 3.")
    timm_cfg = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        timm_cfg.NAME, tuple(timm_cfg.OUT_FEATURES), timm_cfg.WEIGHTS, timm_cfg.FREEZE_BN
    )
    if timm_cfg.WEIGHTS:
        _check_input(cfg, backbone)
    return backbone


def _check_input(cfg, backbone: TimmBackbone) -> None:
    """Warns of pretrained weights that see other pixels than they were trained on.

    No error: weights of another origin may have been trained on these.
    """
    mean, std = backbone.pixel_mean, backbone.pixel_std
    if (
        cfg.INPUT.FORMAT == "RGB"
        and np.allclose(cfg.MODEL.PIXEL_MEAN, mean, atol=0.5)
        and np.allclose(cfg.MODEL.PIXEL_STD, std, atol=0.5)
    ):
        return
    logger.warning(
        f"timm's weights of {cfg.MODEL.TIMM.NAME} want other input than this config gives "
        f"({cfg.INPUT.FORMAT}, mean {list(cfg.MODEL.PIXEL_MEAN)}, std {list(cfg.MODEL.PIXEL_STD)})."
        f" If {cfg.MODEL.TIMM.WEIGHTS} holds those, set\n"
        f"  INPUT: {{FORMAT: RGB}}\n  MODEL: {{PIXEL_MEAN: {mean}, PIXEL_STD: {std}}}"
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec | None = None) -> FPN:
    """With an FPN of MODEL.FPN.* and a max-pooled last level, as build_resnet_fpn_backbone."""
    return _fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec | None = None) -> FPN:
    """With an FPN of MODEL.FPN.* and P6, P7, as build_retinanet_resnet_fpn_backbone."""
    bottom_up = build_timm_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _fpn(cfg, bottom_up: Backbone, top_block) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
