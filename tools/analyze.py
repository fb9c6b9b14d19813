#!/usr/bin/env python
"""What detectors cost: parameters, GFLOPs and latency; teacher and student side by side.

Example:
    tools/analyze.py configs/COCO-Detection/retinanet_R50_3x_to_MobileNetV3_1x.yaml
    tools/analyze.py COCO-Detection/retinanet_R_101_FPN_3x.yaml my_student.yaml --size 480 640

A config is a zoo name, or a local .yaml or .py file. Weights are random, so nothing is fetched, and
NMS has little to do.
"""

import argparse
import sys

import _quiet  # noqa: F401
import torch

from fgbg_kd.experiments.cost import cost, detectors_of, table
from fgbg_kd.utils.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=10, help="of which the latency is the median")
    args = parser.parse_args()
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA in it
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    example = {"image": torch.randint(256, (3, *args.size)).float()}
    rows, two_stage = [], False
    for config in args.configs:
        detectors = detectors_of(config)
        for role, detector in detectors.items():
            two_stage |= not hasattr(detector, "head_in_features")
            name = f"{role} of {config}" if len(detectors) > 1 else config
            print(f"{name} ...", file=sys.stderr)
            rows.append({"name": name, **cost(detector.to(args.device), example, args.runs)})
        if len(detectors) > 1:
            teacher, student = rows[-2:]
            ratio = {k: f"{student[k] / teacher[k]:.2f}" for k in student if k != "name"}
            rows.append({"name": "student / teacher", **ratio})
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(f"one image of {args.size[0]}x{args.size[1]}, {device}, fp32\n\n{table(rows)}")
    if two_stage:
        print("\nGFLOPs of a two-stage detector are those of its backbone and RPN.")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"analyze: {error}")
