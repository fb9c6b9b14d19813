#!/usr/bin/env python
"""Times training steps in turn: plain, the teacher's forward pass, and each method.

Example:
    tools/benchmark_step.py --images 2 --size 384 640 --methods FgBg "FgBg GATE=off" PKD

The pair is RetinaNet R101 to R50 if no config is named, weights, images and boxes are random.
Times are p20 / p50 / p80 over runs: of CUDA events on a GPU, of the wall clock on a CPU.
"""

import argparse
import sys
from pathlib import Path

import _quiet  # noqa: F401
import torch
from _benchmark import describe, quantiles_in_turn, random_boxes, rounded, show
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fgbg_kd import FgBgDistiller
from fgbg_kd.config import method_options
from fgbg_kd.detectors.load import build_detector, read_detector_config
from fgbg_kd.distiller import run_dense
from fgbg_kd.engine import read_config
from fgbg_kd.experiments.method_specs import PLAIN, method_overrides
from fgbg_kd.teacher import PRECISIONS, precision

CONFIGS = Path(__file__).parents[1] / "configs"
R101_TO_R50 = str(CONFIGS / "COCO-Detection" / "retinanet_R101_3x_to_R50_1x.yaml")
BOXES = 20  # an image
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(config_file: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Student and teacher of a config that distils, with random weights."""
    cfg = read_detector_config(config_file)
    torch.manual_seed(0)
    student, teacher = map(build_detector, (cfg, read_detector_config(cfg.MODEL.KD.TEACHER.CONFIG)))
    return student.to(device).train(), teacher.to(device).eval().requires_grad_(False)


def options_of(config_file: str, spec: str) -> dict:
    """Method and options of what compare.py would call `spec`."""
    if spec.split()[:1] == [PLAIN]:
        sys.exit(f"benchmark_step: {spec!r}: the plain step is timed in any case.")
    try:
        overrides = method_overrides(read_config(config_file), spec)
    except ValueError as error:
        sys.exit(f"benchmark_step: {error}")
    options = method_options(read_config(config_file, overrides))
    for key in overrides[4::2]:  # after the meta-architecture and the method
        if key.rpartition(".")[2].lower() not in options:
            sys.exit(f"benchmark_step: {spec!r}: {key} is no option of the method.")
    return {"method": spec.split()[0], **options}


def steps(args) -> list[dict]:
    """Plain step, teacher's forward pass and step of each method, on random images and boxes."""
    (height, width), device = args.size, args.device
    student, teacher = pair(args.config_file, device)
    distillers = {
        spec: FgBgDistiller(
            student=student,
            teacher=teacher,
            teacher_precision=args.precision,
            kd=options_of(args.config_file, spec),
        )
        .to(device)
        .train()
        for spec in args.methods
    }
    boxes_too = any(distiller.kd.needs_boxes for distiller in distillers.values())
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(args.images):
        instances = Instances((height, width))
        boxes = Boxes(random_boxes(BOXES, height, width, generator))
        boxes.clip((height, width))
        instances.gt_boxes = boxes
        instances.gt_classes = torch.randint(student.num_classes, (BOXES,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances[boxes.nonempty()]})

    def train(model):
        def step():
            with EventStorage(1):  # the first iteration of a training logs
                loss = sum(model(batch).values())
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def look():
        images = teacher.preprocess_image(batch).tensor
        with precision(args.precision, student.device):
            run_dense(teacher, images, boxes=boxes_too)

    calls = {"plain student step": train(student), "teacher forward": look}
    calls |= {f"{spec} step": train(distiller) for spec, distiller in distillers.items()}
    found = quantiles_in_turn(calls, device, args.seconds)
    rows = []
    _, plain, _ = next(iter(found.values()))
    for name, (p20, p50, p80) in found.items():
        row = {"what": name, "p20 ms": p20, "p50 ms": p50, "p80 ms": p80}
        if name != "teacher forward":
            row["over plain"] = p50 / plain
        rows.append(rounded(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=R101_TO_R50, metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=DEVICE)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the teacher")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["FgBg"],
        metavar="METHOD",
        help='as compare.py names them: PKD "FgBg GATE=off"',
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    args = parser.parse_args()
    describe(args.device)
    show(steps(args), args.csv)


if __name__ == "__main__":
    main()
