#!/usr/bin/env python
"""Times the operators, or whole training steps, and counts what they must read and write.

Example:
    tools/benchmark.py ops --plot ops.png         split, cosine, comparison on FPN shapes, on a GPU
    tools/benchmark.py ops --counts-only          what needs no GPU: bytes, launches, memory
    tools/benchmark.py step --device cpu --images 2 --size 384 640
        --methods FgBg "FgBg GATE=off" PKD        steps: plain, teacher, each method (R101 to R50)

Times are p20 / p50 / p80 over runs: of CUDA events on a GPU, of the wall clock on a CPU.
"""

import argparse
import csv
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import _quiet  # noqa: F401
import torch
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for the memory of the kernels on the CPU

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator  # noqa: E402
from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from fgbg_kd import FgBgDistiller  # noqa: E402
from fgbg_kd.comparison import PLAIN, method_overrides  # noqa: E402
from fgbg_kd.config import method_options  # noqa: E402
from fgbg_kd.detector import build_detector, read_detector_config  # noqa: E402
from fgbg_kd.distiller import run_dense  # noqa: E402
from fgbg_kd.engine import read_config  # noqa: E402
from fgbg_kd.ops import DenseOutput, compare_predictions, cosine_loss, split  # noqa: E402
from fgbg_kd.teacher import PRECISIONS, precision  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "configs"
R101_TO_R50 = str(CONFIGS / "COCO-Detection" / "retinanet_R101_3x_to_R50_1x.yaml")
STRIDES = (8, 16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quantiles(function, device: str, seconds: float) -> tuple[float, float, float]:
    """p20, p50, p80 in milliseconds, after warming up."""
    return quantiles_in_turn({"": function}, device, seconds)[""]


def quantiles_in_turn(calls: dict, device: str, seconds: float) -> dict:
    """:func:`quantiles` of several functions by name, called in turn: what else the machine does
    meets all of them alike."""
    for function in calls.values():
        for _ in range(3):
            function()
    times, stop = {name: [] for name in calls}, time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or (time.perf_counter() < stop and rounds < 500):
        rounds += 1
        for name, function in calls.items():
            times[name].append(milliseconds(function, device))
    at = torch.tensor([0.2, 0.5, 0.8])
    return {
        name: tuple(round(v, 3) for v in torch.tensor(found).quantile(at).tolist())
        for name, found in times.items()
    }


def milliseconds(function, device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def random_boxes(count: int, height: int, width: int, generator) -> torch.Tensor:
    """(count, 4) XYXY, sides from 8 pixels to half the image, log-uniform."""
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(height / 16)) * 8
    return torch.cat([corner - side / 2, corner + side / 2], dim=1)


CASES = {  # images of 800x1333, anchors a cell
    "RetinaNet, 16 images": (16, 9),
    "RetinaNet, 2 images": (2, 9),
    "FCOS, 16 images": (16, 1),
}
SIZE, BOXES, CHANNELS, CLASSES = (800, 1333), 20, 256, 80
IMPLS = ("torch", "compile", "triton")


class Scene:
    """Random boxes, features and predictions of one case, and the three operators on them."""

    def __init__(self, images: int, anchors: int, size, dtype: str, device: str):
        generator = torch.Generator().manual_seed(0)
        self.shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
        self.sizes, self.anchors, self.itemsize = [size] * images, anchors, DTYPES[dtype].itemsize
        at = "cpu" if device == "meta" else device  # maps without content still have counts
        self.boxes = [random_boxes(BOXES, *size, generator).to(at) for _ in range(images)]
        self.classes = torch.randint(CLASSES, (images, BOXES), generator=generator).to(at)
        self.cells = self.split("torch")
        self.detector = SimpleNamespace(
            num_classes=CLASSES,
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[4 * s * 1.26**i for i in range(3)] for s in STRIDES]
                if anchors == 9
                else [[4 * s] for s in STRIDES],
                aspect_ratios=[[0.5, 1.0, 2.0] if anchors == 9 else [1.0]],
                strides=STRIDES,
            ).to(device),
        )

        def maps(channels):
            return [
                torch.randn(images, channels, h, w, device=device, dtype=DTYPES[dtype])
                for h, w in self.shapes
            ]

        self.student, self.teacher = (
            DenseOutput(maps(CHANNELS), maps(anchors * CLASSES), maps(anchors * 4)) for _ in "st"
        )

    def split(self, impl):
        return split(self.boxes, self.sizes, self.shapes, STRIDES, impl=impl)

    def cosine(self, features, impl):
        return cosine_loss(features, self.teacher.features, self.cells.weight, impl)

    def compare(self, logits, impl):
        found = compare_predictions(
            self.student._replace(logits=logits),
            self.teacher,
            (self.detector, self.detector),
            self.cells,
            self.classes,
            STRIDES,
            boxes=False,  # as the gate has it by default
            impl=impl,
        )
        gate = (found.teacher_quality > found.student_quality).float()
        return (gate * found.kl).sum()

    def counts(self) -> dict[str, tuple[float, float, int]]:
        """Per operator: the least bytes that forward and backward can move, those that the kernels
        move, and launches of kernels. Every background cell counts as open in the gate."""
        cells = self.cells.box_index.numel()
        fg, bg = (x.sum().item() for x in (self.cells.foreground, self.cells.background))
        feature, logit = CHANNELS * self.itemsize, self.anchors * CLASSES * self.itemsize
        # Foreground cells: both maps in, twice; all cells: the gradient out.
        cosine = 4 * fg * feature + cells * feature
        # Background cells likewise; of foreground cells the own class of each anchor.
        compare = 4 * bg * logit + 2 * fg * self.anchors * self.itemsize + cells * logit
        return {
            "split": (4 * cells, 4 * cells, 1),
            # weight in, 3 sums out; 2 factors in
            "cosine": (cosine, cosine + cells * 4 * (4 + 2), 2 * len(STRIDES)),
            # owner in, KL and qualities out; weight in
            "compare": (compare, compare + cells * 4 * (4 + 1), 2 * len(STRIDES)),
        }


