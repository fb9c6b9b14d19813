"""Small detectors and images for the tests of deployment."""

import numpy as np
import torch
from conftest import tiny_cfg, tiny_fcos_cfg
from detectron2.modeling import build_model

from fgbg_kd import deploy


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detector(cfg) -> torch.nn.Module:
    """Its predictions differ in score, so that NMS and limits have an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        fcos = hasattr(model.head, "ctrness")  # lower scores: square roots of products
        grey = len(cfg.MODEL.PIXEL_MEAN) == 1  # a plain ResNet's features are smaller
        std = 0.3 if fcos else 2.0 if grey else 0.1
        torch.nn.init.normal_(model.head.cls_score.weight, std=std)
        torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.03)
    return model


def grey_cfg():
    """A detector of images with one channel; timm's backbones take three."""
    cfg = tiny_cfg()
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "L", [110.0], [60.0]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    return cfg


def variant(name: str):
    """A detector and its description."""
    if name == "grey":
        cfg = grey_cfg()
    else:
        cfg = tiny_fcos_cfg() if name == "FCOS" else tiny_cfg()
        cfg.INPUT.FORMAT = "RGB"
    if name == "BGR":
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "BGR", [10.0, 100.0, 200.0]
    if name == "crowded":  # more candidates per level, and more detections, than the limits
        cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 100
        cfg.TEST.DETECTIONS_PER_IMAGE = 20
        cfg.MODEL.RETINANET.NMS_THRESH_TEST = 0.8
    model = detector(cfg)
    return model, deploy.describe(cfg, model)


def from_function(run, about) -> deploy.ExportedDetector:
    """An exported detector without a file."""
    exported = deploy.ExportedDetector.__new__(deploy.ExportedDetector)
    exported.run, exported.about = run, about
    return exported
