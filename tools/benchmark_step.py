#!/usr/bin/env python
"""Times the plain training step, the teacher's forward pass and the step of each method, in turn.

Example:
    tools/benchmark_step.py --images 2 --size 384 640 --methods FgBg "FgBg GATE=False" PKD

Weights, images and boxes are random. Times are the 20 %, 50 % and 80 % quantiles. They are measured
with CUDA events on a GPU, and with the wall clock on a CPU.
"""

import argparse
import logging
from pathlib import Path

import _quiet
import torch
from _arguments import add_import_flag
from _benchmark import describe, quantiles_in_turn, random_boxes, rounded, show
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fgbg_kd import FgBgDistiller
from fgbg_kd.config import method_options
from fgbg_kd.detectors.load import build_detector, read_detector_config, starts_trained
from fgbg_kd.engine import read_config
from fgbg_kd.experiments.method_specs import method_overrides
from fgbg_kd.matching import dense_student
from fgbg_kd.methods import get_method
from fgbg_kd.teacher import PRECISIONS, Teacher
from fgbg_kd.utils.errors import FgBgError

CONFIGS = Path(__file__).parents[1] / "configs"
R101_TO_R50 = str(CONFIGS / "COCO-Detection" / "retinanet_R101_3x_to_R50_1x.yaml")
BOXES = 20  # per image
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(config_file: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Builds student and teacher of a config that distils, with random weights."""
    cfg = read_detector_config(config_file)
    torch.manual_seed(0)
    student, teacher = map(build_detector, (cfg, read_detector_config(cfg.MODEL.KD.TEACHER.CONFIG)))
    return student.to(device).train(), teacher.to(device).eval().requires_grad_(False)


def method_of(config_file: str, spec: str) -> dict:
    """Name and options of a method such as "PKD WEIGHT=2", for FgBgDistiller."""
    get_method(spec.split(maxsplit=1)[0])  # refuses "plain": the plain step is timed anyway
    cfg = read_config(config_file, method_overrides(read_config(config_file), spec))
    return {"name": cfg.MODEL.KD.METHOD, **method_options(cfg)}


def random_batch(images: int, height: int, width: int, channels: int, classes: int) -> list[dict]:
    """A batch of Detectron2's model inputs with random pixels and boxes."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        instances = Instances((height, width))
        boxes = Boxes(random_boxes(BOXES, height, width, generator))
        boxes.clip((height, width))
        instances.gt_boxes = boxes
        instances.gt_classes = torch.randint(classes, (BOXES,), generator=generator)
        image = torch.randint(
            256, (channels, height, width), generator=generator, dtype=torch.uint8
        )
        batch.append({"image": image, "instances": instances[boxes.nonempty()]})
    return batch


def steps(args) -> list[dict]:
    """Measures the plain step, the teacher's forward pass and the step of each method, as rows."""
    student, detector = pair(args.config_file, args.device)
    pretrained = starts_trained(read_detector_config(args.config_file))
    teacher = Teacher(detector, precision=args.precision)
    distillers = {
        spec: FgBgDistiller(
            student=student,
            teacher=teacher,
            method=method_of(args.config_file, spec),
            pretrained=pretrained,
        )
        .to(args.device)
        .train()
        for spec in args.methods
    }
    of = dense_student(student)
    channels = len(of.normalization[0])
    batch = random_batch(args.images, *args.size, channels, of.num_classes)
    methods = [distiller.method for distiller in distillers.values() if distiller.method]
    logits = any(method.needs_logits for method in methods)

    def train(model):
        def step():
            with EventStorage(1):  # iteration 1 logs no statistics
                loss = sum(model(batch).values())
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def look():
        teacher(of.preprocess(batch), batch, of, logits=logits)

    calls = {"plain student step": train(student), "teacher forward": look}
    calls |= {f"{spec} step": train(distiller) for spec, distiller in distillers.items()}
    found = quantiles_in_turn(calls, args.device, args.seconds)
    rows = []
    _, plain, _ = next(iter(found.values()))
    for name, (p20, p50, p80) in found.items():
        row = {"step": name, "p20 ms": p20, "p50 ms": p50, "p80 ms": p80}
        if name != "teacher forward":
            row["relative to plain"] = p50 / plain
        rows.append(rounded(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default=R101_TO_R50,
        metavar="FILE",
        help="a config that distils; default: RetinaNet R101 to R50",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default=DEVICE)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the teacher's forward pass"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["FgBg"],
        metavar="METHOD",
        help='named as in compare.py: PKD "FgBg GATE=False"',
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--csv", type=Path, help="also write the rows there")
    add_import_flag(parser)
    args = parser.parse_args()
    describe(args.device)
    show(steps(args), args.csv)


if __name__ == "__main__":
    logging.getLogger("fgbg_kd").setLevel(logging.ERROR)
    try:
        main()
    except (FgBgError, ValueError, OSError) as error:
        _quiet.stop("benchmark_step", error)