def peak_memory(function) -> int:
    """Bytes that a call on the CPU holds at most, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return int(held.cumsum(0).max())


def operators(args) -> list[dict]:
    """Rows of the operators' table; times only where the device is a GPU."""
    rows, timing = [], args.device == "cuda" and not args.counts_only
    copy = copy_bandwidth(args) if timing else None
    for case, (images, anchors) in CASES.items():
        scene = Scene(images, anchors, SIZE, args.dtype, args.device if timing else "meta")
        for operator, (least, moved, launches) in scene.counts().items():
            row = {"case": case, "operator": operator, "least MB": least / 1e6}
            row |= {"moved MB": moved / 1e6, "moved / least": moved / least, "launches": launches}
            rows.append(rounded(row))
        if timing:
            rows += timed(case, scene, args, copy)
    if not timing:
        print("times: not run (they need a GPU)")
        rows += extra_memory(args)
    elif args.plot:
        draw(rows, args.plot)
    return rows


def rounded(row: dict) -> dict:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def gradient(function, leaves: list, impl: str) -> tuple:
    return torch.autograd.grad(function(leaves, impl), leaves)


def extra_memory(args) -> list[dict]:
    """Peak memory of forward and backward beside inputs and gradient, on small maps on the CPU."""
    scene = Scene(1, 9, (64, 96), args.dtype, "cpu")
    rows = []
    for operator, maps in (("cosine", scene.student.features), ("compare", scene.student.logits)):
        whole = sum(x.numel() * x.element_size() for x in maps)
        leaves = [x.requires_grad_() for x in maps]
        for impl in ("torch", "triton"):
            step = partial(gradient, getattr(scene, operator), leaves, impl)
            step()
            extra = peak_memory(step) / whole - 1
            row = {"case": "1 image of 64x96", "operator": operator, "impl": impl}
            rows.append(rounded(row | {"extra memory / maps": extra}))
    return rows


def copy_bandwidth(args) -> float:
    """GB/s of a copy of 268 MB on the device, read and write together."""
    source = torch.empty(2**28, dtype=torch.uint8, device=args.device)
    copied = torch.empty_like(source)
    _, p50, _ = quantiles(lambda: copied.copy_(source), args.device, args.seconds)
    print(f"copy: {2 * 0.268 / p50 * 1e3:.0f} GB/s")
    return 2 * 0.268 / p50 * 1e3


