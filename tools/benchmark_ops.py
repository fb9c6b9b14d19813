#!/usr/bin/env python
"""Times the operators (split, features, predictions) and counts the bytes that they read and write.

Example:
    tools/benchmark_ops.py --plot ops.png         times on the shapes of an FPN; needs a GPU
    tools/benchmark_ops.py --counts-only          bytes, launches and memory; needs no GPU
    tools/benchmark_ops.py --impls torch triton   without torch.compile, which takes minutes

Times are the 20 %, 50 % and 80 % quantiles of the GPU time, measured with CUDA events. As in a
training step, the host issues the work before the GPU needs it. "host ms" is the time that the host
needs for this.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import _quiet  # noqa: F401
import torch
from torch.profiler import ProfilerActivity, profile

TIMED = torch.cuda.is_available() and "--counts-only" not in sys.argv
if not TIMED:
    os.environ["TRITON_INTERPRET"] = "1"  # runs the kernels on the CPU to measure their memory

from _benchmark import (  # noqa: E402
    describe,
    host_seconds,
    quantiles,
    random_boxes,
    rounded,
    show,
)

from fgbg_kd.ops import (  # noqa: E402
    compare_features,
    compare_predictions,
    split,
    teacher_gate,
)
from fgbg_kd.ops.features_triton import CELLS as FEATURES_CELLS  # noqa: E402
from fgbg_kd.ops.standardise_triton import CELLS as MOMENTS_CELLS  # noqa: E402

CASES = {  # number of images of 800x1333, anchors per cell
    "RetinaNet, 16 images": (16, 9),
    "RetinaNet, 2 images": (2, 9),
    "FCOS, 16 images": (16, 1),
}
STRIDES = (8, 16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZE, BOXES, CHANNELS, CLASSES = (800, 1333), 20, 256, 80
IMPLS = ("torch", "compile", "triton")


class Scene:
    """Random boxes, features and predictions of a case, and the three operators on them."""

    def __init__(self, images: int, anchors: int, size, dtype: str, device: str):
        generator = torch.Generator().manual_seed(0)
        self.shapes = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]
        self.sizes, self.anchors, self.itemsize = [size] * images, anchors, DTYPES[dtype].itemsize
        at = "cpu" if device == "meta" else device  # counts need no content of the maps
        self.boxes = [random_boxes(BOXES, *size, generator).to(at) for _ in range(images)]
        self.classes = torch.randint(CLASSES, (images, BOXES), generator=generator).to(at)
        self.cells = self.split("torch")

        def maps(channels):
            return [
                torch.randn(images, channels, h, w, device=device, dtype=DTYPES[dtype])
                for h, w in self.shapes
            ]

        self.student_features, self.teacher_features = maps(CHANNELS), maps(CHANNELS)
        self.logits, self.teacher_logits = maps(anchors * CLASSES), maps(anchors * CLASSES)

    def split(self, impl):
        return split(self.boxes, self.sizes, self.shapes, STRIDES, assign="scale", impl=impl)

    def features(self, features, impl):
        """Both terms of features, of foreground and background, with a gate of 1."""
        cells = self.cells
        cosine, distance = compare_features(
            features, self.teacher_features, cells.real, cells.real, impl
        )
        return (cells.weight * distance + cells.background * (1 - cosine)).sum()

    def predictions(self, logits, impl):
        """Compares as FgBg does by default."""
        found = compare_predictions(
            logits, self.teacher_logits, self.cells, self.classes, CLASSES, impl=impl
        )
        gate = teacher_gate(found.student_quality, found.teacher_quality, self.cells)
        return (gate * found.kl).sum()

    def counts(self) -> dict[str, tuple[float, float, int]]:
        """Memory traffic of forward and backward by operator, with a gate of 1 in all cells.

        Returns:
            For each operator: the smallest possible number of bytes, the number of bytes that the
            kernels move, and the number of kernel launches.
        """
        cells = self.cells.box_index.numel()
        fg, bg = (x.sum().item() for x in (self.cells.foreground, self.cells.background))
        feature, logit = CHANNELS * self.itemsize, self.anchors * CLASSES * self.itemsize
        # Read: both maps, four times. Mean and variance need a pass before the products. Backward,
        # the sums per channel need a pass before the gradient. Written: the gradient.
        features = (8 * (fg + bg) + cells) * feature
        # Marks of cells, 3 sums and 2 factors per cell; moments and sums per tile and channel.
        tiles = 4 * CHANNELS * cells * (2 * 2 * 3 / MOMENTS_CELLS + 2 * 2 / FEATURES_CELLS)
        features_extra = cells * (4 * 1 + 4 * (3 + 2 * 2)) + tiles
        # Read: both maps in background cells, forward and backward. In foreground cells, the score
        # of the owner's class for each anchor, in both maps. Written: the whole gradient.
        predictions = 4 * bg * logit + 2 * fg * self.anchors * self.itemsize + cells * logit
        return {
            "split": (4 * cells, 4 * cells, 1),
            "features": (features, features + features_extra, 5 * len(STRIDES)),
            # Forward, they also read the owner and write KL and qualities. Backward, a weight.
            "predictions": (predictions, predictions + cells * 4 * (4 + 1), 2 * len(STRIDES)),
        }


def peak_memory(function) -> int:
    """Peak memory of a call on the CPU, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return int(held.cumsum(0).max())


