"""Detectors: the interface that distillation needs, and parts that Detectron2 lacks."""

from .dense import (
    DenseOutput,
    DenseView,
    DetectorView,
    FeatureLevel,
    joint_logits,
    register_view,
    view,
)
from .fcos import FCOS, build_fcos_resnet_fpn_backbone
from .retinanet_fcos import FCOSView, RetinaNetView  # registers both
from .ssd import SSD
from .ssd_view import SSDView  # registers it
from .timm_backbone import (
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from .yolo import YOLO, YOLOView
from .yolox import YOLOX, YOLOXView

__all__ = [
    "FCOS",
    "FCOSView",
    "RetinaNetView",
    "SSD",
    "SSDView",
    "YOLOX",
    "YOLOXView",
    "YOLO",
    "YOLOView",
    "DenseOutput",
    "DenseView",
    "DetectorView",
    "FeatureLevel",
    "build_fcos_resnet_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "joint_logits",
    "register_view",
    "view",
]
