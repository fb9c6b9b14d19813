#!/usr/bin/env python
"""Measures the cost of detectors: parameters, GFLOPs and latency. Compares teacher and student.

Example:
    tools/analyze.py configs/COCO-Detection/retinanet_R50_3x_to_MobileNetV3_1x.yaml
    tools/analyze.py COCO-Detection/retinanet_R_101_FPN_3x.yaml my_student.yaml --size 480 640

A config is a name of the model zoo, or a local .yaml or .py file. The weights are random. Therefore
nothing is downloaded, and NMS has few detections.
"""

import argparse
import sys

import _quiet
import torch
from _arguments import add_import_flag

from fgbg_kd.experiments.cost import costs_of, table
from fgbg_kd.utils.errors import FgBgError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(800, 1333),
        metavar=("H", "W"),
        help="of the image, in pixels",
    )
    parser.add_argument(
        "--runs", type=int, default=10, help="calls; latency is their median; default: %(default)s"
    )
    add_import_flag(parser)
    args = parser.parse_args()
    try:
        torch.zeros(1, device=args.device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # AssertionError: PyTorch was built without CUDA
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    rows, two_stage = costs_of(
        args.configs,
        tuple(args.size),
        args.device,
        args.runs,
        say=lambda name: print(f"{name} ...", file=sys.stderr),
    )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(f"one image of {args.size[0]}x{args.size[1]}, {device}, fp32\n\n{table(rows)}")
    if two_stage:
        print("\nGFLOPs of a two-stage detector: only its backbone and RPN are counted.")


if __name__ == "__main__":
    try:
        main()
    except FgBgError as error:
        _quiet.stop("analyze", error)