def timed(case: str, scene: Scene, args, copy: float) -> list[dict]:
    rows = []

    def measure(operator, impl, mode, call, least=0.0, whole=0):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        p20, p50, p80 = quantiles(call, "cuda", args.seconds)
        row = {"case": case, "operator": operator, "impl": impl, "mode": mode}
        row |= {"p20 ms": p20, "p50 ms": p50, "p80 ms": p80}
        if whole:
            extra = (torch.cuda.max_memory_allocated() - before) / whole - 1
            row |= {"of copy bandwidth": least / 1e6 / p50 / copy, "extra memory / maps": extra}
        rows.append(rounded(row))

    for impl in ("torch", "triton"):
        measure("split", impl, "forward", lambda impl=impl: scene.split(impl))
    least = {operator: bytes_moved for operator, (bytes_moved, *_) in scene.counts().items()}
    for operator, maps in (("cosine", scene.student.features), ("compare", scene.student.logits)):
        function = getattr(scene, operator)
        leaves = [x.requires_grad_() for x in maps]
        whole = sum(x.numel() * x.element_size() for x in maps)
        for impl in IMPLS:
            call = torch.compile(function) if impl == "compile" else function
            kind = "torch" if impl == "compile" else impl
            with torch.no_grad():
                measure(operator, impl, "forward", partial(call, leaves, kind))
            step = partial(gradient, call, leaves, kind)
            measure(operator, impl, "forward+backward", step, least[operator], whole)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Bars of p50 with p20 to p80, an axis for each operator and mode, of the first case."""
    import matplotlib.pyplot as plt

    case = next(iter(CASES))
    panels = {}
    for row in (r for r in rows if r["case"] == case and "p50 ms" in r):
        panels.setdefault((row["operator"], row["mode"]), []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), squeeze=False)
    for axis, ((operator, mode), measured) in zip(axes[0], panels.items()):
        p50 = [r["p50 ms"] for r in measured]
        spread = [[r["p50 ms"] - r["p20 ms"] for r in measured]]
        spread += [[r["p80 ms"] - r["p50 ms"] for r in measured]]
        axis.bar([r["impl"] for r in measured], p50, yerr=spread)
        axis.set(title=f"{operator}, {mode}", ylabel="ms")
    figure.suptitle(f"{case}, {torch.cuda.get_device_name()}")
    figure.tight_layout()
    figure.savefig(path)


def pair(config_file: str, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Student and teacher of a config that distils, with random weights."""
    cfg = read_detector_config(config_file)
    torch.manual_seed(0)
    student, teacher = map(build_detector, (cfg, read_detector_config(cfg.MODEL.KD.TEACHER.CONFIG)))
    return student.to(device).train(), teacher.to(device).eval().requires_grad_(False)


def options_of(config_file: str, spec: str) -> dict:
    """The options of a method that compare.py would call `spec`."""
    if spec.split()[0] == PLAIN:
        sys.exit(f"benchmark: {spec!r}: the plain step is timed in any case.")
    overrides = method_overrides(read_config(config_file), spec)
    options = method_options(read_config(config_file, overrides))
    for key in overrides[4::2]:  # after the meta-architecture and the method
        if key.rpartition(".")[2].lower() not in options:
            sys.exit(f"benchmark: {spec!r}: {key} is no option of the method.")
    return options


def steps(args) -> list[dict]:
    """Plain step, teacher's forward pass and step of each method, on random images and boxes."""
    (height, width), device = args.size, args.device
    student, teacher = pair(args.config_file, device)
    distillers = {
        spec: FgBgDistiller(
            student=student,
            teacher=teacher,
            teacher_precision=args.precision,
            kd={"method": spec.split()[0], **options_of(args.config_file, spec)},
        ).train()
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
            with EventStorage(0):
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
    (_, plain, _), (_, forward, _) = list(found.values())[:2]
    for name, (p20, p50, p80) in found.items():
        row = {"what": name, "p20 ms": p20, "p50 ms": p50, "p80 ms": p80}
        if name != "teacher forward":
            row |= {"over plain": p50 / plain, "over plain + teacher": p50 / (plain + forward)}
        rows.append(rounded(row))
    return rows


def show(rows: list[dict], path: Path | None) -> None:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |")
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ops", "step"))
    parser.add_argument("--config-file", default=R101_TO_R50, metavar="FILE", help="of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=16, help="of a step")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE, metavar=("H", "W"))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the operators' maps")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the teacher")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["FgBg"],
        metavar="METHOD",
        help='whose steps, as compare.py names them: PKD "FgBg GATE=off"',
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--counts-only", action="store_true", help="no timing")
    parser.add_argument("--plot", type=Path, help="of the operators' times, a picture")
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    args = parser.parse_args()
    if args.device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    show(operators(args) if args.what == "ops" else steps(args), args.csv)


if __name__ == "__main__":
    sys.exit(main())
