"""FgBg: cosine loss on foreground features, KL on background predictions, and a gate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Comparison, Gate, Split, cosine_loss, standardise, teacher_gate
from ..utils.processes import world_mean
from .adapters import build_adapters
from .base import (
    METHOD_REGISTRY,
    Batch,
    Method,
    check_choice,
    check_not_negative,
    check_positive,
    or_one,
)


@METHOD_REGISTRY.register()
class FgBg(Method):
    """The method of this package, after the thesis (README).

    L_fg = fg_weight * sum over foreground cells of w g (1 - cos(z(phi(S)), z(T))) / sum of w
    L_bg = bg_weight * sum over background cells of g tau^2 KL(teacher || student) / F

    S, T: features of student and teacher. phi: a 1x1 convolution where channels differ. z: scales
    each channel to mean 0 and variance 1 (:func:`fgbg_kd.ops.standardise`) with STANDARDISE always;
    otherwise the identity. w: weight of a cell (:func:`fgbg_kd.ops.split`; with ASSIGN teacher,
    :meth:`fgbg_kd.ops.Split.weighted` by the teacher's quality). g: the gate
    (:func:`fgbg_kd.ops.teacher_gate`); with GATE False it is 1.
    F: number of foreground cells. tau: temperature.

    Sums and counts cover the batches of all processes. So neither the batch size nor the number of
    processes changes the scale of a term. The gate is not in the divisors, so L_fg shrinks as
    the student improves. In a batch without objects, L_bg is divided by the
    number of background cells. Without this divisor, such a batch would weigh a hundred times as
    much as other batches.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        fg_weight: float,
        bg_weight: float,
        assign: str,
        standardise: str,
        kl: str,
        temperature: float,
        gate: bool,
    ):
        super().__init__()
        check_not_negative("FGBG", fg_weight=fg_weight, bg_weight=bg_weight)
        check_positive("FGBG", temperature=temperature)
        check_choice("FGBG.ASSIGN", assign, ("auto", "teacher", "scale", "all"))
        check_choice("FGBG.STANDARDISE", standardise, ("auto", "always", "never"))
        check_choice("FGBG.KL", kl, ("sigmoid", "softmax"))
        check_choice("FGBG.GATE", gate, (True, False))
        self.fg_weight, self.bg_weight = fg_weight, bg_weight
        self.assign = "scale" if assign == "auto" else assign
        self.standardises = standardise == "always"
        self.kl, self.temperature, self.gate = kl, temperature, gate
        weights = {"loss_kd_fg": fg_weight, "loss_kd_bg": bg_weight}
        self.losses = [name for name, weight in weights.items() if weight > 0]
        self.needs_quality = gate or (fg_weight > 0 and self.assign == "teacher")
        self.needs_logits = bg_weight > 0 or self.needs_quality
        # Only a foreground term needs adapters. DistributedDataParallel fails on unused parameters.
        channels = (student_channels, teacher_channels) if fg_weight > 0 else ((), ())
        self.adapters = build_adapters(*channels)

    @classmethod
    def is_off(cls, options: dict[str, Any]) -> bool:
        return options.get("fg_weight") == options.get("bg_weight") == 0

    @classmethod
    def for_features_only(cls, options: dict[str, Any]) -> dict[str, Any]:
        assign = "scale" if options["assign"] in ("auto", "teacher") else options["assign"]
        return {**options, "bg_weight": 0.0, "gate": False, "assign": assign}

    @classmethod
    def for_pair(cls, options: dict[str, Any], alike: bool) -> dict[str, Any]:
        usual = ("scale", "never") if alike else ("teacher", "always")
        auto = dict(zip(("assign", "standardise"), usual))
        return options | {name: value for name, value in auto.items() if options[name] == "auto"}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cells = self.split(batch)
        found = self.compare(batch, cells)
        if self.fg_weight > 0 and self.assign == "teacher":
            cells = cells.weighted(found.teacher_quality)
        gate = self.gate_of(cells, found)
        counts = [cells.foreground.float(), cells.background.float(), cells.weight]
        num_fg, num_bg, weight = world_mean(torch.stack([x.sum() for x in counts]))
        losses = {}
        if self.fg_weight > 0:
            adapted = [phi(f) for phi, f in zip(self.adapters, batch.student.features)]
            maps = self.directions(adapted, batch.teacher.features, cells)
            total = cosine_loss(*maps, cells.weight * gate.value)
            losses["loss_kd_fg"] = self.fg_weight * total / or_one(weight)
        if self.bg_weight > 0:
            total = (gate.value * found.kl).sum()
            divisor = torch.where(num_fg > 0, num_fg, num_bg)
            losses["loss_kd_bg"] = self.bg_weight * total / or_one(divisor)
        return losses, statistics(cells, gate)

    def split(self, batch: Batch) -> Split:
        """The split of a batch. Its weights do not depend on the teacher."""
        return batch.split("scale" if self.assign == "scale" else "all")

    def directions(
        self, adapted: list[Tensor], teacher: Sequence[Tensor], cells: Split
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Per level (N, C, H_l, W_l): z(phi(S)) and z(T).

        Args:
            adapted: phi(S).
        """
        if not self.standardises:
            return adapted, teacher
        real = cells.foreground | cells.background
        return standardise(adapted, real), standardise(teacher, real)

    def compare(self, batch: Batch, cells: Split) -> Comparison:
        """Computes the KL and qualities that the terms and the gate need."""
        if not self.needs_logits:
            return Comparison()
        return batch.compare(
            cells,
            kl=self.kl if self.bg_weight > 0 else None,
            temperature=self.temperature,
            quality=self.needs_quality,
        )

    def gate_of(self, cells: Split, found: Comparison) -> Gate:
        """The gate of each cell. Without a comparison it is 1; 0 on padding."""
        if not self.gate:
            return Gate((cells.foreground | cells.background).float())
        return teacher_gate(found.student_quality, found.teacher_quality, cells)


def statistics(cells: Split, gate: Gate) -> dict[str, Tensor]:
    """Means over objects and over background cells. NaN: there are none.

    Returns:
        kd/fg_gate, kd/bg_gate: mean of the gate. kd/fg_lead: how much higher the teacher's best
        score on an object is, 0 if it is lower. Without a gate it is left out.
    """
    found = {"kd/fg_gate": (gate.value, cells.weight)}
    if gate.lead is not None:
        found["kd/fg_lead"] = (gate.lead, cells.weight)
    found["kd/bg_gate"] = (gate.value, cells.background)
    return {name: (value * weight).sum() / weight.sum() for name, (value, weight) in found.items()}
