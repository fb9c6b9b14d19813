"""Detector parts that Detectron2 lacks."""

from .fcos import FCOS, build_fcos_resnet_fpn_backbone
from .timm_backbone import (
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)

__all__ = [
    "FCOS",
    "build_fcos_resnet_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
