"""The interface to detectors, and the registry of the one-stage detectors that are known.

Other code uses a :class:`DetectorView`, not the detector's own attributes. A new one-stage detector
needs one subclass of :class:`DenseView` (docs/extending.md).

Shapes: N images, level l with (H_l, W_l) cells, C channels, K classes, A_l anchors per cell.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.common import accumulation_dtype
from ..utils.errors import DetectorError

Maps = Sequence[Tensor]  # one per level


class FeatureLevel(NamedTuple):
    """A feature map of a detector: its name, stride in pixels and number of channels."""

    name: str
    stride: int
    channels: int


class DenseOutput(NamedTuple):
    """What a detector computes for a batch, per level.

    Attributes:
        features: (N, C_l, H_l, W_l).
        logits: (N, A_l*K, H_l, W_l); sigmoid(logits) is the class score. None: not computed.
        raw: the head's own output, which only its :class:`DenseView` reads; None: not kept. It is a
            tensor whose first dimension is N, or a nest of lists, tuples and dicts of such tensors.
    """

    features: Maps
    logits: Maps | None = None
    raw: Any = None

    def of_images(self, images: slice) -> "DenseOutput":
        """The output for a part of the batch. Its tensors are views."""
        return DenseOutput(*(_part(x, images) for x in self))


def _part(value: Any, images: slice) -> Any:
    if isinstance(value, Tensor):
        return value[images]
    if isinstance(value, dict):
        return {k: _part(v, images) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_part(v, images) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class DetectorView:
    """View of a detector that gives only features to distillation, such as Faster R-CNN."""

    # Value of padding after normalisation.
    pad_value = 0.0
    # (height, width) if the detector warps all images to one size.
    input_size: tuple[int, int] | None = None
    # Attribute of the backbone that computes the maps which its FPN merges.
    bottom_up = "bottom_up"

    def __init__(self, detector: nn.Module):
        self.detector = detector

    @property
    def name(self) -> str:
        return type(self.detector).__name__

    @property
    def levels(self) -> list[FeatureLevel]:
        """The feature maps, finest first."""
        shapes = self.detector.backbone.output_shape()
        names = sorted(shapes, key=lambda name: shapes[name].stride)
        return [FeatureLevel(n, shapes[n].stride, shapes[n].channels) for n in names]

    @property
    def channel_order(self) -> str:
        """ "RGB" or "BGR"."""
        return channel_order(self.detector)

    @property
    def normalization(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in 0..255, each (3, 1, 1)."""
        return self.detector.pixel_mean, self.detector.pixel_std

    @property
    def size_divisibility(self) -> int:
        """Height and width of a padded batch are multiples of this number."""
        backbone = self.detector.backbone
        constraints = getattr(backbone, "padding_constraints", {})  # v0.6 has none
        return max(constraints.get("size_divisibility", backbone.size_divisibility), 1)

    @property
    def square_size(self) -> int:
        """Side of the square to which batches are padded (ViTDet); 0: none."""
        return getattr(self.detector.backbone, "padding_constraints", {}).get("square_size", 0)

    @property
    def loss_normalizer(self) -> float | Tensor | None:
        """Number by which the detector divides its own losses; None: it has none."""
        return getattr(self.detector, "loss_normalizer", None)

    @loss_normalizer.setter
    def loss_normalizer(self, value: float | Tensor) -> None:
        self.detector.loss_normalizer = value

    def features(self, images: Tensor) -> Maps:
        """(N, 3, H, W), normalised and padded -> the maps of :attr:`levels`."""
        maps = self.detector.backbone(images)
        return [maps[level.name] for level in self.levels]

    def run(self, images: Tensor, *, logits: bool = True, raw: bool = True) -> DenseOutput:
        """One pass of the network.

        Args:
            images: (N, 3, H, W), normalised and padded.
            logits: whether class logits are needed. A two-stage detector has none.
            raw: whether the whole head must run, for losses and boxes.
        """
        return DenseOutput(self.features(images))

    def network(self, images: Tensor) -> Any:
        """Runs the part with the same cost for every image, for counting its operations."""
        maps, rpn = self.detector.backbone(images), self.detector.proposal_generator
        return rpn.rpn_head([maps[name] for name in rpn.in_features])


