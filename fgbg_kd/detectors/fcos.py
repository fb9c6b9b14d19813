"""FCOS for YAML configs. Detectron2 does not register its FCOS and has only a lazy config."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS as _FCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from torch import nn


@META_ARCH_REGISTRY.register()
class FCOS(_FCOS):
    """Detectron2's FCOS. It can also be built from MODEL.FCOS.*.

    It can also be trained on images without objects. It has the same checkpoints as Detectron2's
    class, because all tensors have the same names.
    """

    @configurable
    def __init__(self, *, input_format: str = "BGR", **kwargs):
        """
        Args:
            input_format: channel order of the images, "BGR" or "RGB".
            kwargs: arguments of Detectron2's FCOS.
        """
        super().__init__(**kwargs)
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg):
        fcos = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        shapes = [shapes[name] for name in fcos.IN_FEATURES]
        head = FCOSHead(
            input_shape=shapes,
            num_classes=fcos.NUM_CLASSES,
            conv_dims=[shapes[0].channels] * fcos.NUM_CONVS,
            prior_prob=fcos.PRIOR_PROB,
            norm=fcos.NORM,
        )
        nn.init.constant_(head.bbox_pred.bias, fcos.INITIAL_DISTANCE)
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def label_anchors(self, anchors, gt_instances):
        # Detectron2 v0.6 fails on an empty list of boxes, so such a list gets one empty box. It
        # contains no anchor. So all anchors are background, as in Detectron2's main branch.
        return super().label_anchors(anchors, [_at_least_one(x) for x in gt_instances])


def _at_least_one(gt: Instances) -> Instances:
    if len(gt) > 0:
        return gt
    boxes = gt.gt_boxes.tensor.new_zeros(1, 4)
    classes = torch.zeros(1, dtype=torch.long, device=boxes.device)
    return Instances(gt.image_size, gt_boxes=Boxes(boxes), gt_classes=classes)


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet and FPN. P6 and P7 are computed from P5; RetinaNet computes them from C5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
