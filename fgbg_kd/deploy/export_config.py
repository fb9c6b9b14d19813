"""Exports a config's detector, checks the files, and measures size, speed and accuracy."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from ..data.images import pick, read_image
from ..detectors.dense import channel_order
from ..engine import FgBgTrainer, load_config
from ..utils.errors import DeployError
from ..utils.timing import latency
from .checks import export_checked
from .export import load_for_deployment, quantize
from .run import ExportedDetector, detect, resized

_CHECKED_ON = 8  # images


def export_config(
    config: str,
    weights: str,
    output: Path,
    *,
    nms_inside: bool = True,
    int8: str = "",
    calibration: int = 64,
    images: Sequence[str] = (),
    evaluate: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Exports the detector of a config, checks the file, and measures the file and PyTorch.

    Args:
        config: a YAML config.
        weights: its checkpoint.
        output: name.onnx, or name.pt for TorchScript.
        nms_inside: False: the file returns candidates.
        int8: "static" or "dynamic": also writes name.int8.onnx (:func:`quantize`).
        calibration: number of training images for "static".
        images: image files for the check. Empty: 8 images of DATASETS.TEST.
        evaluate: whether AP on DATASETS.TEST is measured.
        say: is called with a line of text about the check.

    Returns:
        A row for each detector: "detector", "MB", "ms_per_image", and "AP" if it is measured.

    Raises:
        DeployError: the detector cannot be exported, or the file and PyTorch detect different
            objects.
    """
    model, about = load_for_deployment(config, weights)
    cfg = None
    if evaluate or not images or int8 == "static":
        cfg = load_config(config, ["MODEL.DEVICE", "cpu"])
    if evaluate:
        _check_annotated(cfg)
    shown = _read(images or _files(cfg, "TEST", _CHECKED_ON), about)
    exported, found = export_checked(model, about, output, shown, nms_inside)
    say(
        f"{output} agrees with PyTorch: {found.detections} detections in {len(shown)} images, "
        f"{found.partners:.2%} with a partner; scores differ by at most {found.score:.1e}, corners "
        f"by {found.pixels:.1e} pixels."
    )
    models = {"PyTorch": model, str(output): exported}
    if int8:
        smaller = str(output.with_suffix(".int8.onnx"))
        static = int8 == "static"
        quantize(
            str(output),
            smaller,
            _read(_files(cfg, "TRAIN", calibration), about) if static else None,
        )
        models[smaller] = ExportedDetector(smaller)
    return _measured(models, about, shown, cfg if evaluate else None)


def _measured(
    models: dict[str, Callable], about: dict, images: list[np.ndarray], cfg: CfgNode | None
) -> list[dict]:
    """A row for each detector. It contains AP if a config is given."""
    calls = {
        name: lambda i, m=m: detect(m, about, images[i % len(images)]) for name, m in models.items()
    }
    rows, milliseconds = [], latency(calls)
    for name, model in models.items():
        in_memory = isinstance(model, nn.Module)
        size = _weight_bytes(model) if in_memory else os.path.getsize(name)
        row = {"detector": name, "MB": f"{size / 1e6:.2f}"}
        row["ms_per_image"] = f"{milliseconds[name]:.2f}"
        if cfg is not None:
            row["AP"] = f"{_average_precision(cfg, model):.2f}"
        rows.append(row)
    return rows


def _read(files: Sequence[str], about: dict) -> list[np.ndarray]:
    return [resized(read_image(file, "RGB"), about) for file in files]


def _files(cfg: CfgNode, part: str, count: int) -> list[str]:
    """Image files of the first set of DATASETS.TRAIN or TEST."""
    records = [r for name in cfg.DATASETS[part][:1] for r in DatasetCatalog.get(name)]
    if not records:
        raise DeployError(f"DATASETS.{part} gives no images: name a set, or give --images.")
    return [record["file_name"] for record in pick(records, count)]


def _weight_bytes(model: nn.Module) -> int:
    return sum(x.nbytes for x in model.state_dict().values())


def _check_annotated(cfg: CfgNode) -> None:
    names = cfg.DATASETS.TEST[:1]
    if not any(r.get("annotations") for name in names for r in DatasetCatalog.get(name)):
        raise DeployError(f"--evaluate: the set {' '.join(names)} (DATASETS.TEST) has no objects.")


def _average_precision(cfg: CfgNode, model: Callable) -> float:
    """COCO AP (0 to 100) on the first set of DATASETS.TEST."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
        cfg.INPUT.FORMAT = channel_order(model)
        return FgBgTrainer.test(cfg, model)["bbox"]["AP"]
