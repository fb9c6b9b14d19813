"""timm's feature extractors as Detectron2 backbones, for light students and strong teachers."""

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from timm.layers import freeze_batch_norm_2d
from torch import Tensor


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
            name: a timm model that supports ``features_only``.
            out_features: names of the maps to return.
            weights: path of a state dict in the names of the timm model; it may hold more (the
                classifier), not less. "" = random weights.
            freeze_bn: fix statistics and affine parameters of the batch norms.

        Raises:
            ValueError: the model has no such map, or the file not all of its weights.
        """
        super().__init__()
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
    saved = torch.load(path, map_location="cpu", weights_only=True)
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
    return TimmBackbone(
        timm_cfg.NAME, tuple(timm_cfg.OUT_FEATURES), timm_cfg.WEIGHTS, timm_cfg.FREEZE_BN
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
