"""YOLOX as a meta-architecture of Detectron2, for students and for teachers.

Ge, Liu, Wang, Li, Sun: "YOLOX: Exceeding YOLO Series in 2021" (arXiv 2107.08430). The network and
the losses are those of the package pixeltable-yolox (Apache-2.0), Megvii's code as a library. It is
optional, and it is imported when the first YOLOX is built.

Shapes: N images, level l with (H_l, W_l) cells, K classes, one anchor per cell. ``raw`` of a level
is (N, 4 + 1 + K, H_l, W_l): box, objectness and classes, before their activations.
"""

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from ..utils.errors import ConfigError
from ..utils.processes import world_mean
from .dense import DenseOutput, DenseView, Maps, full_precision, joint_logits, register_view
from .pixels import check_colour, warn_of_pixels
from .selection import detections

_ACTIVATIONS = ("silu", "relu", "lrelu")
# Largest logarithm of a detected box's sides, in cells. Without a limit, batch norms of the first
# iterations can give infinite boxes, which Detectron2 refuses.
_LARGEST = math.log(1e4)


@META_ARCH_REGISTRY.register()
class YOLOX(DenseDetector):
    """YOLOX from MODEL.YOLOX.*. Megvii's ``yolox_*.pth`` files fill it.

    Its input is BGR in 0..255. Batches are padded at the right and at the bottom with a grey.
    In training it returns loss_iou (which the library weights with 5), loss_obj, loss_cls and, with
    ``use_l1``, loss_l1.
    """

    @configurable
    def __init__(
        self,
        *,
        depth: float = 0.33,
        width: float = 0.5,
        act: str = "silu",
        depthwise: bool = False,
        num_classes: int = 80,
        in_features: Sequence[str] = ("p3", "p4", "p5"),
        prior_prob: float = 0.01,
        use_l1: bool = False,
        pad_value: float = 114.0,
        score_thresh_test: float = 0.01,
        nms_thresh_test: float = 0.65,
        topk_candidates_test: int = 1000,
        one_class_per_box: bool = True,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        input_format: str = "BGR",
    ):
        """
        Args:
            max_detections_per_image: largest number of detections.
            pixel_mean, pixel_std: three values each, for pixels in 0..255.
            input_format: channel order of the images, "BGR" or "RGB".

        The other arguments are the keys of MODEL.YOLOX in lower case (config.py).

        Raises:
            ConfigError: the package is not installed, or a value is not valid.
        """
        if act not in _ACTIVATIONS:
            raise ConfigError(f"MODEL.YOLOX.ACT is {act!r}: choose from {_ACTIVATIONS}.")
        check_colour("YOLOX", pixel_mean)
        backbone, head = _network_builder()(
            depth, width, act, depthwise, num_classes, in_features, prior_prob
        )
        head.use_l1 = use_l1
        mean, std = ([float(v) for v in values] for values in (pixel_mean, pixel_std))
        super().__init__(backbone, head, list(in_features), pixel_mean=mean, pixel_std=std)
        self.num_classes, self.pad_value, self.input_format = num_classes, pad_value, input_format
        self.test_score_thresh, self.test_nms_thresh = score_thresh_test, nms_thresh_test
        self.test_topk_candidates, self.one_class_per_box = topk_candidates_test, one_class_per_box
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg):
        warn_of_pixels(cfg, "Megvii's YOLOX", [0.0] * 3, [1.0] * 3, "BGR")
        return {
            **{key.lower(): value for key, value in cfg.MODEL.YOLOX.items()},
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility, self.pad_value)

    def forward_training(
        self, images: ImageList, features: Maps, predictions: Maps, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses of the library, with the number of positive cells of all processes.

        The library divides by the number of its own process. DistributedDataParallel averages
        gradients, so here each process divides by the mean of these numbers.
        """
        raw = [full_precision(x) for x in predictions]
        labels = _labels(gt_instances, raw[0].dtype)
        with torch.autocast(raw[0].device.type, enabled=False):
            found = self._library_losses(images.tensor, raw, labels)
        _, iou, objectness, classes, l1, ratio = found
        # The library returns its divisor, which is at least 1, per box that it counts. Without a
        # positive cell both losses of positive cells are 0.
        boxes = (labels.sum(dim=2) > 0).sum().clamp(min=1)
        divisor = (ratio * boxes).round()
        positive = torch.where(iou + classes > 0, divisor, 0)
        # At least 1 over all processes, as in the library.
        self.loss_normalizer = world_mean(positive).clamp(min=1 / comm.get_world_size())
        losses = {"loss_iou": iou, "loss_obj": objectness, "loss_cls": classes}
        if self.head.use_l1:
            losses["loss_l1"] = l1
        scale = divisor / self.loss_normalizer
        return {name: scale * loss for name, loss in losses.items()}

    def _library_losses(self, images: Tensor, raw: Maps, labels: Tensor) -> tuple:
        """YoloxHead.get_losses, with its arguments computed as in YoloxHead.forward."""
        outputs, columns, rows, strides, boxes = [], [], [], [], []
        for i, (x, stride) in enumerate(zip(raw, self.head.strides)):
            # The library writes into its argument.
            output, grid = self.head.get_output_and_grid(x.clone(), i, stride, x.type())
            outputs.append(output)  # (N, H*W, 5 + K), boxes decoded
            columns.append(grid[:, :, 0])  # (1, H*W)
            rows.append(grid[:, :, 1])
            strides.append(torch.full_like(columns[-1], stride))
            boxes.append(x[:, :4].flatten(2).transpose(1, 2))  # (N, H*W, 4), for the L1 loss
        outputs = torch.cat(outputs, dim=1)
        return self.head.get_losses(
            images, columns, rows, strides, labels, outputs, boxes, outputs.dtype
        )

    def boxes(self, raw: Maps) -> Maps:
        """Per level (N, 4, H, W), XYXY in pixels."""
        return [_decoded(full_precision(x), stride) for x, stride in zip(raw, self.head.strides)]

    def scores(self, raw: Maps) -> Maps:
        """Per level (N, K, H, W), objectness times class.

        With ``one_class_per_box``, the scores of all classes but a cell's best one are 0.
        """
        return [self._scores(full_precision(x)) for x in raw]

    def _scores(self, raw: Tensor) -> Tensor:
        classes = raw[:, 5:].sigmoid()
        scores = raw[:, 4:5].sigmoid() * classes
        if self.one_class_per_box:
            number = torch.arange(self.num_classes, device=raw.device)[:, None, None]
            scores = scores * (classes.argmax(dim=1, keepdim=True) == number)
        return scores

    def forward_inference(
        self, images: ImageList, features: Maps, predictions: Maps
    ) -> list[Instances]:
        boxes, scores = (
            [x.flatten(2).transpose(1, 2) for x in maps]  # (N, H*W, 4), (N, H*W, K)
            for maps in (self.boxes(predictions), self.scores(predictions))
        )
        return detections(self, boxes, scores, images.image_sizes)


def _network_builder() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """The function that builds backbone and head.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from .yolox_network import build_network
    except ImportError as error:
        # The requirements of pixeltable-yolox would overwrite the installed OpenCV.
        raise ConfigError(
            f"YOLOX needs the package pixeltable-yolox ({error}). Install it: make yolox, or "
            "pip install -e '.[yolox]' and then pip install --no-deps pixeltable-yolox==0.4.3"
        ) from error
    return build_network


def _labels(gt_instances: list[Instances], dtype: torch.dtype) -> Tensor:
    """The library's ground truth, (N, B, 5): class, centre and size; 0 where an image has fewer."""
    boxes = [box_convert(x.gt_boxes.tensor, "xyxy", "cxcywh") for x in gt_instances]
    rows = [torch.cat([x.gt_classes[:, None], b], dim=1) for x, b in zip(gt_instances, boxes)]
    return pad_sequence([x.to(dtype) for x in rows], batch_first=True)


def _decoded(raw: Tensor, stride: int) -> Tensor:
    """(N, 5 + K, H, W) -> (N, 4, H, W), XYXY in pixels. A cell starts at its upper left corner."""
    rows, columns = (torch.arange(n, device=raw.device) for n in raw.shape[2:])
    x, y = raw[:, 0] + columns, raw[:, 1] + rows[:, None]
    width, height = (raw[:, 2:4].clamp(max=_LARGEST).exp() / 2).unbind(1)
    return stride * torch.stack([x - width, y - height, x + width, y + height], dim=1)


@register_view(YOLOX)
class YOLOXView(DenseView):
    """View of :class:`YOLOX`. The logit of a class is that of objectness times class score."""

    bottom_up = "backbone"

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.pad_value = detector.pad_value

    @property
    def cell_anchors(self) -> list[Tensor]:
        unit = torch.tensor([[-0.5, -0.5, 0.5, 0.5]])
        return [stride * unit for stride in self.detector.head.strides]

    def logits(self, raw: Maps) -> Maps:
        return [joint_logits(x[:, 4:5], x[:, 5:]) for x in raw]

    def decode(self, features: Maps, raw: Maps) -> Maps:
        return self.detector.boxes(raw)

    def scores(self, raw: Maps) -> Maps:
        return self.detector.scores(raw)

    def named_predictions(self, output: DenseOutput) -> dict[str, Maps]:
        parts = {
            "box deltas": slice(0, 4),
            "objectness": slice(4, 5),
            "class logits": slice(5, None),
        }
        return {name: [x[:, part] for x in output.raw] for name, part in parts.items()}

    def keep_classes(self, keep: list[int]) -> None:
        head = self.detector.head
        for conv in head.cls_preds:
            for name in ("weight", "bias"):
                kept = getattr(conv, name).detach()[keep]
                setattr(conv, name, nn.Parameter(kept, requires_grad=False))
            conv.out_channels = len(keep)
        self.detector.num_classes = head.num_classes = len(keep)
