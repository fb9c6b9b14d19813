"""Ground truth and the detections of several detectors, side by side."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import AugInput, ResizeShortestEdge
from detectron2.structures import BoxMode, Instances
from torch import nn
from torchvision.ops import nms

from ..data.classes import set_classes
from ..data.images import read_image
from .drawing import draw_boxes


def read_input(cfg: CfgNode, path: str) -> dict:
    """Reads an image file as Detectron2's model input, resized to INPUT.MIN_SIZE_TEST."""
    image = read_image(path, cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    augmented = AugInput(image)
    ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)(augmented)
    tensor = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width}


@torch.no_grad()
def draw_side_by_side(
    cfg: CfgNode,
    record: dict,
    models: Mapping[str, tuple[CfgNode, nn.Module]],
    score: float,
    width: int = 320,
) -> np.ndarray:
    """Draws ground truth and the detections of each model in a row of panels (:func:`draw_row`).

    Args:
        cfg: config whose DATASETS.TEST gives the class names.
        record: the image as Detectron2's dataset dict.
        models: by name, a detector and the config by which it reads images.
        score: detections with a lower score are not drawn.
        width: width of a panel in pixels.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    found = {}
    for name, (own_cfg, model) in models.items():
        instances = model([read_input(own_cfg, record["file_name"])])[0]["instances"].to("cpu")
        found[name] = instances[instances.scores >= score]
    classes = set_classes(cfg.DATASETS.TEST[0])
    return draw_row(record, found, classes, width)


def draw_row(
    record: dict, found: Mapping[str, Instances], classes: Sequence[str] | None, width: int = 320
) -> np.ndarray:
    """Draws ground truth and detections in a row of panels with titles.

    Of detections with an IoU over 0.5, only the detection with the highest score is drawn, also if
    their classes differ. Otherwise their labels would cover each other.

    Args:
        record: the image as Detectron2's dataset dict.
        found: detections by name, in pixels of the image file.
        classes: names of the classes.
        width: width of a panel in pixels.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    image = read_image(record["file_name"], "RGB")
    scale = width / image.shape[1]
    objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    numbers = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    panels = [("ground truth", draw_boxes(image, truth, numbers, classes, scale=scale))]
    for name, drawn in found.items():
        drawn = drawn[nms(drawn.pred_boxes.tensor, drawn.scores, 0.5)]
        boxes = drawn.pred_boxes.tensor
        panel = draw_boxes(image, boxes, drawn.pred_classes, classes, drawn.scores, scale)
        panels.append((f"{name}: {len(drawn)} detections", panel))
    return np.hstack([_titled(panel[:, :, ::-1], title) for title, panel in panels])


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    image = cv2.copyMakeBorder(image, 22, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return cv2.putText(image, title, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, 16)
