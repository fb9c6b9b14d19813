"""Exports the student to an ONNX, OpenVINO or TorchScript file, and runs such files.

An exported detector takes one image of any size, uint8 RGB of shape (H, W, 3), and returns

- boxes: (M, 4) float32, x0, y0, x1, y1 in pixels of that image,
- scores: (M,) float32,
- classes: (M,) int64.

If the file includes NMS, these are the detections, best first. Otherwise they are candidates, at
most ``test_topk_candidates`` per level, and the caller applies :func:`suppress` or a similar
function. The file includes normalisation and padding, but not resizing. Its metadata give the input
size and the class names (:func:`describe`).
"""

from ..utils.errors import DeployError
from .checks import Agreement, agreement, export_checked
from .deployable import Deployable, suppress
from .export import FORMATS, describe, export, load_for_deployment, quantize
from .export_config import average_precision, export_config, export_files
from .predict import predict
from .run import ExportedDetector, coco_results, detect, draw, open_detector, resized

__all__ = [
    "FORMATS",
    "Agreement",
    "DeployError",
    "Deployable",
    "ExportedDetector",
    "agreement",
    "average_precision",
    "coco_results",
    "describe",
    "detect",
    "draw",
    "export",
    "export_checked",
    "export_config",
    "export_files",
    "load_for_deployment",
    "open_detector",
    "predict",
    "quantize",
    "resized",
    "suppress",
]
