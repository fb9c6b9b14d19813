"""The cost of a detector: parameters, GFLOPs, latency."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import nn

from ..config import student_model
from ..detectors.dense import DenseView, view
from ..detectors.load import build_detector, read_detector_config
from ..utils.markdown import table_of
from ..utils.timing import latency

_HEADINGS = {"parameters_m": "parameters (M)", "gflops": "GFLOPs", "ms_per_image": "ms / image"}


def detectors_of(config: str) -> dict[str, nn.Module]:
    """Builds the detectors that a config names, with random weights, in eval mode on the CPU.

    Args:
        config: a name of the model zoo, or a local .yaml or .py config.

    Returns:
        Detectors by role. The roles are "teacher" and "student" if the config distils, otherwise
        "detector".
    """
    cfg = read_detector_config(config)
    teacher = ""
    if isinstance(cfg, CfgNode):
        if cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller":
            teacher = cfg.MODEL.KD.TEACHER.CONFIG
    elif (student := student_model(cfg.model)) is not cfg.model:
        teacher, cfg.model = cfg.model.teacher.config, student
    detector = build_detector(cfg).eval()
    if not teacher:
        return {"detector": detector}
    return {"teacher": build_detector(read_detector_config(teacher)).eval(), "student": detector}


def costs_of(
    configs: Sequence[str],
    size: tuple[int, int],
    device: str = "cpu",
    runs: int = 10,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict], bool]:
    """Measures the detectors of each config, and divides the student's cost by the teacher's.

    Args:
        configs: see :func:`detectors_of`.
        size: (height, width) of the image in pixels.
        runs: see :func:`cost`.
        say: a function that gets the name of each detector before it is measured.

    Returns:
        Rows for :func:`table`, and whether a detector has two stages.
    """
    rows, two_stage = [], False
    for config in configs:
        detectors = detectors_of(config)
        for role, detector in detectors.items():
            of = view(detector.to(device))
            two_stage |= not isinstance(of, DenseView)
            name = f"{role} of {config}" if len(detectors) > 1 else config
            say(name)
            channels = len(of.normalization[0])
            image = torch.randint(256, (channels, *size)).float()
            rows.append({"name": name, **cost(detector, {"image": image}, runs)})
        if len(detectors) > 1:
            teacher, student = rows[-2:]
            ratio = {k: f"{student[k] / teacher[k]:.2f}" for k in student if k != "name"}
            rows.append({"name": "student / teacher", **ratio})
    return rows, two_stage


class _Network(nn.Module):
    """A module for fvcore that maps padded images to the raw predictions of a detector."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return view(self.detector).network(images)


@torch.no_grad()
def cost(model: nn.Module, example: dict, runs: int = 30) -> dict[str, float]:
    """Measures parameters, GFLOPs and time for one image, on the device of the model.

    Args:
        model: a detector in eval mode.
        example: {"image": (C, H, W)} in 0..255.
        runs: number of calls. The time is their median.

    Returns:
        A dictionary with these keys.

        - "parameters_m": millions of parameters.
        - "gflops": of backbone and head, by fvcore. A multiply-add is one FLOP. Of a two-stage
          detector, only backbone and RPN are counted: the cost of the box head depends on the
          proposals.
        - "ms_per_image": milliseconds of the whole detector, with NMS and without resizing.
    """
    (milliseconds,) = latency({"": lambda _: model([example])}, runs).values()
    return {**size_of(model, example), "ms_per_image": round(milliseconds, 2)}


@torch.no_grad()
def size_of(model: nn.Module, example: dict) -> dict[str, float]:
    """ "parameters_m" and "gflops" of :func:`cost`, which do not depend on the machine."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    # The counter of Detectron2 v0.6 cannot be imported: it needs caffe2.
    flops = FlopCountAnalysis(_Network(model), model.preprocess_image([example]).tensor)
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return {"parameters_m": round(parameters, 3), "gflops": round(flops.total() / 1e9, 4)}


def table(rows: Sequence[dict]) -> str:
    """A table in Markdown from rows with the values of :func:`cost`."""
    return table_of(rows, _HEADINGS)
