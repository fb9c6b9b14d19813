"""Runs an exported file, or a config with its weights, on images."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from ..data.images import too_narrow
from ..detectors.dense import channel_order
from ..utils.errors import DataError, DeployError
from ..utils.fonts import readable
from ..utils.packages import need
from .deployable import METADATA, OUTPUTS, in_order, suppress
from .export import FORMATS, load_for_deployment
from .openvino_file import open_openvino

_DESCRIBED = {"categories", "min_size", "max_size", "input_size", "suppression", "nms_inside"}


class ExportedDetector:
    """An exported file as a Detectron2 model: [{"image": (3, H, W), ...}] to [{"instances"}].

    Images are RGB (``input_format``). A TorchScript file is a program: run only files you trust.

    Attributes:
        about: the description in the file: the result of :func:`describe`, and "nms_inside".
        run: function from an image (H, W, 3) uint8 RGB to boxes, scores and classes as arrays.
    """

    input_format = "RGB"

    def __init__(self, file: str, device: str = ""):
        """
        Args:
            file: a .onnx, .pt or .xml file from :func:`export` or :func:`quantize`.
            device: "cpu": ONNX Runtime uses the CPU. Otherwise it uses a GPU if it has one.

        Raises:
            DeployError: the file does not exist, is damaged, or was written by another program.
        """
        if not os.path.isfile(file):
            raise DeployError(f"{file}: there is no such file.")
        self.providers = ["CPUExecutionProvider"] if device == "cpu" else None
        try:
            about = json.loads(self._open(file) or "{}")
        except DeployError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise DeployError(f"{file} cannot be read: {error}") from error
        if lacking := sorted(_DESCRIBED - about.keys()):
            raise DeployError(
                f"{file} has no metadata for {', '.join(lacking)}: it was not written by this "
                "version's tools/export.py. Export the detector again."
            )
        self.about = about

    def _open(self, file: str) -> str:
        """Sets :attr:`run`, and returns the metadata."""
        if file.endswith(".onnx"):
            return self._open_onnx(file)
        if file.endswith(".xml"):
            self.run, about = open_openvino(file)
            return about
        return self._open_torchscript(file)

    def _open_onnx(self, file: str) -> str:
        runtime = need("onnxruntime", "export", DeployError)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        session = runtime.InferenceSession(
            file, options, providers=self.providers or runtime.get_available_providers()
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
        if self.about["input_size"]:  # an evaluation's mapper may give another size
            image = resized(image, self.about)
        found = [torch.from_numpy(np.asarray(a)) for a in self.run(image)]
        if not self.about["nms_inside"]:
            found = suppress(*found, **self.about["suppression"])
        height, width = image.shape[:2]
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(found[0])
        instances.scores, instances.pred_classes = found[1:]
        before = x["image"].shape[1:]
        size = x.get("height", before[0]), x.get("width", before[1])
        return detector_postprocess(instances, *size)


def open_detector(
    path: str, weights: str = "", need_ids: bool = True, device: str = ""
) -> tuple[Callable, dict]:
    """Opens a detector: an exported file, or a YAML config and its weights.

    Args:
        need_ids: for a config; see :func:`describe`.
        device: for a config, such as "cpu" or "cuda:1". "": the GPU, if there is one.

    Returns:
        A Detectron2 model, and its description (:func:`describe`).

    Raises:
        DeployError, ConfigError, CheckpointError: see :class:`ExportedDetector` and
            :func:`load_for_deployment`.
    """
    if Path(path).suffix in FORMATS:
        model = ExportedDetector(path)
        return model, model.about
    model, about = load_for_deployment(path, weights, need_ids)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), about
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a missing device
        reason = str(error).partition("\n")[0]
        raise DeployError(f"The device {device} cannot be used ({reason}): try cpu.") from error


def resized(image: np.ndarray, about: dict) -> np.ndarray:
    """Resizes an image (H, W, 3) to the size that the detector takes.

    Raises:
        DataError: it is so narrow that it would have no pixel across.
    """
    height, width = image.shape[:2]
    if not about["input_size"] and too_narrow(height, width, about["max_size"]):
        raise DataError(
            f"An image of {width}x{height} pixels is too narrow: if the longer side is reduced to "
            f"{about['max_size']}, the shorter one has no pixel. Cut it into parts."
        )
    if about["input_size"]:
        return ResizeTransform(*image.shape[:2], *about["input_size"]).apply_image(image)
    resize = ResizeShortestEdge(about["min_size"], about["max_size"])
    return resize.get_transform(image).apply_image(image)


@torch.no_grad()
def detect(model: Callable, about: dict, image: np.ndarray, score: float = 0.0) -> Instances:
    """Detections in an image.

    Args:
        model, about: results of :func:`open_detector`.
        image: (H, W, 3) uint8 RGB.
        score: detections with a lower score are left out. The detector's own threshold also
            applies.

    Returns:
        "pred_boxes" in pixels of the image, "scores", "pred_classes"; on the CPU.
    """
    small = torch.as_tensor(np.ascontiguousarray(resized(image, about).transpose(2, 0, 1)))
    height, width = image.shape[:2]
    inputs = {"image": in_order(small, channel_order(model)), "height": height, "width": width}
    found = model([inputs])[0]["instances"].to("cpu")
    return found[found.scores >= score]


def coco_results(found: Instances, ids: list[int], image_id: int | str) -> list[dict]:
    """Detections of an image in COCO's results format.

    Args:
        ids: COCO's category ids in the order of the class numbers.
    """
    rows = instances_to_coco_json(found, image_id)
    for row in rows:
        row["category_id"] = ids[row["category_id"]]
    return rows


def draw(found: Instances, about: dict, image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 RGB with the detections drawn."""
    with readable([category["name"] for category in about["categories"]]) as names:
        metadata = Metadata(name="detections", thing_classes=names)
        return Visualizer(image, metadata).draw_instance_predictions(found).get_image()
