"""Detector parts that Detectron2 lacks."""

from .timm_backbone import (
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)

__all__ = [
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
