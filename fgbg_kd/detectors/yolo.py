"""YOLOv3 and YOLOv4, with their tiny variants: the detector and its view for distillation."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from .darknet import Darknet, DarknetHead
from .darknet_cfg import read_cfg, set_anchors
from .darknet_weights import read_weights
from .dense import DenseOutput, DenseView, FeatureLevel, Maps, joint_logits, register_view
from .pixels import check_colour, warn_of_pixels
from .selection import detections
from .yolo_loss import decode_boxes, per_anchor, yolo_losses

# Darknet fills the rest of its square input with this grey. Its pixels are in 0..1.
_GREY = 0.5


@META_ARCH_REGISTRY.register()
class YOLO(DenseDetector):
    """A network of Darknet with YOLOv3's or YOLOv4's losses, for training and inference.

    Its losses are those of :func:`~fgbg_kd.detectors.yolo_loss.yolo_losses`. Its checkpoints can be
    Detectron2's, or Darknet's .weights files.
    """

    @configurable
    def __init__(
        self,
        *,
        network: str = "yolov3",
        anchors: Sequence[Sequence[float]] = (),
        num_classes: int = 80,
        width: float = 1.0,
        norm: str = "BN",
        prior_prob: float = 0.01,
        iou_weight: float = 2.5,
        test_score_thresh: float = 0.005,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (255.0, 255.0, 255.0),
        input_format: str = "RGB",
    ):
        """
        Args:
            network: see :func:`~fgbg_kd.detectors.darknet_cfg.read_cfg`.
            anchors: see :func:`~fgbg_kd.detectors.darknet_cfg.set_anchors`. Empty: those of the
                .cfg file.
            num_classes, width, norm: see :class:`~fgbg_kd.detectors.darknet.Darknet`.
            prior_prob: initial objectness.
            iou_weight: scales YOLOv4's loss of boxes.
            test_score_thresh: detections with a lower product of objectness and class score are
                left out.
            test_topk_candidates: number of predictions per level that enter NMS.
            test_nms_thresh: IoU of NMS.
            max_detections_per_image: largest number of detections.
            pixel_mean, pixel_std: of pixels in 0..255.
            input_format: "RGB" or "BGR".

        Raises:
            ConfigError: the network is unknown or has a layer that is not supported.
        """
        check_colour("YOLO", pixel_mean)
        layers = read_cfg(network)
        if anchors:
            set_anchors(layers, anchors)
        backbone = Darknet(layers, num_classes, width, norm)
        super().__init__(
            backbone,
            DarknetHead(backbone),
            list(backbone.outputs),
            pixel_mean=[float(x) for x in pixel_mean],
            pixel_std=[float(x) for x in pixel_std],
        )
        self.num_classes, self.iou_weight, self.input_format = num_classes, iou_weight, input_format
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image
        for conv in self.head.classifiers():
            bias = conv.bias.detach().view(-1, 5 + num_classes)
            bias[:, 4] = -math.log((1 - prior_prob) / prior_prob)

    @classmethod
    def from_config(cls, cfg):
        yolo = cfg.MODEL.YOLO
        warn_of_pixels(cfg, "Darknet's", [0.0] * 3, [255.0] * 3, "RGB")
        return {
            "network": yolo.CFG,
            "anchors": yolo.ANCHORS,
            "num_classes": yolo.NUM_CLASSES,
            "width": yolo.WIDTH,
            "norm": yolo.NORM,
            "prior_prob": yolo.PRIOR_PROB,
            "iou_weight": yolo.IOU_WEIGHT,
            "test_score_thresh": yolo.SCORE_THRESH_TEST,
            "test_topk_candidates": yolo.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": yolo.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility, pad_value=_GREY)

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, Tensor]:
        # DistributedDataParallel averages over processes, and Detectron2 gives each process the
        # same number of images. So the gradient is that of the mean over all images.
        self.loss_normalizer = float(len(gt_instances))
        return yolo_losses(
            predictions,
            list(self.backbone.outputs.values()),
            [x.gt_boxes.tensor for x in gt_instances],
            [x.gt_classes for x in gt_instances],
            images.image_sizes,
            self.iou_weight,
        )

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        of = YOLOView(self)
        scores = [permute_to_N_HWA_K(x, self.num_classes) for x in of.scores(predictions)]
        boxes = [permute_to_N_HWA_K(x, 4) for x in of.decode(features, predictions)]
        return detections(self, boxes, scores, images.image_sizes)

    def read_darknet(self, path: str) -> dict[str, Tensor]:
        """The tensors of a .weights file, for a checkpointer."""
        return read_weights(path, self)


@register_view(YOLO)
class YOLOView(DenseView):
    """View of a YOLO. The score of a class is objectness times the class's own score."""

    pad_value = _GREY

    @property
    def levels(self) -> list[FeatureLevel]:
        shapes = self.detector.backbone.output_shape()
        return [FeatureLevel(n, s.stride, s.channels) for n, s in shapes.items()]

    @property
    def cell_anchors(self) -> list[Tensor]:
        sizes = [torch.tensor(layer.own_anchors) / 2 for layer in self._layers]
        return [torch.cat([-size, size], dim=1) for size in sizes]

    @property
    def _layers(self) -> list:
        return list(self.detector.backbone.outputs.values())

    def logits(self, raw: Maps) -> Maps:
        parts = [per_anchor(x, layer) for x, layer in zip(raw, self._layers)]  # (N, A, 5 + K, H, W)
        return [joint_logits(x[:, :, 4:5], x[:, :, 5:]).flatten(1, 2) for x in parts]

    def decode(self, features: Maps, raw: Maps) -> Maps:
        pairs = zip(raw, self._layers)
        return [decode_boxes(per_anchor(x, layer), layer).flatten(1, 2) for x, layer in pairs]

    def named_predictions(self, output: DenseOutput) -> dict[str, Maps]:
        parts = [per_anchor(x, layer) for x, layer in zip(output.raw, self._layers)]
        return {
            "box predictions": [x[:, :, :4] for x in parts],
            "objectness": [x[:, :, 4] for x in parts],
            "class logits": [x[:, :, 5:] for x in parts],
        }

    def keep_classes(self, keep: list[int]) -> None:
        kept = [*range(5), *(5 + k for k in keep)]
        for conv in self.detector.head.classifiers():
            for name in ("weight", "bias"):
                per_anchor = getattr(conv, name).detach().unflatten(0, (-1, 5 + self.num_classes))
                part = per_anchor[:, kept].flatten(0, 1)
                setattr(conv, name, nn.Parameter(part, requires_grad=False))
            conv.out_channels = len(conv.weight)
        self.detector.num_classes = len(keep)