def operators(args) -> list[dict]:
    """The rows of the table. On a GPU, they include times."""
    rows, copy = [], copy_bandwidth(args) if TIMED else None
    for case in args.cases:
        images, anchors = CASES[case]
        scene = Scene(images, anchors, SIZE, args.dtype, "cuda" if TIMED else "meta")
        for operator, (least, moved, launches) in scene.counts().items():
            row = {"case": case, "operator": operator, "least MB": least / 1e6}
            row |= {"moved MB": moved / 1e6, "moved / least": moved / least, "launches": launches}
            rows.append(rounded(row))
        if TIMED:
            rows += timed(case, scene, args, copy)
    if not TIMED:
        print("times: not run (they need a GPU)")
        rows += extra_memory(args)
    elif args.plot:
        draw(rows, args.plot)
    return rows


def gradient(function, leaves: list, impl: str) -> tuple:
    return torch.autograd.grad(function(leaves, impl), leaves)


def extra_memory(args) -> list[dict]:
    """Peak memory of forward and backward beyond inputs and gradient, for small maps on a CPU."""
    scene = Scene(1, 9, (128, 192), args.dtype, "cpu")
    rows = []
    for operator, maps in (("features", scene.student_features), ("predictions", scene.logits)):
        whole = sum(x.numel() * x.element_size() for x in maps)
        leaves = [x.requires_grad_() for x in maps]
        for impl in ("torch", "triton"):
            step = partial(gradient, getattr(scene, operator), leaves, impl)
            step()
            extra = peak_memory(step) / whole - 1
            row = {"case": "1 image of 128x192", "operator": operator, "impl": impl}
            rows.append(rounded(row | {"extra memory / maps": extra}))
    return rows


def copy_bandwidth(args) -> float:
    """Bandwidth of a copy of 268 MB on the device: GB/s, read and written together."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copied = torch.empty_like(source)
    _, p50, _ = quantiles(lambda: copied.copy_(source), "cuda", args.seconds)
    print(f"copy: {2 * 0.268 / p50 * 1e3:.0f} GB/s")
    return 2 * 0.268 / p50 * 1e3


def timed(case: str, scene: Scene, args, copy: float) -> list[dict]:
    """A row for each operator, implementation and mode of a case.

    Args:
        copy: the device's bandwidth in GB/s.
    """
    rows = []

    def measure(operator, impl, mode, call, least=0.0, whole=0):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()  # compiles
        host = host_seconds(call)
        p20, p50, p80 = quantiles(call, "cuda", args.seconds, ahead=2 * host)
        row = {"case": case, "operator": operator, "impl": impl, "mode": mode}
        row |= {"p20 ms": p20, "p50 ms": p50, "p80 ms": p80, "host ms": 1000 * host}
        print(*row.values(), sep=", ", flush=True)
        if whole:
            extra = (torch.cuda.max_memory_allocated() - before) / whole - 1
            row |= {"of copy bandwidth": least / 1e6 / p50 / copy, "extra memory / maps": extra}
        rows.append(rounded(row))

    for impl in (i for i in args.impls if i != "compile"):
        measure("split", impl, "forward", lambda impl=impl: scene.split(impl))
    least = {operator: bytes_moved for operator, (bytes_moved, *_) in scene.counts().items()}
    for operator, maps in (("features", scene.student_features), ("predictions", scene.logits)):
        function = getattr(scene, operator)
        leaves = [x.requires_grad_() for x in maps]
        whole = sum(x.numel() * x.element_size() for x in maps)
        for impl in args.impls:
            call = torch.compile(function) if impl == "compile" else function
            kind = "torch" if impl == "compile" else impl
            with torch.no_grad():
                measure(operator, impl, "forward", partial(call, leaves, kind))
            step = partial(gradient, call, leaves, kind)
            measure(operator, impl, "forward+backward", step, least[operator], whole)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Draws the times of the first case, with a panel for each operator and mode.

    Error bars are the 20 % and 80 % quantiles.
    """
    import matplotlib.pyplot as plt

    case = rows[0]["case"]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="data type of the maps")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--counts-only", action="store_true", help="measure no times")
    parser.add_argument("--plot", type=Path, help="draw the times into this file")
    parser.add_argument("--csv", type=Path, help="also write the rows there")
    args = parser.parse_args()
    describe("cuda" if TIMED else "cpu")
    show(operators(args), args.csv)


if __name__ == "__main__":
    main()
