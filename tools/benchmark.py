#!/usr/bin/env python
"""Times the operators, or whole training steps, and counts what they must read and write.

Example:
    tools/benchmark.py ops                        split, cosine and KL on FPN shapes, on the GPU
    tools/benchmark.py ops --counts-only          what needs no GPU: bytes, launches
    tools/benchmark.py step --device cpu --images 2 --size 384 640
                                                  plain, teacher and distillation step, R101 to R50

Times are p20 / p50 / p80 over runs: of CUDA events on a GPU, of the wall clock on a CPU.
"""

import argparse
import csv
import math
import sys
import time
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

from detectron2 import model_zoo  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from fgbg_kd import FgBgDistiller  # noqa: E402
from fgbg_kd.distiller import run_dense  # noqa: E402
from fgbg_kd.ops import cosine_loss, kl_loss, split  # noqa: E402
from fgbg_kd.teacher import PRECISIONS, freeze, precision  # noqa: E402

STRIDES = (8, 16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quantiles(function, device: str, seconds: float) -> tuple[float, float, float]:
    """p20, p50, p80 in milliseconds, after warming up."""
    for _ in range(3):
        function()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 500):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
    points = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8]))
    return tuple(round(v, 3) for v in points.tolist())


def random_boxes(count: int, height: int, width: int, generator) -> torch.Tensor:
    """(count, 4) XYXY, sides from 8 pixels to half the image, log-uniform."""
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(height / 16)) * 8
    return torch.cat([corner - side / 2, corner + side / 2], dim=1)


def operators(args) -> list[dict]:
    """Rows of the operators' table; times only where the device is a GPU."""
    n, (height, width), device = args.images, args.size, args.device
    generator = torch.Generator().manual_seed(0)
    shapes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    cells = sum(h * w for h, w in shapes)
    boxes = [random_boxes(args.boxes, height, width, generator) for _ in range(n)]
    moved = split(boxes, [(height, width)] * n, shapes, STRIDES)
    share = moved.foreground.float().mean().item()
    itemsize = DTYPES[args.dtype].itemsize
    channels = args.anchors * args.classes
    gate_bytes = 4 * n * cells
    counts = {
        # read boxes and write the answer; the least a split can do
        "split": (gate_bytes, gate_bytes, "1"),
        # forward: S, T of used cells and the weight in, 3 sums out; backward: S, T, 2 factors in,
        # the gradient out
        "cosine": (
            int(n * cells * args.channels * itemsize * (4 * share + 1)),
            int(n * cells * (args.channels * itemsize * (4 * share + 1) + 4 * 8)),
            "2 a level",
        ),
        # forward: both maps of used cells in; backward: both in, grad out
        "kl": (
            int(n * cells * channels * itemsize * (4 * (1 - share) + 1)),
            int(n * cells * (channels * itemsize * (4 * (1 - share) + 1) + 4 * 4)),
            "2 a level",
        ),
    }
    rows = []
    print(f"{n} images {height}x{width}, {args.boxes} boxes, {share:.0%} foreground, {args.dtype}")
    for name, (least, bytes_moved, launches) in counts.items():
        row = {"operator": name, "least MB": least / 1e6, "kernels move MB": bytes_moved / 1e6}
        row |= {"over least": bytes_moved / least, "kernel launches": launches}
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if args.counts_only or device != "cuda":
        print("times: not run (they need a GPU)")
        return rows

    def features(c):
        return [torch.randn(n, c, h, w, device=device, dtype=DTYPES[args.dtype]) for h, w in shapes]

    boxes = [b.to(device) for b in boxes]
    weight, background = moved.weight.to(device), moved.background.float().to(device)
    student, teacher = features(args.channels), features(args.channels)
    logits = [features(channels), features(channels)]

    def timed(name, forward, inputs):
        for impl in ("torch", "compile", "triton"):
            call = torch.compile(forward) if impl == "compile" else forward
            kind = "torch" if impl == "compile" else impl
            leaves = [x.detach().requires_grad_() for x in inputs]

            def step(call=call, kind=kind, leaves=leaves):
                torch.autograd.grad(call(leaves, kind), leaves)

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            p20, p50, p80 = quantiles(step, device, args.seconds)
            extra = (torch.cuda.max_memory_allocated() - before) / 1e6
            rows.append(
                {"operator": f"{name}, forward+backward", "impl": impl, "p20 ms": p20}
                | {"p50 ms": p50, "p80 ms": p80, "peak extra MB": round(extra, 1)}
            )

    for impl in ("torch", "triton"):
        p20, p50, p80 = quantiles(
            lambda impl=impl: split(boxes, [(height, width)] * n, shapes, STRIDES, impl=impl),
            device,
            args.seconds,
        )
        rows.append(
            {"operator": "split", "impl": impl, "p20 ms": p20, "p50 ms": p50, "p80 ms": p80}
        )
    timed("cosine", lambda s, impl: cosine_loss(s, teacher, weight, impl), student)
    timed(
        "kl",
        lambda s, impl: kl_loss(s, logits[1], background, args.classes, "sigmoid", 1.0, impl),
        logits[0],
    )
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    _, p50, _ = quantiles(lambda: copied.copy_(source), device, args.seconds)
    rows.append({"operator": "copy, 268 MB", "p50 ms": p50, "GB/s": round(2 * 0.268 / p50 * 1e3)})
    return rows


def steps(args) -> list[dict]:
    """Plain step, teacher's forward pass and distillation step, RetinaNet R101 to R50."""
    (height, width), device = args.size, args.device
    models = {}
    for name in ("R_50_FPN_1x", "R_101_FPN_3x"):
        cfg = model_zoo.get_config(f"COCO-Detection/retinanet_{name}.yaml")
        cfg.MODEL.DEVICE = device
        torch.manual_seed(0)
        models[name] = build_model(cfg)
    student, teacher = models["R_50_FPN_1x"].train(), freeze(models["R_101_FPN_3x"])
    distiller = FgBgDistiller(
        student=student,
        teacher=teacher,
        teacher_precision=args.precision,
        kd={"gate": args.gate},
    ).train()
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(args.images):
        instances = Instances((height, width))
        boxes = Boxes(random_boxes(args.boxes, height, width, generator))
        boxes.clip((height, width))
        instances.gt_boxes = boxes
        instances.gt_classes = torch.randint(80, (args.boxes,), generator=generator)
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
        with precision(args.precision, student.device):
            run_dense(teacher, teacher.preprocess_image(batch).tensor)

    rows = []
    for name, function in (
        ("plain student step", train(student)),
        ("teacher forward", look),
        ("distillation step", train(distiller)),
    ):
        p20, p50, p80 = quantiles(function, device, args.seconds)
        rows.append({"what": name, "p20 ms": p20, "p50 ms": p50, "p80 ms": p80})
        print(f"{name}: {p50:.0f} ms", flush=True)
    plain, forward, whole = (row["p50 ms"] for row in rows)
    print(f"distillation / plain: {whole / plain:.3f}")
    print(f"distillation / (plain + teacher forward): {whole / (plain + forward):.3f}")
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--boxes", type=int, default=20, help="of an image")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--anchors", type=int, default=9, help="9: RetinaNet; 1: FCOS")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the teacher")
    parser.add_argument("--gate", default="cell", help="as MODEL.KD.GATE")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--counts-only", action="store_true", help="no timing")
    parser.add_argument("--csv", type=Path, help="write the rows there, too")
    args = parser.parse_args()
    if args.device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    show(operators(args) if args.what == "ops" else steps(args), args.csv)


if __name__ == "__main__":
    sys.exit(main())
