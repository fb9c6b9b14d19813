#!/usr/bin/env python
"""Exports a trained detector to an ONNX, OpenVINO or TorchScript file, checks it, and times it.

Examples:
    tools/export.py --config-file my_student.yaml --weights output/distilled/model_final.pth \\
        --output student.onnx
    tools/export.py --config-file my_student.yaml --weights output/distilled/model_final.pth \\
        --output student.onnx --int8 static --evaluate
    tools/export.py --config-file my_student.yaml --weights output/distilled/model_final.pth \\
        --output student.xml --fp16 --int8 static --evaluate

The file takes one image, uint8 RGB (H, W, 3) of any size, and returns boxes, scores and classes.
--int8 also writes student.int8.onnx or student.int8.xml. ONNX needs `pip install -e '.[export]'`,
OpenVINO `pip install -e '.[openvino]'`.
"""

import argparse
from pathlib import Path

import _quiet
import torch
from _arguments import add_import_flag
from detectron2.utils.logger import setup_logger

from fgbg_kd import deploy
from fgbg_kd.utils.errors import FgBgError
from fgbg_kd.utils.markdown import table_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML config of the student"
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="its checkpoint, such as model_final.pth"
    )
    parser.add_argument(
        "--output",
        required=True,
        help="name.onnx, name.xml for OpenVINO (with name.bin), or name.pt for TorchScript",
    )
    parser.add_argument(
        "--nms",
        choices=("inside", "outside"),
        default="inside",
        help="outside: the file returns candidates, and you apply NMS; default: %(default)s",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="the OpenVINO file holds its weights in fp16"
    )
    parser.add_argument(
        "--int8",
        choices=("static", "dynamic"),
        help="also write an int8 file, with activation ranges from training images (static) or "
        "from each image when the file is run (dynamic)",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=64,
        metavar="N",
        help="number of training images for --int8 static; default: %(default)s",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="FILE",
        help="images on which the file is checked; default: 8 of DATASETS.TEST",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure AP on the first set of DATASETS.TEST"
    )
    add_import_flag(parser)
    args = parser.parse_args()
    if args.calibration < 1:
        parser.error("--calibration: give a number over 0")
    if Path(args.output).suffix not in deploy.FORMATS:
        parser.error(f"--output: give a name that ends in {' or '.join(deploy.FORMATS)}")
    if args.int8 and args.output.endswith(".pt"):
        parser.error("--int8 needs an --output that ends in .onnx or .xml")
    if args.int8 == "dynamic" and args.output.endswith(".xml"):
        parser.error("--int8 dynamic is for ONNX files. For OpenVINO, give --int8 static")
    if args.fp16 and not args.output.endswith(".xml"):
        parser.error("--fp16 needs an --output that ends in .xml")
    setup_logger(name="fgbg_kd")
    setup_logger()
    rows = deploy.export_config(
        args.config_file,
        args.weights,
        Path(args.output),
        nms_inside=args.nms == "inside",
        half=args.fp16,
        int8=args.int8 or "",
        calibration=args.calibration,
        images=args.images,
        evaluate=args.evaluate,
    )
    names = {"ms_per_image": "ms / image"}
    print(f"\n{torch.get_num_threads()} threads, with NMS\n\n{table_of(rows, names)}")


if __name__ == "__main__":
    try:
        main()
    except (FgBgError, ValueError, OSError) as error:
        _quiet.stop("export", error)
