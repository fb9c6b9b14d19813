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

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from .detector import load_detector, read_detector_config, weights_of
from .distiller import run_dense
from .pair import channel_order, is_dense

FORMATS = (".onnx", ".pt")
_OUTPUTS = ["boxes", "scores", "classes"]
_METADATA = "fgbg_kd.json"  # its name in either kind of file


class DeployError(RuntimeError):
    """Something cannot be exported, or a file not be run; the message says why and the mend."""


def suppress(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, score: float, iou: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NMS within each class, as Detectron2's dense detectors do it.

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,), the candidates.
        score: candidates up to this score are left out.
        iou: of two that overlap by more than this, the better one stays.
        limit: at most so many detections.

    Returns:
        The same of the detections, best first.
    """
    good = (scores > score).nonzero()[:, 0]
    boxes, scores, classes = boxes[good], scores[good], classes[good]
    # Each class in a place of its own, so that one NMS does for all. The 0: there may be no box.
    corners = torch.cat([boxes.flatten(), boxes.new_zeros(1)])
    offset = classes.to(boxes.dtype) * (corners.max() - corners.min() + 1)
    keep = nms(boxes + offset[:, None], scores, iou)[:limit]
    return boxes[keep], scores[keep], classes[keep]


class Deployable(nn.Module):
    """A dense detector from pixels to detections, with nothing that tracing cannot follow."""

    def __init__(self, detector: nn.Module, nms_inside: bool = True):
        """
        Args:
            detector: a RetinaNet or FCOS.
            nms_inside: False: the output are candidates.

        Raises:
            DeployError: another detector.
        """
        super().__init__()
        _check_dense(detector)
        self.detector, self.nms_inside = detector, nms_inside
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(H, W, 3) uint8, RGB, to boxes (M, 4), scores (M,), classes (M,)."""
        detector = self.detector
        pixels = image.permute(2, 0, 1).float()
        if channel_order(detector) == "BGR":
            pixels = pixels.flip(0)
        pixels = (pixels - detector.pixel_mean) / detector.pixel_std
        height, width = pixels.shape[1:]
        divisor = max(detector.backbone.size_divisibility, 1)
        pixels = F.pad(pixels, (0, -width % divisor, 0, -height % divisor))
        features, predictions = run_dense(detector, pixels[None])
        anchors = detector.anchor_generator(features)
        levels = [self._candidates(*level) for level in zip(anchors, *predictions)]
        boxes, scores, classes = (torch.cat(x) for x in zip(*levels))
        if not self.nms_inside:
            return boxes, scores, classes
        boxes, scores, classes = suppress(boxes, scores, classes, **_suppression(detector))
        # Last, as in Detectron2: boxes are cut off at the image's border, empty ones left out.
        border = torch.stack([torch.as_tensor(x) for x in (width, height, width, height)])
        boxes = boxes.clamp(min=0).minimum(border.to(boxes))
        good = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero()[:, 0]
        return boxes[good], scores[good], classes[good]

    def _candidates(self, anchors: Boxes, logits: Tensor, deltas: Tensor, *centerness: Tensor):
        """The best of one level: boxes (M, 4), scores (M,), classes (M,)."""
        detector, classes = self.detector, self.detector.num_classes
        scores = permute_to_N_HWA_K(logits, classes)[0].sigmoid()
        for x in centerness:  # FCOS has it
            scores = (scores * permute_to_N_HWA_K(x, 1)[0].sigmoid()).sqrt()
        scores = scores.flatten()
        # A tensor, so that tracing sees the minimum.
        count = torch.as_tensor(scores.shape[0]).clamp(max=detector.test_topk_candidates)
        scores, index = scores.topk(count)
        rows = torch.div(index, classes, rounding_mode="floor")
        deltas = permute_to_N_HWA_K(deltas, 4)[0][rows]
        boxes = detector.box2box_transform.apply_deltas(deltas, anchors.tensor[rows])
        return boxes, scores, index - rows * classes


