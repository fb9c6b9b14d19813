"""Running an exported file, or a config with its weights, on images."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from torchvision.ops import box_iou

from ..detectors.dense import channel_order
from ..utils.errors import DeployError
from .deployable import OUTPUTS, suppress
from .export import FORMATS, METADATA, load_for_deployment, need


class ExportedDetector:
    """An exported file as a Detectron2 model: [{"image": (3, H, W), ...}] to [{"instances"}].

    Images are RGB (``input_format``). A TorchScript file, unlike a checkpoint, is a program: run
    only what you trust.
    """

    input_format = "RGB"

    def __init__(self, file: str):
        """
        Args:
            file: .onnx or .pt, of :func:`export` or :func:`quantize`.

        Raises:
            DeployError: no such file, or one of another origin.
        """
        if not os.path.isfile(file):
            raise DeployError(f"{file}: there is no such file.")
        try:
            read = self._open_onnx if file.endswith(".onnx") else self._open_torchscript
            about = read(file)
        except DeployError:
            raise
        except Exception as error:  # a torn file can raise anything
            raise DeployError(f"{file} cannot be read: {error}") from error
        if not about:
            raise DeployError(f"{file} has not been written by tools/export.py.")
        self.about = json.loads(about)

    def _open_onnx(self, file: str) -> str:
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        session = runtime.InferenceSession(
            file, options, providers=runtime.get_available_providers()
        )
        self.run: Callable = lambda image: session.run(OUTPUTS, {"image": image})
        return session.get_modelmeta().custom_metadata_map.get(METADATA, "")

    def _open_torchscript(self, file: str) -> str:
        extra = {METADATA: ""}
        module = torch.jit.load(file, map_location="cpu", _extra_files=extra)
        self.run = torch.no_grad()(lambda image: [x.numpy() for x in module(torch.tensor(image))])
        return extra[METADATA]

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, x: dict) -> Instances:
        image = x["image"].permute(1, 2, 0).to(torch.uint8).contiguous().numpy()
        found = [torch.from_numpy(np.asarray(a)) for a in self.run(image)]
        if not self.about["nms_inside"]:
            found = suppress(*found, **self.about["suppression"])
        height, width = image.shape[:2]
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(found[0])
        instances.scores, instances.pred_classes = found[1:]
        return detector_postprocess(instances, x.get("height", height), x.get("width", width))


def open_detector(path: str, weights: str = "", need_ids: bool = True) -> tuple[Callable, dict]:
    """A detector to run, from an exported file, or a YAML config and its weights.

    Args:
        need_ids: as :func:`describe` takes it, of a config.

    Returns:
        A Detectron2 model, and its :func:`describe`.
    """
    if Path(path).suffix in FORMATS:
        model = ExportedDetector(path)
        return model, model.about
    return load_for_deployment(path, weights, need_ids)


def resized(image: np.ndarray, about: dict) -> np.ndarray:
    """An image (H, W, 3) in the size that the detector is made for."""
    resize = ResizeShortestEdge(about["min_size"], about["max_size"])
    return resize.get_transform(image).apply_image(image)


@torch.no_grad()
def detect(model: Callable, about: dict, image: np.ndarray, score: float = 0.0) -> Instances:
    """Detections over a score in an image (H, W, 3), uint8, RGB."""
    small = resized(image, about)
    if channel_order(model) == "BGR":
        small = small[:, :, ::-1]
    tensor = torch.as_tensor(np.ascontiguousarray(small.transpose(2, 0, 1)))
    height, width = image.shape[:2]
    found = model([{"image": tensor, "height": height, "width": width}])[0]["instances"].to("cpu")
    return found[found.scores >= score]


def coco_results(found: Instances, about: dict, image_id: int | str) -> list[dict]:
    """Detections of an image in the format of COCO's results."""
    rows = instances_to_coco_json(found, image_id)
    for row in rows:
        row["category_id"] = about["categories"][row["category_id"]]["id"]
    return rows


def draw(found: Instances, about: dict, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3), uint8, RGB, with the detections drawn into it."""
    metadata = Metadata(name="detections", thing_classes=[c["name"] for c in about["categories"]])
    return Visualizer(image, metadata).draw_instance_predictions(found).get_image()


def agreement(
    reference: Callable, other: Callable, about: dict, images: Iterable[np.ndarray]
) -> dict[str, float]:
    """How alike the detections of two detectors are.

    A detection has a partner if the other has one of the same class and IoU over 0.9.

    Returns:
        "detections": of the reference; "partners": share of detections of either that have one,
        NaN where neither has any;
        "score": the largest difference of partners' scores; "pixels": of their corners.
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
    share = paired / total if total else math.nan
    return {"detections": detections, "partners": share, "score": score, "pixels": pixels}
