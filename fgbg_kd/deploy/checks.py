"""Compares an exported file with PyTorch. The file is kept only if their detections agree."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn
from torchvision.ops import box_iou

from ..utils.errors import DeployError
from ..utils.files import whole
from .export import export
from .openvino_file import whole_pair
from .run import ExportedDetector, detect

# Smallest share of detections that must have a partner. Weights in fp16 have about three decimal
# digits. So detections with nearly equal scores can change their order.
_PARTNERS, _PARTNERS_IN_FP16 = 0.99, 0.9


class Agreement(NamedTuple):
    """How much the detections of two detectors agree.

    A detection has a partner if the other detector has a detection of the same class with an
    IoU over 0.9.

    Attributes:
        detections: number of detections of the first detector.
        partners: share of all detections (of both detectors) that have a partner; NaN if there are
            no detections.
        score: largest difference between the scores of partners.
        pixels: largest difference between the corners of partners, in pixels.
    """

    detections: int
    partners: float
    score: float
    pixels: float


def agreement(
    reference: Callable, other: Callable, about: dict, images: Iterable[np.ndarray]
) -> Agreement:
    """Compares two detectors on images.

    Args:
        reference, other: Detectron2 models.
        about: the description of both (:func:`describe`).
        images: (H, W, 3) uint8 RGB.
    """
    total = paired = detections = 0
    score = pixels = 0.0
    for image in images:
        a, b = (detect(model, about, image) for model in (reference, other))
        detections, total = detections + len(a), total + len(a) + len(b)
        if not len(a) or not len(b):
            continue
        same = a.pred_classes[:, None] == b.pred_classes
        iou = box_iou(a.pred_boxes.tensor, b.pred_boxes.tensor) * same
        best, partner = iou.max(1)
        good = best > 0.9
        paired += int(good.sum()) + int((iou.max(0)[0] > 0.9).sum())
        a, b = a[good], b[partner[good]]
        if len(a):
            score = max(score, float((a.scores - b.scores).abs().max()))
            pixels = max(pixels, float((a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max()))
    return Agreement(detections, paired / total if total else math.nan, score, pixels)


def export_checked(
    model: nn.Module,
    about: dict,
    output: Path,
    images: list[np.ndarray],
    nms_inside: bool = True,
    half: bool = False,
) -> tuple[ExportedDetector, Agreement]:
    """Exports a detector to a file and compares the file with PyTorch.

    The new file replaces an existing file only after it has passed the comparison.

    Args:
        model, about, nms_inside, half: see :func:`export`.
        images: (H, W, 3) uint8 RGB, for the comparison.

    Raises:
        DeployError: the detections of the file and PyTorch differ, or nothing is detected.
    """
    if output.is_dir():
        raise DeployError(f"{output} is a folder: give the name of a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with (whole_pair if output.suffix == ".xml" else whole)(output) as partial:
        partial.touch()  # fails early if it cannot be written
        export(model, about, str(partial), images[0], nms_inside, half)
        exported = ExportedDetector(str(partial))
        found = agreement(model, exported, about, images)
        if math.isnan(found.partners):
            raise DeployError(
                f"{output} is not written: nothing is detected in the images, so the file "
                "cannot be checked. Give --images with objects, and trained weights."
            )
        if found.partners < (_PARTNERS_IN_FP16 if half else _PARTNERS):
            raise DeployError(
                f"{output} is not written: only {found.partners:.2%} of its detections and "
                "PyTorch's agree. After a very short training, many scores are nearly equal, and "
                "each program keeps other boxes: train longer. Otherwise, please report this, with "
                "the versions of torch, onnxruntime and openvino."
            )
    return exported, found