class DenseView(DetectorView):
    """View of a one-stage detector, which predicts classes and boxes in every cell.

    A subclass for a new detector defines :attr:`cell_anchors`, :meth:`logits` and :meth:`decode`.
    It also defines what differs from Detectron2's conventions, such as :meth:`head`,
    :meth:`losses`, :attr:`levels` and :attr:`suppression`.
    """

    # Whether MODEL.ANCHOR_GENERATOR sets the anchors.
    anchors_in_config = False

    @property
    def levels(self) -> list[FeatureLevel]:
        shapes = self.detector.backbone.output_shape()
        names = self.detector.head_in_features
        return [FeatureLevel(n, shapes[n].stride, shapes[n].channels) for n in names]

    @property
    def num_classes(self) -> int:
        return self.detector.num_classes

    @property
    def cell_anchors(self) -> list[Tensor]:
        """Per level (A_l, 4), XYXY around the cell. With equal anchors, logits are comparable."""
        raise NotImplementedError

    @property
    def anchor_offset(self) -> float:
        """Place of the anchors in their cell: 0 at its upper left corner, 0.5 at its centre."""
        return 0.5

    def as_seen(self, batched_inputs: list[dict]) -> list[dict]:
        """Detectron2's inputs with images and boxes in the pixels that the network sees."""
        return batched_inputs

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Detectron2's inputs -> a normalised and padded batch on the detector's device."""
        return self.detector.preprocess_image(batched_inputs)

    def head(self, features: Maps) -> Any:
        """The head's own output, kept as :attr:`DenseOutput.raw`."""
        return self.detector.head(features)

    def class_logits(self, features: Maps) -> Maps:
        """Only the logits, for a teacher whose boxes are not needed."""
        return self.logits(self.head(features))

    def logits(self, raw: Any) -> Maps:
        """Per level (N, A_l*K, H_l, W_l), classes innermost; sigmoid(logits) is the class score.

        For another kind of head (objectness, softmax), these are the logits of its final score.
        """
        raise NotImplementedError

    def decode(self, features: Maps, raw: Any) -> Maps:
        """Per level (N, A_l*4, H_l, W_l), XYXY in pixels of the padded batch."""
        raise NotImplementedError

    def losses(self, images: ImageList, output: DenseOutput, gt_instances: list) -> dict:
        """The detector's own training losses."""
        return self.detector.forward_training(images, output.features, output.raw, gt_instances)

    def scores(self, raw: Any) -> Maps:
        """Per level (N, A_l*K, H_l, W_l), the scores by which detections are ranked."""
        return [x.sigmoid() for x in self.logits(raw)]

    @property
    def suppression(self) -> dict[str, Any]:
        """Keyword arguments of :func:`fgbg_kd.deploy.suppress`: "score", "iou", "limit".

        They are read from the attributes of Detectron2's dense detectors.
        """
        return {
            "score": self.detector.test_score_thresh,
            "iou": self.detector.test_nms_thresh,
            "limit": self.detector.max_detections_per_image,
        }

    @property
    def candidates_per_level(self) -> int:
        """Number of predictions per level, by highest score, that enter suppression."""
        return self.detector.test_topk_candidates

    def keep_classes(self, keep: list[int]) -> None:
        """Removes all other classes from the head, to save computation.

        Raises:
            DetectorError: the head cannot be reduced.
        """
        raise DetectorError(
            f"Classes cannot be removed from a {self.name}: train it on the student's classes."
        )

    def run(self, images: Tensor, *, logits: bool = True, raw: bool = True) -> DenseOutput:
        features = self.features(images)
        if raw:
            whole = self.head(features)
            return DenseOutput(features, self.logits(whole) if logits else None, whole)
        # The classification branch is enough.
        return DenseOutput(features, self.class_logits(features) if logits else None)

    def named_predictions(self, output: DenseOutput) -> dict[str, Maps]:
        """The head's maps per level, by names for error messages."""
        return {"class logits": output.logits or ()}

    def network(self, images: Tensor) -> Any:
        return self.head(self.features(images))


