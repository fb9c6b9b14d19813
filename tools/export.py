#!/usr/bin/env python
"""Writes a trained detector into an ONNX or TorchScript file, checks it, and times it.

Examples:
    tools/export.py --config-file my_student.yaml --weights output/distilled/model_final.pth \\
        --output student.onnx
    tools/export.py --config-file my_student.yaml --weights output/distilled/model_final.pth \\
        --output student.onnx --int8 static --evaluate

The file takes one image, uint8 RGB (H, W, 3) of any size, and gives boxes, scores and classes.
--int8 writes a second one, student.int8.onnx. Needs `pip install -e '.[export]'`.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

import _quiet  # noqa: F401
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.utils.logger import setup_logger

from fgbg_kd import deploy
from fgbg_kd.detectors.dense import channel_order
from fgbg_kd.engine import FgBgTrainer, load_config
from fgbg_kd.experiments.cost import latency, pick, table
from fgbg_kd.utils.files import whole


def read(paths, about: dict) -> list[np.ndarray]:
    return [deploy.resized(utils.read_image(str(p), "RGB"), about) for p in paths]


def some_of(cfg, part: str, count: int) -> list[str]:
    """Files of the set that DATASETS.TRAIN or TEST names first."""
    records = [r for name in cfg.DATASETS[part][:1] for r in DatasetCatalog.get(name)]
    if not records:
        raise ValueError(f"DATASETS.{part} gives no images.")
    return [record["file_name"] for record in pick(records, count)]


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in model.state_dict().values())


def check_annotated(cfg) -> None:
    if not any(r.get("annotations") for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])):
        raise ValueError(f"--evaluate: the set {cfg.DATASETS.TEST[0]} has no annotations.")


def average_precision(cfg, model) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR, cfg.DATASETS.TEST = folder, cfg.DATASETS.TEST[:1]
        cfg.INPUT.FORMAT = channel_order(model)
        return FgBgTrainer.test(cfg, model)["bbox"]["AP"]


def export_checked(model, about: dict, output: Path, images: list[np.ndarray], nms_inside: bool):
    """Writes the file; one that is there already stays until the new one has proved good."""
    if output.is_dir():
        raise ValueError(f"{output} is a folder: give the name of a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole(output) as partial:
        partial.touch()  # shows whether it can be written
        deploy.export(model, about, str(partial), images[0], nms_inside)
        exported = deploy.ExportedDetector(str(partial))
        found = deploy.agreement(model, exported, about, images)
        if math.isnan(found["partners"]):
            raise ValueError(
                f"{output} is not written: it cannot be checked on images where nothing is "
                "detected. Give --images with objects, and trained weights."
            )
        print(
            f"{output}: {found['detections']} detections by PyTorch in {len(images)} images, "
            f"{found['partners']:.2%} of its and the file's have a partner; scores differ by up to "
            f"{found['score']:.1e}, corners by up to {found['pixels']:.1e} pixels."
        )
        if found["partners"] < 0.99:
            raise ValueError(f"{output} is not written: it did not do what PyTorch does.")
    return exported


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the student")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its model_final.pth")
    parser.add_argument("--output", required=True, help="name.onnx, or name.pt for TorchScript")
    parser.add_argument(
        "--nms", choices=("inside", "outside"), default="inside", help="default: %(default)s"
    )
    parser.add_argument(
        "--int8",
        choices=("static", "dynamic"),
        help="ranges of activations: from images of the training set, or anew in each image",
    )
    parser.add_argument("--calibration", type=int, default=64, help="so many images of it")
    parser.add_argument(
        "--images", nargs="+", metavar="FILE", help="to check it on; default: 8 of DATASETS.TEST"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="AP of each on the (first) set of DATASETS.TEST"
    )
    args = parser.parse_args()
    if Path(args.output).suffix not in deploy.FORMATS:
        parser.error("--output: a name in .onnx, or in .pt for TorchScript")
    if args.int8 and not args.output.endswith(".onnx"):
        parser.error("--int8 is for an --output in .onnx")
    setup_logger(name="fgbg_kd")
    setup_logger()

    model, about = deploy.load_for_deployment(args.config_file, args.weights)
    cfg = None
    if args.evaluate or not args.images or args.int8 == "static":
        cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu"])
    images = read(args.images or some_of(cfg, "TEST", 8), about)
    if args.evaluate:
        check_annotated(cfg)
    exported = export_checked(model, about, Path(args.output), images, args.nms == "inside")

    models = {"PyTorch": model, args.output: exported}
    if args.int8:
        smaller = str(Path(args.output).with_suffix(".int8.onnx"))
        calibration = None
        if args.int8 == "static":
            calibration = read(some_of(cfg, "TRAIN", args.calibration), about)
        deploy.quantize(args.output, smaller, calibration)
        models[smaller] = deploy.ExportedDetector(smaller)

    calls = {
        name: lambda i, m=m: deploy.detect(m, about, images[i % len(images)])
        for name, m in models.items()
    }
    rows, milliseconds = [], latency(calls)
    for name, detector in models.items():
        size = os.path.getsize(name) if detector is not model else weight_bytes(model)
        row = {"detector": name, "MB": f"{size / 1e6:.2f}"}
        row["ms_per_image"] = f"{milliseconds[name]:.2f}"
        if args.evaluate:
            row["AP"] = f"{average_precision(cfg, detector):.2f}"
        rows.append(row)
    print(f"\n{torch.get_num_threads()} threads, NMS included\n\n{table(rows)}")


if __name__ == "__main__":
    try:
        main()
    except (deploy.DeployError, ValueError, OSError) as error:
        sys.exit(f"export: {error}")
