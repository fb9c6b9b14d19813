"""Exports a config's detector, checks the files, and measures size, speed and accuracy."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from ..data import register_datasets
from ..data.images import pick, read_image
from ..detectors.dense import channel_order
from ..engine import FgBgTrainer, read_run_config
from ..utils.errors import DeployError
from ..utils.timing import latency
from .checks import export_checked
from .export import load_for_deployment, quantize
from .run import ExportedDetector, detect, resized

_CHECKED_ON = 8  # images


class Exported(NamedTuple):
    """Files that :func:`export_files` has written, and what they were made from.

    Attributes:
        detectors: the detector in PyTorch ("PyTorch") and those of the files, by path.
        about: see :func:`describe`.
        images: (H, W, 3) uint8 RGB, resized for the detector. The files were checked on them.
        cfg: the config with its data; None: the data were not needed.
    """

    detectors: dict[str, Callable]
    about: dict
    images: list[np.ndarray]
    cfg: CfgNode | None


def export_config(config: str, weights: str, output: Path, **options) -> list[dict]:
    """Exports the detector of a config, checks the file, and measures the file and PyTorch.

    Args:
        config, weights, output: see :func:`export_files`.
        options: the other arguments of :func:`export_files`. With "evaluate", AP on DATASETS.TEST
            is measured.

    Returns:
        A row for each detector: "detector", "MB", "ms_per_image", and "AP" if it is measured.

    Raises:
        DeployError: see :func:`export_files`.
    """
    found = export_files(config, weights, output, **options)
    return _measured(*found[:3], found.cfg if options.get("evaluate") else None)


def export_files(
    config: str,
    weights: str,
    output: Path,
    *,
    nms_inside: bool = True,
    half: bool = False,
    int8: str = "",
    calibration: int = 64,
    images: Sequence[str] = (),
    evaluate: bool = False,
    say: Callable[[str], None] = print,
) -> Exported:
    """Exports the detector of a config, and checks the file.

    Args:
        config: a YAML config.
        weights: its checkpoint.
        output: name.onnx, name.pt for TorchScript, or name.xml for OpenVINO.
        nms_inside: False: the file returns candidates.
        half: the OpenVINO file holds its weights in fp16.
        int8: "static" or "dynamic": also writes name.int8.onnx or name.int8.xml (:func:`quantize`).
        calibration: number of training images for "static".
        images: image files for the check. Empty: 8 images of DATASETS.TEST.
        evaluate: whether AP will be measured. Then a test set without objects is refused.
        say: is called with a line of text about the check.

    Raises:
        DeployError: the detector cannot be exported, or the file and PyTorch detect different
            objects.
    """
    model, about = load_for_deployment(config, weights)
    cfg = None
    if evaluate or not images or int8 == "static":
        cfg = read_run_config(config, ["MODEL.DEVICE", "cpu"])
        register_datasets(cfg, training=int8 == "static")
    if evaluate:
        _check_annotated(cfg)
    shown = _read(images or _files(cfg, "TEST", _CHECKED_ON), about)
    exported, found = export_checked(model, about, output, shown, nms_inside, half)
    say(
        f"{output} agrees with PyTorch: {found.detections} detections in {len(shown)} images, "
        f"{found.partners:.2%} with a partner; scores differ by at most {found.score:.1e}, corners "
        f"by {found.pixels:.1e} pixels."
    )
    detectors = {"PyTorch": model, str(output): exported}
    if int8:
        smaller = str(output.with_suffix(f".int8{output.suffix}"))
        static = int8 == "static"
        photos = _read(_files(cfg, "TRAIN", calibration), about) if static else None
        quantize(str(output), smaller, photos)
        detectors[smaller] = ExportedDetector(smaller)
    return Exported(detectors, about, shown, cfg)


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
        size = _weight_bytes(model) if in_memory else _file_bytes(Path(name))
        row = {"detector": name, "MB": f"{size / 1e6:.2f}"}
        row["ms_per_image"] = f"{milliseconds[name]:.2f}"
        if cfg is not None:
            row["AP"] = f"{average_precision(cfg, model):.2f}"
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


def _file_bytes(file: Path) -> int:
    """Size of a file, with the weights beside an OpenVINO file."""
    files = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]
    return sum(f.stat().st_size for f in files)


def _check_annotated(cfg: CfgNode) -> None:
    names = cfg.DATASETS.TEST[:1]
    if not any(r.get("annotations") for name in names for r in DatasetCatalog.get(name)):
        raise DeployError(f"--evaluate: the set {' '.join(names)} (DATASETS.TEST) has no objects.")


def average_precision(cfg: CfgNode, model: Callable) -> float:
    """COCO AP (0 to 100) on the first set of DATASETS.TEST."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
        cfg.INPUT.FORMAT = channel_order(model)
        return FgBgTrainer.test(cfg, model)["bbox"]["AP"]