def full_precision(x: Tensor) -> Tensor:
    """The tensor in fp32 or better: exponentials overflow in fp16."""
    return x.to(accumulation_dtype(x))


def decoded(coder: Any, anchors: Tensor, deltas: Tensor) -> Tensor:
    """Decodes the box deltas of a level.

    Args:
        coder: an object with Detectron2's ``apply_deltas``.
        anchors: (H*W*A, 4) XYXY, in the order of cells, then anchors.
        deltas: (N, A*4, H, W).

    Returns:
        (N, A*4, H, W) XYXY, in fp32 or better.
    """
    n, channels, h, w = deltas.shape
    flat = full_precision(deltas).reshape(n, channels // 4, 4, h * w)
    flat = flat.permute(0, 3, 1, 2)  # (N, HW, A, 4)
    boxes = coder.apply_deltas(flat.reshape(-1, 4), anchors.to(flat).repeat(n, 1))
    return boxes.reshape(n, h * w, channels).transpose(1, 2).reshape(n, channels, h, w)


def joint_logits(objectness: Tensor, classes: Tensor) -> Tensor:
    """The logits of sigmoid(objectness) * sigmoid(classes), in fp32 or better. Shapes broadcast.

    1 / (sigmoid(o) sigmoid(c)) - 1 = exp(-o) (1 + exp(-c) (1 + exp(o))). The logarithm of this form
    is finite where the product rounds to 0 or 1, and few copies are kept.
    """
    o, c = full_precision(objectness), full_precision(classes)
    # From the threshold on, PyTorch takes x for softplus(x). Its default, 20, is wrong by 2e-9.
    return o - F.softplus(F.softplus(o, threshold=40) - c, threshold=40)


def warped(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), smoothed where images shrink."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def channel_order(model: Any) -> str:
    """ "RGB" or "BGR": the ``input_format`` of a Detectron2 model; BGR if it has none."""
    return getattr(model, "input_format", None) or "BGR"


_views: dict[type, type[DenseView]] = {}


def register_view(detector: type) -> Callable[[type[DenseView]], type[DenseView]]:
    """Class decorator: registers a :class:`DenseView` for a detector class and its subclasses."""

    def register(cls: type[DenseView]) -> type[DenseView]:
        _views[detector] = cls
        return cls

    return register


def view(detector: nn.Module) -> DetectorView:
    """The view of a detector, by its class.

    Raises:
        DetectorError: a dense detector without a registered view, or a model without a backbone.
    """
    found = lenient_view(detector)
    if found is None:
        name = type(detector).__name__
        raise DetectorError(f"A {name} has no backbone: give a detector of Detectron2.")
    if not isinstance(found, DenseView) and isinstance(detector, DenseDetector):
        known = ", ".join(cls.__name__ for cls in _views)
        raise DetectorError(
            f"A {type(detector).__name__} is a dense detector that fgbg_kd does not know (it knows "
            f"{known}). Write a DenseView of it and register it with "
            f"@register_view({type(detector).__name__}): docs/extending.md shows one."
        )
    return found


def lenient_view(detector: nn.Module) -> DetectorView | None:
    """:func:`view` for plain training: it accepts any model. None: there is no backbone."""
    for cls in type(detector).__mro__:
        if cls in _views:
            return _views[cls](detector)
    return DetectorView(detector) if hasattr(detector, "backbone") else None


def num_classes_of(detector: nn.Module) -> int | None:
    """A dense or two-stage detector's number of classes; None if it is not known."""
    found = lenient_view(detector)
    if isinstance(found, DenseView):
        return found.num_classes
    return getattr(getattr(detector, "roi_heads", None), "num_classes", None)