def _suppression(detector: nn.Module) -> dict[str, Any]:
    return {
        "score": detector.test_score_thresh,
        "iou": detector.test_nms_thresh,
        "limit": detector.max_detections_per_image,
    }


# --- Writing ---


def load_for_deployment(config: str, weights: str) -> tuple[nn.Module, dict]:
    """The (student's) detector of a YAML config, whole or not at all, and its :func:`describe`.

    Raises:
        DeployError: a config that is not YAML, or not of a RetinaNet or FCOS.
        ConfigError: no such config.
        CheckpointError: weights that do not fill the detector exactly.
    """
    cfg = read_detector_config(config)
    if not isinstance(cfg, CfgNode):
        raise DeployError(f"{config}: only a detector of a YAML config is exported.")
    detector = load_detector(cfg, weights or weights_of(config, cfg))
    _check_dense(detector)
    return detector, describe(cfg, detector)


def _check_dense(detector: nn.Module) -> None:
    if not is_dense(detector):
        raise DeployError(f"A {type(detector).__name__}: only RetinaNet and FCOS are deployed.")


def describe(cfg: CfgNode, detector: nn.Module) -> dict:
    """What a user of a detector needs to know, in JSON's types.

    Returns:
        "categories": COCO's, [{"id", "name"}, ...] in the order of the classes' numbers;
        "min_size", "max_size": the shorter side's length to resize to, and the longer's limit;
        "suppression": keyword arguments of :func:`suppress`.
    """
    return {
        "categories": _categories(cfg, detector.num_classes),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "suppression": _suppression(detector),
    }


def _categories(cfg: CfgNode, number: int) -> list[dict]:
    for part in ("TRAIN", "TEST"):
        path, found = cfg.DATASETS[f"{part}_JSON"], []
        if os.path.isfile(path):
            found = json.loads(Path(path).read_text())["categories"]
        elif not path and cfg.DATASETS[part]:
            known = MetadataCatalog.get(cfg.DATASETS[part][0])
            ids = known.get("thing_dataset_id_to_contiguous_id") or {}
            found = [{"id": i, "name": known.thing_classes[n]} for i, n in ids.items()]
        if len(found) == number:
            found = sorted(found, key=lambda c: c["id"])
            return [{"id": c["id"], "name": c["name"]} for c in found]
    return [{"id": i + 1, "name": f"class {i}"} for i in range(number)]


def export(
    detector: nn.Module, about: dict, output: str, image: np.ndarray, nms_inside: bool = True
) -> None:
    """Writes a detector into a file.

    Args:
        detector, about: of :func:`load_for_deployment`.
        output: name.onnx or name.pt (TorchScript).
        image: (H, W, 3) uint8, an example; the file takes other sizes as well.
        nms_inside: False: the file gives candidates.
    """
    if Path(output).suffix not in FORMATS:
        raise DeployError(f"{output}: give a name in .onnx, or in .pt for TorchScript.")
    about = {**about, "nms_inside": nms_inside}
    model, example = Deployable(detector, nms_inside), torch.from_numpy(image.copy())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        # That sizes are traced, which they are to be, and that the tracing exporter is the old one:
        # Detectron2's detectors ask for the number of boxes too often for the new one.
        warnings.simplefilter("ignore")
        if output.endswith(".pt"):
            extra = {_METADATA: json.dumps(about)}
            traced = torch.jit.trace(model, (example,), check_trace=False)
            torch.jit.save(traced, output, _extra_files=extra)
            return
        onnx = _need("onnx")
        torch.onnx.export(
            model,
            (example,),
            output,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=_OUTPUTS,
            dynamic_axes={"image": {0: "height", 1: "width"}, **{k: {0: "M"} for k in _OUTPUTS}},
        )
        written = onnx.load(output)
        onnx.helper.set_model_props(written, {_METADATA: json.dumps(about)})
        onnx.save(written, output)


