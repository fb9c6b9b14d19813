"""FgBg: losses of the features, a KL of the background predictions, and a gate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Comparison, Split, compare_features, teacher_gate
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

# Values that :meth:`FgBg.for_pair` replaces. Built without a pair, they count as 0 and "cosine".
WEIGHT_BY_PAIR, LOSS_BY_PAIR = -1.0, "auto"


@METHOD_REGISTRY.register()
class FgBg(Method):
    """The method of this package, after the thesis (README).

    L_fg = fg_weight * sum over foreground cells of w g e / sum of w
    L_bg = bg_weight * G * sum over background cells of g tau^2 KL(teacher || student) / F
    L_bg_features = bg_feature_weight * G * sum over background cells of g d / (number of them)
    d = 1 - cos(z(phi(S)), z(T))
    m = |z(phi(S)) - z(T)|^2 / (2 C)
    e = d with FG_LOSS cosine, m with FG_LOSS mse

    S, T: features of student and teacher. phi: a 1x1 convolution where channels differ. z: scales
    each of the C channels to mean 0 and variance 1 (:func:`fgbg_kd.ops.standardise`).
    w: weight of a cell (:func:`fgbg_kd.ops.split`; with ASSIGN teacher, it is by the teacher's
    quality, :meth:`fgbg_kd.ops.Split.weighted`).
    g: the gate (:func:`fgbg_kd.ops.teacher_gate`). On an object, it is min(1, 2 t) if the
    teacher's best score t is higher than the student's, otherwise 0. With GATE False it is 1.
    G: the mean gate of the objects, weighted by w; 0 if there are none. So a student whose scores
    are at least as high on all objects does not follow the background. With GATE False, G is 1.
    F: number of foreground cells. tau: temperature. G, L_bg_features and m are not in the thesis'
    abstract. m compares direction and length, see :class:`fgbg_kd.ops.FeatureComparison`.

    Sums and counts cover the batches of all processes. So neither the batch size nor the number of
    processes changes the scale of a term. Neither g nor G is in the divisors, so all terms shrink
    as the student overtakes the teacher. With GATE False, L_bg of a batch without objects is
    divided by the number of background cells. Without this divisor, such a batch would weigh a
    hundred times as much as other batches.
    """

    version = 4

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        fg_weight: float,
        bg_weight: float,
        bg_feature_weight: float,
        fg_loss: str,
        assign: str,
        kl: str,
        temperature: float,
        gate: bool,
    ):
        super().__init__()
        if bg_feature_weight == WEIGHT_BY_PAIR:
            bg_feature_weight = 0.0
        check_not_negative(
            "FGBG",
            fg_weight=fg_weight,
            bg_weight=bg_weight,
            bg_feature_weight=bg_feature_weight,
        )
        check_positive("FGBG", temperature=temperature)
        check_choice("FGBG.FG_LOSS", fg_loss, (LOSS_BY_PAIR, "cosine", "mse"))
        check_choice("FGBG.ASSIGN", assign, ("teacher", "scale", "all"))
        check_choice("FGBG.KL", kl, ("sigmoid", "softmax"))
        check_choice("FGBG.GATE", gate, (True, False))
        self.fg_loss, self.assign, self.gate = fg_loss, assign, gate
        self.kl, self.temperature = kl, temperature
        weights = (fg_weight, bg_feature_weight, bg_weight)
        names = ("loss_kd_fg", "loss_kd_bg_features", "loss_kd_bg")
        self.weights = {name: weight for name, weight in zip(names, weights) if weight > 0}
        self.losses = list(self.weights)
        self.needs_quality = gate or (fg_weight > 0 and self.assign == "teacher")
        self.needs_logits = bg_weight > 0 or self.needs_quality
        # Only the terms of features need adapters. DistributedDataParallel fails on unused ones.
        features = fg_weight > 0 or bg_feature_weight > 0
        channels = (student_channels, teacher_channels) if features else ((), ())
        self.adapters = build_adapters(*channels)

    @classmethod
    def is_off(cls, options: dict[str, Any]) -> bool:
        others = options.get("fg_weight") == options.get("bg_weight") == 0
        return others and options.get("bg_feature_weight") in (0, WEIGHT_BY_PAIR)

    @classmethod
    def for_features_only(cls, options: dict[str, Any]) -> dict[str, Any]:
        assign = "scale" if options["assign"] == "teacher" else options["assign"]
        return {**options, "bg_weight": 0.0, "gate": False, "assign": assign}

    @classmethod
    def for_pair(cls, options: dict[str, Any], alike: bool, pretrained: bool) -> dict[str, Any]:
        options = dict(options)
        if options["bg_feature_weight"] == WEIGHT_BY_PAIR:
            options["bg_feature_weight"] = 32.0 if alike else 0.0
        if options["fg_loss"] == LOSS_BY_PAIR:
            options["fg_loss"] = "mse" if alike and pretrained else "cosine"
        return options

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cells = self.split(batch)
        found = self.compare(batch, cells)
        if self.assign == "teacher" and found.teacher_quality is not None:
            cells = cells.weighted(found.teacher_quality)
        gate = self.gate_of(cells, found)
        counts = [cells.weight, cells.weight * gate, cells.foreground, cells.background]
        counts = world_mean(torch.stack([x.sum(dtype=torch.float32) for x in counts]))
        objects, followed, num_fg, num_bg = counts
        mean_gate = followed / or_one(objects) if self.gate else 1
        factors = {
            "loss_kd_fg": 1 / or_one(objects),
            "loss_kd_bg_features": mean_gate / or_one(num_bg),
            "loss_kd_bg": mean_gate / or_one(torch.where(num_fg > 0, num_fg, num_bg)),
        }
        sums = self.feature_sums(batch, cells, gate)
        if "loss_kd_bg" in self.weights:
            sums["loss_kd_bg"] = (gate * found.kl).sum()
        losses = {name: w * factors[name] * sums[name] for name, w in self.weights.items()}
        return losses, statistics(cells, gate)

    def feature_sums(self, batch: Batch, cells: Split, gate: Tensor) -> dict[str, Tensor]:
        """The sums of the two terms of features, without their weights and divisors."""
        weights = {
            "loss_kd_fg": cells.weight * gate,
            "loss_kd_bg_features": cells.background * gate,
        }
        weights = {name: x for name, x in weights.items() if name in self.weights}
        if not weights:
            return {}
        adapted = [phi(f) for phi, f in zip(self.adapters, batch.student.features)]
        used = sum(weights.values()) != 0
        cosine, distance = compare_features(adapted, batch.teacher.features, cells.real, used)
        direction = 1 - cosine
        on_objects = distance if self.fg_loss == "mse" else direction
        errors = {"loss_kd_fg": on_objects, "loss_kd_bg_features": direction}
        return {name: (x * errors[name]).sum() for name, x in weights.items()}

    def split(self, batch: Batch) -> Split:
        """The split of a batch. Its weights do not depend on the teacher."""
        return batch.split("scale" if self.assign == "scale" else "all")

    def compare(self, batch: Batch, cells: Split) -> Comparison:
        """Computes the KL and qualities that the terms and the gate need."""
        if not self.needs_logits:
            return Comparison()
        return batch.compare(
            cells,
            kl=self.kl if "loss_kd_bg" in self.weights else None,
            temperature=self.temperature,
            quality=self.needs_quality,
        )

    def gate_of(self, cells: Split, found: Comparison) -> Tensor:
        """The gate of each cell. With GATE False it is 1; 0 on padding."""
        if not self.gate:
            return cells.real.float()
        return teacher_gate(found.student_quality, found.teacher_quality, cells)


def statistics(cells: Split, gate: Tensor) -> dict[str, Tensor]:
    """kd/fg_gate, kd/bg_gate: means of the gate over objects, and over background cells.

    NaN: there are none.
    """
    weights = {"kd/fg_gate": cells.weight, "kd/bg_gate": cells.background}
    return {name: (gate * weight).sum() / weight.sum() for name, weight in weights.items()}
