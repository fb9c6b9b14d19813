"""What a detector costs, and what it sees: parameters, GFLOPs, latency, pictures."""

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.transforms import AugInput, ResizeShortestEdge
from detectron2.utils.visualizer import Visualizer
from fvcore.nn import FlopCountAnalysis
from torchvision.ops import nms

from ..config import student_model
from ..detectors.dense import view
from ..detectors.load import build_detector, read_detector_config


def read_input(cfg, path: str) -> dict:
    """An image file as Detectron2's model input, resized as cfg.INPUT says for testing."""
    image = utils.read_image(path, cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    augmented = AugInput(image)
    ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)(augmented)
    tensor = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
    return {"image": tensor, "height": height, "width": width}


def pick(records: list[dict], count: int) -> list[dict]:
    """Images, with objects where any has some, spread evenly over the set: no choice by result."""

    def has_objects(record):
        return any(not a.get("iscrowd") for a in record.get("annotations", ()))

    records = list(filter(has_objects, records)) or records
    places = np.linspace(0, len(records) - 1, min(count, len(records)))
    return [records[i] for i in places.astype(int)]


def detectors_of(config: str) -> dict[str, torch.nn.Module]:
    """The detectors that a config names, by role, with random weights, in eval mode on the CPU.

    Args:
        config: a zoo name, or a local .yaml or .py config.

    Returns:
        {"teacher": ..., "student": ...} of a config that distils, else {"detector": ...}.
    """
    cfg = read_detector_config(config)
    teacher = ""
    if isinstance(cfg, CfgNode):
        if cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller":
            teacher = cfg.MODEL.KD.TEACHER.CONFIG
    elif (student := student_model(cfg.model)) is not cfg.model:
        teacher, cfg.model = cfg.model.teacher.config, student
    detector = build_detector(cfg).eval()
    if not teacher:
        return {"detector": detector}
    return {"teacher": build_detector(read_detector_config(teacher)).eval(), "student": detector}


class _Network(torch.nn.Module):
    """A detector from padded images to raw predictions per cell, as a module of its own."""

    def __init__(self, detector: torch.nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return view(self.detector).network(images)


@torch.no_grad()
def cost(model: torch.nn.Module, example: dict, runs: int = 30) -> dict[str, float]:
    """Parameters (millions), GFLOPs and milliseconds of one image, on the model's device.

    GFLOPs are fvcore's: one multiply-add is one FLOP. They are of backbone and head; of a two-stage
    detector of backbone and RPN, since the rest depends on what it proposes. Milliseconds are the
    median of ``runs`` calls of the whole detector, with resizing left out and NMS in.
    """
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    # Detectron2's own counter cannot be imported with v0.6 (it needs caffe2).
    flops = FlopCountAnalysis(_Network(model), model.preprocess_image([example]).tensor)
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    gflops = flops.total() / 1e9
    (milliseconds,) = latency({"": lambda _: model([example])}, runs).values()
    return {
        "parameters_m": round(parameters, 3),
        "gflops": round(gflops, 4),
        "ms_per_image": round(milliseconds, 2),
    }


def latency(calls: dict[str, Callable[[int], Any]], runs: int = 30) -> dict[str, float]:
    """Median milliseconds of each call, which gets the number of the run.

    They take turns, so that what else the machine does meets all of them.
    """
    times = {name: [] for name in calls}
    for i in range(runs + 3):  # three to warm up
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(x[3:])) for name, x in times.items()}


def table(rows: list[dict]) -> str:
    """Markdown: a line a row, the columns of the first."""
    names = {"parameters_m": "parameters (M)", "gflops": "GFLOPs", "ms_per_image": "ms / image"}
    lines = [
        "| " + " | ".join(names.get(k, k) for k in rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows])


@torch.no_grad()
def draw_side_by_side(
    cfg, record: dict, models: dict[str, torch.nn.Module], score: float, width: int = 320
) -> np.ndarray:
    """Ground truth and each model's detections of one image, in a row, with titles.

    Of detections that overlap by an IoU over 0.5 the best is drawn, whatever their classes: a
    label over another cannot be read.

    Args:
        cfg: of the models' input, and of the set's class names (DATASETS.TEST).
        record: Detectron2's standard dataset dict.
        models: name -> detector.
        score: detections under it are not drawn.
        width: of each panel, in pixels.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    image = utils.read_image(record["file_name"], "RGB")
    scale = width / image.shape[1]
    inputs = read_input(cfg, record["file_name"])
    truth = {**record, "annotations": [a for a in record["annotations"] if not a["iscrowd"]]}
    panels = [("ground truth", Visualizer(image, metadata, scale).draw_dataset_dict(truth))]
    for name, model in models.items():
        found = model([inputs])[0]["instances"].to("cpu")
        found = found[found.scores >= score]
        found = found[nms(found.pred_boxes.tensor, found.scores, 0.5)]
        drawn = Visualizer(image, metadata, scale).draw_instance_predictions(found)
        panels.append((f"{name}: {len(found)} detections", drawn))
    return np.hstack([_titled(panel.get_image()[:, :, ::-1], title) for title, panel in panels])


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    image = cv2.copyMakeBorder(image, 22, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return cv2.putText(image, title, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, 16)