def quantize(source: str, output: str, images: Iterable[np.ndarray] | None = None) -> None:
    """Writes an ONNX file with its convolutions in int8, by onnxruntime's own quantiser.

    Args:
        images: (H, W, 3) uint8, RGB, from which the ranges of activations are taken (static);
            None: they are taken anew in every image that the file is run on (dynamic).
    """
    _need("onnxruntime")
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = f"{output}.prepared"
    try:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if images is None:
            # onnxruntime's integer convolution of a CPU knows unsigned weights only.
            q.quantize_dynamic(
                prepared, output, op_types_to_quantize=["Conv"], weight_type=q.QuantType.QUInt8
            )
            return

        class Reader(q.CalibrationDataReader):
            rest = iter(images)

            def get_next(self):
                image = next(self.rest, None)
                return None if image is None else {"image": image}

        q.quantize_static(
            prepared, output, Reader(), op_types_to_quantize=["Conv"], per_channel=True
        )
    finally:
        Path(prepared).unlink(missing_ok=True)


def _need(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise DeployError(f"No {name} here: pip install -e '.[export]'.") from error


# --- Running ---


class ExportedDetector:
    """An exported file as a Detectron2 model: [{"image": (3, H, W), ...}] to [{"instances"}].

    Images are RGB (``input_format``). A TorchScript file, unlike a checkpoint, is a program: run
    only what you trust.
    """

    input_format = "RGB"

    def __init__(self, file: str, threads: int | None = None):
        """
        Args:
            file: .onnx or .pt, of :func:`export` or :func:`quantize`.
            threads: of onnxruntime; None: as many as PyTorch uses.

        Raises:
            DeployError: no such file, or one of another origin.
        """
        if not os.path.isfile(file):
            raise DeployError(f"{file}: there is no such file.")
        try:
            read = self._open_onnx if file.endswith(".onnx") else self._open_torchscript
            about = read(file, threads or torch.get_num_threads())
        except DeployError:
            raise
        except Exception as error:  # a torn file can raise anything
            raise DeployError(f"{file} cannot be read: {error}") from error
        if not about:
            raise DeployError(f"{file} has not been written by tools/export.py.")
        self.about = json.loads(about)

    def _open_onnx(self, file: str, threads: int) -> str:
        runtime = _need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        session = runtime.InferenceSession(
            file, options, providers=runtime.get_available_providers()
        )
        self.run: Callable = lambda image: session.run(_OUTPUTS, {"image": image})
        return session.get_modelmeta().custom_metadata_map.get(_METADATA, "")

    def _open_torchscript(self, file: str, threads: int) -> str:
        extra = {_METADATA: ""}
        module = torch.jit.load(file, map_location="cpu", _extra_files=extra)
        self.run = torch.no_grad()(lambda image: [x.numpy() for x in module(torch.tensor(image))])
        return extra[_METADATA]

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


def open_detector(path: str, weights: str = "") -> tuple[Callable, dict]:
    """A detector to run, from an exported file, or a YAML config and its weights.

    Returns:
        A Detectron2 model, and its :func:`describe`.
    """
    if Path(path).suffix in FORMATS:
        model = ExportedDetector(path)
        return model, model.about
    return load_for_deployment(path, weights)


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


# --- Checking ---


def agreement(
    reference: Callable, other: Callable, about: dict, images: Iterable[np.ndarray]
) -> dict[str, float]:
    """How alike the detections of two detectors are.

    A detection has a partner if the other has one of the same class and IoU over 0.9.

    Returns:
        "detections": of the reference; "partners": share of detections of either that have one;
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
    share = paired / total if total else 1.0
    return {"detections": detections, "partners": share, "score": score, "pixels": pixels}


def latency(
    models: dict[str, Callable], about: dict, images: Sequence[np.ndarray], runs: int = 30
) -> dict[str, float]:
    """Median milliseconds of each detector for one image, resizing included.

    They take turns, so that what else the machine does meets all of them.
    """
    times = {name: [] for name in models}
    for i in range(runs + 3):  # three to warm up
        for name, model in models.items():
            start = time.perf_counter()
            detect(model, about, images[i % len(images)])
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(x[3:])) for name, x in times.items()}
