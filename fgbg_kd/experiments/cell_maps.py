"""The values that distillation computes for each cell of an image: split, gate, cosine and KL."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import method_defaults
from ..detectors.dense import DenseView
from ..detectors.load import load_exactly
from ..distiller import FgBgDistiller
from ..matching import dense_student, options_of_pair
from ..methods import Batch, FgBg, build_method
from ..ops import Split, compare_features, teacher_gate
from ..utils.errors import CheckpointError


class CellMaps(NamedTuple):
    """The maps of an image. R is the number of cells of all levels.

    Attributes:
        cells: the split into foreground and background.
        strides: of each level, in pixels.
        cosine: (1, R), cosine between the adapted features of the student and the features of the
            teacher, with channels scaled over this image. None if the channels differ and there is
            no adapter.
        gate: (1, R) in [0, 1], see :func:`fgbg_kd.ops.teacher_gate`. None if the teacher is not
            dense.
        kl: (1, R), the background KL, times the gate if the loss has one. None if the teacher
            is not dense.
    """

    cells: Split
    strides: Sequence[int]
    cosine: Tensor | None = None
    gate: Tensor | None = None
    kl: Tensor | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context without gradients, in which a model is in eval mode. Then each module gets its mode
    back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_both(distiller: FgBgDistiller, inputs: dict) -> Batch:
    """Runs student and teacher on an image, without gradients and in eval mode.

    Both predict classes, even if the method does not need them.

    Args:
        inputs: "image" and "instances", as from a training mapper.
    """
    student, teacher = dense_student(distiller.student), distiller.teacher
    dense = isinstance(teacher.view, DenseView)
    (inputs,) = student.as_seen([inputs])
    with evaluating(distiller.student):
        images = student.preprocess([inputs])
        output = student.run(images.tensor)
        target = teacher(images, [inputs], student, logits=dense, cached=False)
        gt = [inputs["instances"].to(distiller.device)]
        return distiller.match(output, target, images, gt)


@torch.no_grad()
def cell_maps(
    distiller: FgBgDistiller, inputs: dict, adapters: Sequence[nn.Module] | None = None
) -> CellMaps:
    """The maps of an image, with the options of FgBg. Another method gets the defaults of FgBg.

    If GATE is False, the map of the gate shows the gate that GATE True would have.

    Args:
        inputs: see :func:`run_both`.
        adapters: one module per level, from the student's to the teacher's channels. None: the
            adapters of the method.
    """
    fgbg = distiller.method
    if not isinstance(fgbg, FgBg):
        pair = dense_student(distiller.student), distiller.teacher.view
        options = options_of_pair("FgBg", method_defaults("FgBg"), *pair, distiller.pretrained)
        fgbg = build_method("FgBg", (), (), **options)
    batch = run_both(distiller, inputs)
    cells = fgbg.split(batch)
    student, teacher = batch.student, batch.teacher
    cosine, adapters = None, adapters or own_adapters(distiller)
    if adapters is not None:
        adapted = [phi(f) for phi, f in zip(adapters, student.features)]
        cosine = compare_features(adapted, teacher.features, cells.real, cells.real).cosine
    if teacher.logits is None:
        return CellMaps(cells, batch.strides, cosine)
    found = batch.compare(cells, kl=fgbg.kl, temperature=fgbg.temperature)
    gate = teacher_gate(found.student_quality, found.teacher_quality, cells)
    kl = found.kl * gate if fgbg.gate else found.kl
    return CellMaps(cells, batch.strides, cosine, gate, kl)


def own_adapters(distiller: FgBgDistiller) -> Sequence[nn.Module] | None:
    """The adapters of the method.

    A method without adapters gets identities if student and teacher have the same channels, and
    None if they have not.
    """
    adapters = getattr(distiller.method, "adapters", ())
    if len(adapters) == len(distiller.levels):
        return adapters
    same = all(s == t for s, t in (level.channels for level in distiller.levels))
    return [nn.Identity() for _ in distiller.levels] if same else None


@torch.no_grad()
def fit_adapters(distiller: FgBgDistiller, inputs: Iterable[dict]) -> list[nn.Module]:
    """Fits a 1x1 convolution per level from the student's to the teacher's features.

    With it, the features of a student without adapters, such as a plain student, can be compared
    with the teacher's. The fit is by least squares on the foreground cells. Each object has the
    same weight.

    Args:
        inputs: see :func:`run_both`, for each image.
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
        # A small ridge, because the few cells of a coarse level do not determine all weights.
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(channels + 1).to(gram)
        solution = torch.linalg.solve(gram + ridge, product).float()  # (C + 1, C of the teacher)
        phi = nn.Conv2d(*level.channels, kernel_size=1).to(distiller.device)
        phi.weight.copy_(solution[:-1].T[:, :, None, None])
        phi.bias.copy_(solution[-1])
        adapters.append(phi)
    return adapters


def load_student(
    distiller: FgBgDistiller, weights: str, training: Iterable[dict] | None
) -> Sequence[nn.Module] | None:
    """Replaces the student of a distiller by a copy with the weights of a checkpoint.

    Args:
        weights: path of the checkpoint of a distilled or a plain student.
        training: images for :func:`fit_adapters`. They are read only if adapters are needed and the
            checkpoint has none. None: no adapters are fitted.

    Returns:
        The adapters of this student, one per level. None: ``training`` is None.

    Raises:
        CheckpointError: the checkpoint is from another detector or method.
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
                f"{weights} was distilled with another MODEL.KD than this config has: use the "
                f"config of its run. {error}"
            ) from None
    learned = adapters is not None and any(True for phi in adapters for _ in phi.parameters())
    if adapters is None or ("method" not in rest and learned):
        adapters = None if training is None else fit_adapters(distiller, training)
    return adapters
