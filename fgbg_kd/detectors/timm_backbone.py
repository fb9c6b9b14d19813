"""timm's feature extractors as Detectron2 backbones, for light students and strong teachers."""

import difflib
import logging
import os
from collections.abc import Sequence

import numpy as np
import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.models import load_state_dict
from torch import Tensor, nn

from ..utils.errors import CheckpointError, ConfigError
from ..utils.safe_checkpoint import load_tensors

logger = logging.getLogger(__name__)

_STRIDES = {f"res{i}": 2**i for i in range(1, 7)}
# Unequal sizes, even and odd multiples of 32. If a map's size fits all, its stride is as claimed.
_PROBES = ((64, 160), (96, 128))


class TimmBackbone(Backbone):
    """Feature maps of a timm model under Detectron2's names: res2 has stride 4, res3 8, ..."""

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        weights: str = "",
        freeze_bn: bool = False,
        freeze_at: int = 0,
    ):
        """
        Args:
            name: a timm model that supports ``features_only``. A tag ("resnet18.tv_in1k") names its
                pretrained weights.
            out_features: names of the maps to return.
            weights: path of a state dict (.pth, .safetensors) with timm's names. It may hold more
                tensors (the classifier), but not fewer. "": random weights.
            freeze_bn: whether to freeze the statistics and affine parameters of the batch norms.
            freeze_at: 2 freezes all parameters and batch norms that the map res2 is computed from,
                3 those of res3, and so on. 0: none.

        Raises:
            ConfigError: there is no such model or map, a map's shape is not as timm claims, or
                ``freeze_at`` names no map.
            CheckpointError: the file does not fill the model, or it holds more than numbers.
        """
        super().__init__()
        if not out_features:
            raise ConfigError("MODEL.TIMM.OUT_FEATURES is empty: name at least one map.")
        index = _indices(name, out_features)
        self._out_features = sorted(out_features)
        self.body = _create(name, out_indices=[index[f] for f in self._out_features])
        channels = self.body.feature_info.channels()
        self._out_feature_strides = {f: _STRIDES[f] for f in self._out_features}
        self._out_feature_channels = dict(zip(self._out_features, channels))
        self._channels_last = _probe(self.body, name, list(self._out_feature_strides.values()))
        pretrained = self.body.pretrained_cfg
        # Normalisation for the model's pretrained weights, RGB in 0..255.
        self.pixel_mean, self.pixel_std = (
            [round(255 * v, 3) for v in pretrained[key]] for key in ("mean", "std")
        )
        if weights:
            _load(self.body, weights, name)
        if freeze_bn:
            self.body = freeze_batch_norm_2d(self.body)
        if freeze_at:
            _freeze(self.body, _parameters_of(f"res{freeze_at}", name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> per output (N, C, H / stride, W / stride), rounded up."""
        maps = self.body(x)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return dict(zip(self._out_features, maps))

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())


def _indices(
    name: str, out_features: Sequence[str], key: str = "MODEL.TIMM.OUT_FEATURES"
) -> dict[str, int]:
    """Index of each wanted map among the model's.

    Args:
        key: that names the maps, for the message.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        raise ConfigError(f"MODEL.TIMM.NAME: timm has no {name!r}. Similar names: {near}.")
    index = {stride: i for i, stride in enumerate(_create(name).feature_info.reduction())}
    absent = [f for f in out_features if _STRIDES.get(f) not in index]
    if absent:
        has = [f for f, stride in _STRIDES.items() if stride in index]
        raise ConfigError(f"{key}: timm's {name} has the maps {has}, not {absent}.")
    return {f: index[_STRIDES[f]] for f in out_features}


def _create(name: str, **options) -> nn.Module:
    """timm's extractor with random weights."""
    try:
        return timm.create_model(name, features_only=True, pretrained=False, **options)
    except Exception as error:  # timm raises several kinds
        raise ConfigError(
            f"MODEL.TIMM.NAME: timm's {name} gives no feature maps ({_said(error)}): choose "
            "another model."
        ) from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


@torch.no_grad()
def _probe(body: nn.Module, name: str, strides: list[int]) -> bool:
    """Checks stride, channels and layout of every map with two small inputs.

    Returns:
        Whether the maps are (N, H, W, C).

    Raises:
        ConfigError: a map's shape does not fit its stride and channels, or layouts differ.
    """
    device = next(body.parameters()).device
    was_training, layouts = body.training, set()
    body.eval()  # so that batch norms keep their statistics
    channels = body.feature_info.channels()
    for size in _PROBES:
        try:
            maps = body(torch.zeros(1, 3, *size, device=device))
        except Exception as error:  # for example a fixed input size
            raise ConfigError(
                f"MODEL.TIMM.NAME: timm's {name} does not take images of {size} pixels "
                f"({_said(error)}): choose a model without a fixed input size."
            ) from error
        for stride, c, found in zip(strides, channels, maps):
            expected = tuple(-(-n // stride) for n in size)
            first, last = (1, c, *expected), (1, *expected, c)
            shape = tuple(found.shape)
            if shape not in (first, last):
                raise ConfigError(
                    f"MODEL.TIMM.NAME: timm's {name} claims a map of stride {stride} with {c} "
                    f"channels, but an image of {size} gives {shape}: choose another model, or "
                    "leave this map out of MODEL.TIMM.OUT_FEATURES."
                )
            layouts.add(shape == last and shape != first)
    body.train(was_training)
    if len(layouts) > 1:
        raise ConfigError(f"MODEL.TIMM.NAME: maps of timm's {name} have different layouts.")
    return layouts.pop()


def _parameters_of(feature: str, name: str) -> set[str]:
    """Names of the parameters that a map is computed from: it has a gradient for them."""
    with torch.random.fork_rng(devices=[]):  # this second model changes no random number
        (index,) = _indices(name, [feature], "MODEL.TIMM.FREEZE_AT").values()
        body = _create(name, out_indices=[index])
        names, parameters = zip(*body.eval().named_parameters())
        (map_,) = body(torch.zeros(1, 3, *_PROBES[0]))
        found = torch.autograd.grad(map_.sum(), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, found) if gradient is not None}


def _freeze(body: nn.Module, names: set[str]) -> None:
    """Freezes parameters, and the statistics of batch norms whose parameters are among them."""
    for name, parameter in body.named_parameters():
        if name in names:
            parameter.requires_grad = False
    for name, module in list(body.named_modules()):
        own = {f"{name}.{x}" for x, _ in module.named_parameters(recurse=False)}
        if isinstance(module, (nn.BatchNorm2d, BatchNormAct2d)) and own and own <= names:
            body.set_submodule(name, freeze_batch_norm_2d(module))


def _load(body: nn.Module, path: str, name: str) -> None:
    """Loads a file. Names may be a timm model's ("blocks.0") or an extractor's ("blocks_0")."""
    if not os.path.isfile(path):
        raise CheckpointError(
            f"MODEL.TIMM.WEIGHTS: there is no file {path}. Create it with this command on a "
            f"machine with a network:\n"
            f"  python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
            f"pretrained=True).state_dict(), '{path}')\"\n"
            'If MODEL.WEIGHTS holds the whole detector, set MODEL.TIMM.WEIGHTS "" instead.'
        )
    saved = {k.replace(".", "_"): v for k, v in _read(path).items()}
    state = body.state_dict()
    missing = [
        k
        for k, v in state.items()
        if getattr(saved.get(k.replace(".", "_")), "shape", None) != v.shape
    ]
    if missing:
        raise CheckpointError(
            f"MODEL.TIMM.WEIGHTS: {path} lacks {len(missing)} of the {len(state)} tensors of "
            f"timm's {name}, such as {missing[:3]}: give a state dict of this model."
        )
    loaded = {k: saved[k.replace(".", "_")] for k in state}
    bad = [k for k, v in loaded.items() if not v.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"MODEL.TIMM.WEIGHTS: {len(bad)} tensors of {path} are not finite, such as {bad[:3]}: "
            "use another checkpoint."
        )
    body.load_state_dict(loaded)


def _read(path: str) -> dict[str, Tensor]:
    if not path.endswith(".safetensors"):
        return load_tensors(path, "MODEL.TIMM.WEIGHTS")
    try:
        return load_state_dict(path)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"MODEL.TIMM.WEIGHTS: {path} is damaged ({error}).") from error


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec | None = None) -> TimmBackbone:
    """The backbone alone, from MODEL.TIMM.*."""
    if input_shape is not None and input_shape.channels != 3:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} values, but timm's models take three "
            "channels: give three values."
        )
    # Detectron2's own key counts stages of its ResNet. Its default would freeze random weights.
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at != get_cfg().MODEL.BACKBONE.FREEZE_AT:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but timm's backbones do not read it: set "
            f"MODEL.TIMM.FREEZE_AT {freeze_at} and leave MODEL.BACKBONE.FREEZE_AT at its default "
            f"({get_cfg().MODEL.BACKBONE.FREEZE_AT})."
        )
    timm_cfg = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        timm_cfg.NAME,
        tuple(timm_cfg.OUT_FEATURES),
        timm_cfg.WEIGHTS,
        timm_cfg.FREEZE_BN,
        timm_cfg.FREEZE_AT,
    )
    if timm_cfg.WEIGHTS:
        _check_input(cfg, backbone)
    return backbone


