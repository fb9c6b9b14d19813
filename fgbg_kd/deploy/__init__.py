"""The student as a file of its own, ONNX or TorchScript, and any such file as a detector.

An exported detector takes one image of any size, uint8 RGB of shape (H, W, 3), and gives

- boxes: (M, 4) float32, x0, y0, x1, y1 in pixels of that image,
- scores: (M,) float32,
- classes: (M,) int64.

With NMS inside, these are the detections, best first. With NMS outside they are candidates, at most
``test_topk_candidates`` a level, to which the caller applies :func:`suppress`, or the like.
Normalisation and padding are inside; resizing is the caller's. To what size, and what the classes
are called, the metadata in the file says (:func:`describe`).
"""

from ..utils.errors import DeployError
from .deployable import Deployable, suppress
from .export import FORMATS, describe, export, load_for_deployment, quantize
from .run import ExportedDetector, agreement, coco_results, detect, draw, open_detector, resized

__all__ = [
    "FORMATS",
    "DeployError",
    "Deployable",
    "ExportedDetector",
    "agreement",
    "coco_results",
    "describe",
    "detect",
    "draw",
    "export",
    "load_for_deployment",
    "open_detector",
    "quantize",
    "resized",
    "suppress",
]
