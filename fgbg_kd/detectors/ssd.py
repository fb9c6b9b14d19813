"""SSD and SSDlite: torchvision's losses and detections with Detectron2's input and output.

Liu et al., "SSD: Single Shot MultiBox Detector", 2016. Sandler et al., "MobileNetV2", 2018, section
6.2 (SSDlite).

Shapes: N images, level l with (H_l, W_l) cells, A_l default boxes per cell, K classes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD as _SSD
from torchvision.models.detection.ssd import SSDHead, SSDScoringHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import box_iou

from ..utils.errors import ConfigError
from ..utils.processes import world_mean
from .dense import warped
from .pixels import check_colour, warn_of_defaults
from .ssd_backbones import norm_layer

HEADS = ("conv", "lite", "linear")


@META_ARCH_REGISTRY.register()
class SSD(_SSD):
    """torchvision's SSD as a Detectron2 model. Checkpoints have torchvision's tensor names.

    Each image is warped to a square of ``size`` pixels, whatever its shape. Boxes are scaled with
    it. The losses have Detectron2's names and are divided by the matched boxes of all processes.
    Hard negatives are selected within an image. So the losses do not depend on how the images of a
    batch are split over processes.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        size: int = 300,
        head: str = "conv",
        aspect_ratios: Sequence[Sequence[float]],
        scales: Sequence[float],
        steps: Sequence[int] = (),
        squares: Sequence[int] = (2, 2, 2, 2, 2, 2),
        clip_shapes: bool = True,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        **kwargs: Any,
    ):
        """
        Args:
            backbone: one of :mod:`fgbg_kd.detectors.ssd_backbones`.
            num_classes: K, without the background.
            size: height and width of the network's input in pixels.
            head: "conv": 3x3 convolutions (SSD). "lite": depthwise separable (SSDlite). "linear":
                1x1 (MobileNet-SSD).
            aspect_ratios, scales, steps, squares, clip_shapes: see :func:`default_boxes`.
            pixel_mean, pixel_std: for pixel values from 0 to 255, in ``input_format``.
            input_format: channel order of the images, "BGR" or "RGB".
            kwargs: score_thresh, nms_thresh, detections_per_img, iou_thresh, topk_candidates and
                positive_fraction of torchvision's SSD.

        Raises:
            ConfigError: the number of levels differs between backbone and default boxes, a step
                does not fit the backbone, or ``head`` is unknown.
        """
        check_colour("SSD", pixel_mean)
        channels = [shape.channels for shape in backbone.output_shape().values()]
        _check_levels(len(channels), ASPECT_RATIOS=aspect_ratios, SQUARES=squares, STEPS=steps)
        _check_scales(len(channels), scales)
        _check_steps(steps, size, backbone.grids)
        shapes = aspect_ratios, scales, steps, squares, clip_shapes
        boxes = default_boxes(size, backbone.grids, *shapes)
        anchors = [len(b) // (h * w) for b, (h, w) in zip(boxes, backbone.grids)]
        super().__init__(
            backbone,
            None,  # the default boxes are below: they are constant, because the size is fixed
            (size, size),
            num_classes + 1,
            head=_build_head(head, channels, anchors, num_classes + 1),
            **kwargs,
        )
        self.num_classes, self.size, self.input_format = num_classes, size, input_format
        # Number of classes, from the first one on, that are predicted. The others are background.
        self.kept_classes = num_classes
        self.boxes_per_level = [len(b) for b in boxes]
        self.register_buffer("default_boxes", torch.cat(boxes), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).reshape(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).reshape(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        ssd = cfg.MODEL.SSD
        warn_of_defaults(cfg, "SSD")
        return {
            "backbone": build_backbone(cfg),
            "num_classes": ssd.NUM_CLASSES,
            "size": ssd.SIZE,
            "head": ssd.HEAD,
            "aspect_ratios": ssd.ASPECT_RATIOS,
            "scales": ssd.SCALES,
            "steps": ssd.STEPS,
            "squares": ssd.SQUARES,
            "clip_shapes": ssd.CLIP_SHAPES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "score_thresh": ssd.SCORE_THRESH_TEST,
            "nms_thresh": ssd.NMS_THRESH_TEST,
            "topk_candidates": ssd.TOPK_CANDIDATES_TEST,
            "detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
            "iou_thresh": ssd.IOU_THRESHOLD,
            "positive_fraction": ssd.POSITIVE_FRACTION,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Detectron2's model interface: a dict of losses in training, detections in inference."""
        seen = self.warped(batched_inputs)
        images = self.preprocess_image(seen)
        raw = self.predict(list(self.backbone(images.tensor).values()))
        if self.training:
            return self.losses(raw, [x["instances"].to(self.device) for x in seen])
        flat = self.flat(raw)
        flat["cls_logits"] = self._kept(flat["cls_logits"])
        found = self.postprocess_detections(
            flat, [self.default_boxes] * len(images), images.image_sizes
        )
        return [{"instances": self._instances(*x)} for x in zip(found, batched_inputs)]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Detectron2's inputs -> a normalised batch (N, 3, size, size)."""
        pixels = torch.stack([x["image"].to(self.device) for x in self.warped(batched_inputs)])
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        return ImageList(pixels, [(self.size, self.size)] * len(pixels))

    def warped(self, batched_inputs: list[dict]) -> list[dict]:
        """Detectron2's inputs with images and boxes warped to the size of the network's input."""
        size = self.size, self.size
        return [
            _warped(x, size, self.device) if x["image"].shape[1:] != size else x
            for x in batched_inputs
        ]

    def predict(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C, H_l, W_l) -> class logits (N, A_l*(K+1), H_l, W_l) with the background first,
        and box deltas (N, A_l*4, H_l, W_l)."""
        heads = self.head.classification_head.module_list, self.head.regression_head.module_list
        classes, deltas = ([conv(x) for conv, x in zip(h, features)] for h in heads)
        return classes, deltas

    def flat(self, raw: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
        """The result of :meth:`predict` with all levels in one tensor, as torchvision has it."""
        columns = {"cls_logits": self.num_classes + 1, "bbox_regression": 4}
        return {
            name: torch.cat([permute_to_N_HWA_K(x, number) for x in maps], dim=1)
            for (name, number), maps in zip(columns.items(), raw)
        }

    def _kept(self, logits: Tensor) -> Tensor:
        """(..., K + 1), the background first -> (..., kept classes + 1), with the same scores."""
        if self.kept_classes == self.num_classes:
            return logits
        end = 1 + self.kept_classes
        others = torch.cat([logits[..., :1], logits[..., end:]], dim=-1)
        return torch.cat([others.logsumexp(-1, keepdim=True), logits[..., 1:end]], dim=-1)

    def losses(self, raw: tuple[list[Tensor], list[Tensor]], gt: list[Instances]) -> dict:
        """
        Args:
            raw: the result of :meth:`predict`.
            gt: N Instances in pixels of the network's input, as from :meth:`warped`.

        Returns:
            "loss_cls", "loss_box_reg".
        """
        targets = [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes + 1} for x in gt]
        boxes = self.default_boxes
        matched = [self._match(t["boxes"]) for t in targets]
        found = self.compute_loss(targets, self.flat(raw), [boxes] * len(gt), matched)
        # torchvision divides by the matched boxes of this process, at least 1. Here each process
        # divides by the mean of these numbers; their sum over all processes is at least 1.
        count = sum((m >= 0).sum() for m in matched).to(boxes.dtype)
        self.loss_normalizer = world_mean(count).clamp(min=1 / comm.get_world_size())
        share = count.clamp(min=1) / self.loss_normalizer
        return {
            "loss_cls": share * found["classification"],
            "loss_box_reg": share * found["bbox_regression"],
        }

    def _match(self, gt_boxes: Tensor) -> Tensor:
        """(B, 4) -> index of the matched box for each default box; -1: background."""
        if len(gt_boxes) == 0:
            return torch.full((len(self.default_boxes),), -1, device=gt_boxes.device)
        return self.proposal_matcher(box_iou(gt_boxes, self.default_boxes))

    def _instances(self, found: dict[str, Tensor], inputs: dict) -> Instances:
        instances = Instances((self.size, self.size))
        instances.pred_boxes, instances.scores = Boxes(found["boxes"]), found["scores"]
        instances.pred_classes = found["labels"] - 1
        height, width = inputs["image"].shape[1:]
        return detector_postprocess(
            instances, inputs.get("height", height), inputs.get("width", width)
        )

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's COCO checkpoints for K = 80: they have a logit for each of COCO's ids up to
        90, of which 80 are in use."""
        if self.num_classes != 80:
            return state
        keep = [0, *(c["id"] for c in COCO_CATEGORIES if c["isthing"])]
        own = self.state_dict()
        state = dict(state)
        for name, value in state.items():
            if not name.startswith("head.classification_head.") or value.dim() == 0:
                continue
            if len(value) * 81 == len(own.get(name, ())) * 91:
                state[name] = value.unflatten(0, (-1, 91))[:, keep].flatten(0, 1)
        return state


def default_boxes(
    size: int,
    grids: Sequence[tuple[int, int]],
    aspect_ratios: Sequence[Sequence[float]],
    scales: Sequence[float],
    steps: Sequence[int] = (),
    squares: Sequence[int] = (2, 2, 2, 2, 2, 2),
    clip_shapes: bool = True,
) -> list[Tensor]:
    """The default boxes of Liu et al. 2016, section 2.2, equal to torchvision's bit for bit.

    Args:
        size: of the input in pixels.
        grids: (H_l, W_l) of each level.
        aspect_ratios: per level; each ratio r gives two boxes, r and 1 / r.
        scales: side of a level's square box as a share of ``size``; one more for the last level.
        steps: distance of cells in pixels per level; (): ``size / W_l``.
        squares: number of squares per level; the second one has the scale sqrt(s_l s_l+1).
        clip_shapes: whether widths and heights are at most ``size``.

    Returns:
        Per level (H_l * W_l * A_l, 4), XYXY in pixels, in the order of cells, then boxes.
    """
    found = []
    for level, (height, width) in enumerate(grids):
        scale, following = scales[level : level + 2]
        sides = [[scale, scale], [math.sqrt(scale * following)] * 2][: squares[level]]
        for ratio in aspect_ratios[level]:
            w, h = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sides += [[w, h], [h, w]]
        shape = torch.tensor(sides)  # (A, 2)
        if clip_shapes:
            shape = shape.clamp(max=1)
        cells = (size / steps[level],) * 2 if steps else (height, width)
        y, x = ((torch.arange(n) + 0.5) / c for n, c in zip((height, width), cells))
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        boxes = torch.cat([centre - 0.5 * shape, centre + 0.5 * shape], dim=-1) * size
        found.append(boxes.reshape(-1, 4))
    return found


def _warped(inputs: dict, size: tuple[int, int], device: torch.device) -> dict:
    image = warped(inputs["image"][None].to(device).float(), size)[0]
    new = {**inputs, "image": image}
    if "instances" in inputs:
        (height, width), (old_height, old_width) = size, inputs["image"].shape[1:]
        new["instances"] = Instances(size, **inputs["instances"].get_fields())
        boxes = new["instances"].gt_boxes = new["instances"].gt_boxes.clone()
        boxes.scale(width / old_width, height / old_height)
    return new


def _build_head(kind: str, channels: list[int], anchors: list[int], outputs: int) -> nn.Module:
    if kind == "conv":
        return SSDHead(channels, anchors, outputs)
    if kind == "lite":
        return SSDLiteHead(channels, anchors, outputs, norm_layer)
    if kind == "linear":
        return _LinearHead(channels, anchors, outputs)
    raise ConfigError(f"MODEL.SSD.HEAD is {kind!r}: choose from {HEADS}.")


class _LinearHead(nn.Module):
    """1x1 convolutions, with the names of torchvision's heads."""

    def __init__(self, channels: list[int], anchors: list[int], outputs: int):
        super().__init__()
        heads = [
            SSDScoringHead(
                nn.ModuleList([nn.Conv2d(c, a * n, 1) for c, a in zip(channels, anchors)]), n
            )
            for n in (outputs, 4)
        ]
        self.classification_head, self.regression_head = heads


def _check_levels(number: int, **lists: Sequence) -> None:
    for key, values in lists.items():
        if len(values) != number and not (key == "STEPS" and len(values) == 0):
            raise ConfigError(
                f"MODEL.SSD.{key} has {len(values)} values, but the backbone has {number} maps: "
                "give one value for each map."
            )


def _check_scales(number: int, scales: Sequence[float]) -> None:
    if len(scales) != number + 1:
        raise ConfigError(
            f"MODEL.SSD.SCALES has {len(scales)} values, but the backbone has {number} maps: give "
            "one value for each map, and one more."
        )


def _check_steps(steps: Sequence[int], size: int, grids: Sequence[tuple[int, int]]) -> None:
    """Refuses steps that are made for another backbone or size.

    Their default boxes would cover only a corner of the image, or lie outside it. The paper's steps
    for SSD300 differ from the exact distances by at most 7 %.
    """
    for level, (step, (_, width)) in enumerate(zip(steps, grids)):
        if abs(step * width / size - 1) > 0.3:
            raise ConfigError(
                f"MODEL.SSD.STEPS[{level}] is {step}, but this backbone has a map of {width} cells "
                f"for {size} pixels, so its cells are {size / width:.0f} pixels apart: set "
                "MODEL.SSD.STEPS: []."
            )