def _check_input(cfg, backbone: TimmBackbone) -> None:
    """Warns if the input differs from the input that timm's pretrained weights expect.

    This is not an error, because weights from elsewhere may have been trained with this input.
    """
    mean, std = backbone.pixel_mean, backbone.pixel_std
    if (
        cfg.INPUT.FORMAT == "RGB"
        and np.allclose(cfg.MODEL.PIXEL_MEAN, mean, atol=0.5)
        and np.allclose(cfg.MODEL.PIXEL_STD, std, atol=0.5)
    ):
        return
    logger.warning(
        f"timm's weights of {cfg.MODEL.TIMM.NAME} need another input than this config gives "
        f"({cfg.INPUT.FORMAT}, mean {list(cfg.MODEL.PIXEL_MEAN)}, std {list(cfg.MODEL.PIXEL_STD)})."
        f" If {cfg.MODEL.TIMM.WEIGHTS} holds these weights, set\n"
        f"  INPUT: {{FORMAT: RGB}}\n  MODEL: {{PIXEL_MEAN: {mean}, PIXEL_STD: {std}}}"
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec | None = None) -> FPN:
    """Adds an FPN (MODEL.FPN.*) and a max-pooled last level, like build_resnet_fpn_backbone."""
    return _fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec | None = None) -> FPN:
    """Adds an FPN (MODEL.FPN.*), P6 and P7, like build_retinanet_resnet_fpn_backbone."""
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
