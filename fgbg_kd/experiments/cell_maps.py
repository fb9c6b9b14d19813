"""What distillation computes for one image, cell by cell: split, gate, cosine and KL."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import method_defaults
from ..detectors.load import load_exactly
from ..distiller import FgBgDistiller
from ..matching import dense_student
from ..methods import Batch, FgBg
from ..ops import Split, cosine_similarity, teacher_gate
from ..utils.errors import CheckpointError


class CellMaps(NamedTuple):
    """The maps of one image; R = cells of all levels, as in :class:`~fgbg_kd.ops.Split`.

    Attributes:
        cells: the split.
        strides: in pixels, per level.
        cosine: (1, R), of the student's adapted features and the teacher's. None: they have
            different channels, and there is no adapter.
        gate: (1, R), 1 where the student learns from the teacher. None: the teacher is not dense.
        kl: (1, R), the background KL times the gate, as it enters the loss. None: likewise.
        margin: of the gate.
    """

    cells: Split
    strides: Sequence[int]
    cosine: Tensor | None = None
    gate: Tensor | None = None
    kl: Tensor | None = None
    margin: float = 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context without gradients and in eval mode; afterwards every module has its mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_both(distiller: FgBgDistiller, inputs: dict) -> Batch:
    """One image through student and teacher, without a gradient and with the student in eval mode.

    Both heads run, whether the method needs them or not.

    Args:
        inputs: "image" and "instances", as a training mapper gives them.
    """
    student, teacher = dense_student(distiller.student), distiller.teacher
    dense = teacher.view.dense
    with evaluating(distiller.student):
        images = student.preprocess([inputs])
        output = student.with_boxes(student.run(images.tensor))
        target = teacher(images, [inputs], student, logits=dense, boxes=dense, cached=False)
        gt = [inputs["instances"].to(distiller.device)]
        return distiller.match(output, target, images, gt)


@torch.no_grad()
def cell_maps(
    distiller: FgBgDistiller, inputs: dict, adapters: Sequence[nn.Module] | None = None
) -> CellMaps:
    """The maps of one image by the options of FgBg; for another method, by FgBg's defaults.

    A gate that is off shows where it would be open.

    Args:
        inputs: see :func:`run_both`.
        adapters: from the student's to the teacher's features, per level; None: the method's.
    """
    fgbg = distiller.method
    if not isinstance(fgbg, FgBg):
        fgbg = SimpleNamespace(**method_defaults("FgBg"))
    batch = run_both(distiller, inputs)
    cells = batch.split(fgbg.assign)
    student, teacher = batch.student, batch.teacher
    cosine, adapters = None, adapters or own_adapters(distiller)
    if adapters is not None:
        adapted = [phi(f) for phi, f in zip(adapters, student.features)]
        levels = zip(adapted, teacher.features)
        cosine = torch.cat([cosine_similarity(s, t).flatten(1) for s, t in levels], dim=1)
    if teacher.logits is None:
        return CellMaps(cells, batch.strides, cosine)
    found = batch.compare(
        cells, boxes=fgbg.gate_quality == "box", kl=fgbg.kl, temperature=fgbg.temperature
    )
    off = fgbg.gate == "off"
    gate = teacher_gate(
        found.student_quality,
        found.teacher_quality,
        cells,
        mode="cell" if off else fgbg.gate,
        margin=fgbg.gate_margin,
    )
    kl = found.kl if off else found.kl * gate
    return CellMaps(cells, batch.strides, cosine, gate, kl, fgbg.gate_margin)


def own_adapters(distiller: FgBgDistiller) -> Sequence[nn.Module] | None:
    """The method's adapters; identities where channels are equal; None where both are missing."""
    adapters = getattr(distiller.method, "adapters", ())
    if len(adapters) == len(distiller.levels):
        return adapters
    same = all(s == t for s, t in (level.channels for level in distiller.levels))
    return [nn.Identity() for _ in distiller.levels] if same else None


@torch.no_grad()
def fit_adapters(distiller: FgBgDistiller, inputs: Iterable[dict]) -> list[nn.Module]:
    """Fits a 1x1 convolution per level from the student's to the teacher's features.

    A student that was trained without adapters, such as a plain one, can be compared by them. The
    fit is by least squares on the foreground cells; each object has the same weight.
    """
    sums = [0.0] * len(distiller.levels)
    for one in inputs:
        batch = run_both(distiller, one)
        cells = batch.split("all")
        weights = cells.weight.split([h * w for h, w in cells.level_shapes], dim=1)
        for i, (s, t) in enumerate(zip(batch.student.features, batch.teacher.features)):
            s, t = (x.flatten(2)[0].T.double() for x in (s, t))  # (cells, C)
            s = torch.cat([s, s.new_ones(len(s), 1)], dim=1)
            weighted = s.T * weights[i][0].double()
            sums[i] = sums[i] + torch.cat([weighted @ s, weighted @ t], dim=1)
    adapters = []
    for level, total in zip(distiller.levels, sums):
        channels = level.channels[0]
        gram, product = total[:, : channels + 1], total[:, channels + 1 :]
        # A small ridge: the few cells of a coarse level do not determine the whole map.
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(channels + 1).to(gram)
        solution = torch.linalg.solve(gram + ridge, product).float()  # (C + 1, C of the teacher)
        phi = nn.Conv2d(*level.channels, kernel_size=1).to(distiller.device)
        phi.weight.copy_(solution[:-1].T[:, :, None, None])
        phi.bias.copy_(solution[-1])
        adapters.append(phi)
    return adapters


def load_student(
    distiller: FgBgDistiller, weights: str, training: Iterable[dict]
) -> Sequence[nn.Module] | None:
    """Gives the distiller a new student, with a checkpoint's weights.

    Args:
        weights: checkpoint of a distilled or a plain student.
        training: images for :func:`fit_adapters`, for a checkpoint that lacks needed adapters.

    Returns:
        The adapters of this student.

    Raises:
        CheckpointError: it is the checkpoint of another detector or method.
    """
    distiller.student = copy.deepcopy(distiller.student)
    distiller.method = copy.deepcopy(distiller.method)
    rest = load_exactly(distiller.student, weights)
    adapters = own_adapters(distiller)
    if "method" in rest:
        try:
            distiller.method.load_state_dict(rest["method"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} was distilled with another MODEL.KD than this config's: {error}"
            ) from None
    elif adapters is None or any(True for phi in adapters for _ in phi.parameters()):
        adapters = fit_adapters(distiller, training)
    return adapters
