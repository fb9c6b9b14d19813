"""Foreground by direction, background by prediction, where the teacher is not clearly worse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import cosine_loss
from ..ops.gate import teacher_gate
from .base import METHOD_REGISTRY, Batch, Method, build_adapters, safe, world_mean


@METHOD_REGISTRY.register()
class FgBg(Method):
    """Our method: L_fg and L_bg of one batch.

    L_fg = sum over foreground cells of w g (1 - cos(phi(S), T)) / sum of w
    L_bg = sum over background cells of g tau^2 KL(teacher || student) / number of foreground cells

    with the cell weight w (:func:`split`), the gate g (:func:`teacher_gate`) and the adapter phi.
    Sums are of the whole batch, of all workers: no size changes the scale of a term. Cells that the
    gate shuts stay in the divisors: a term fades as the student catches up. Without any object L_bg
    is divided by the background cells: by 1, empty images would weigh hundredfold.

    Args:
        student_channels, teacher_channels: C per level.
        fg_weight, bg_weight: scales of loss_kd_fg and loss_kd_bg; 0 = without the term.
        assign: "scale": each box on the one level that fits its size; "all": on every level.
        normalize: w; "object": 1 / (cells of the box on the level); "cell": 1.
        adapter: 1x1 convolution phi; "auto": where C differs; "conv": always; "none": never.
        kl: "sigmoid": of a Bernoulli per class; "softmax": of all and a background logit of 0.
        temperature: tau; 1 = the predictions as they are.
        bg_normalizer: the cells that L_bg is divided by, foreground ("fg") or background ("bg").
        gate: over what qualities are averaged before they are compared; "off" = g is 1.
        gate_margin: how much better the teacher's quality (0..1) must be; under 0: may be worse.
        gate_softness: width, in quality, of a sigmoid in place of the gate's step; 0 = a step.
        gate_quality: on foreground; "score": of the box's class; "box": times its box's IoU, too.
    """

    choices = {
        "assign": ("all", "scale"),
        "normalize": ("object", "cell"),
        "adapter": ("auto", "none", "conv"),
        "kl": ("sigmoid", "softmax"),
        "bg_normalizer": ("fg", "bg"),
        "gate": ("off", "cell", "object", "image"),
        "gate_quality": ("box", "score"),
    }
    signed = ("gate_margin",)

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        fg_weight: float = 8.0,
        bg_weight: float = 1.0,
        assign: str = "scale",
        normalize: str = "object",
        adapter: str = "auto",
        kl: str = "sigmoid",
        temperature: float = 1.0,
        bg_normalizer: str = "fg",
        gate: str = "cell",
        gate_margin: float = -0.2,
        gate_softness: float = 0.0,
        gate_quality: str = "score",
    ):
        super().__init__()
        self.accept(FgBg, locals())
        self.fg_weight, self.bg_weight = fg_weight, bg_weight
        terms = {"loss_kd_fg": fg_weight, "loss_kd_bg": bg_weight}
        self.losses = [name for name in terms if terms[name] > 0]
        self.gated = gate != "off"
        self.needs_logits = bg_weight > 0 or self.gated
        self.needs_boxes = self.gated and gate_quality == "box"
        self.divergence = {"kl": kl if bg_weight > 0 else None, "temperature": temperature}
        self.gating = {"mode": gate, "margin": gate_margin, "softness": gate_softness}
        # Built only if used: parameters without a gradient would stop DistributedDataParallel.
        channels = (student_channels, teacher_channels) if fg_weight > 0 else ((), ())
        self.adapters = build_adapters(*channels, adapter)

    @classmethod
    def without_predictions(cls, options: dict) -> dict:
        return {**options, "bg_weight": 0.0, "gate": "off"}

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Returns:
            loss_kd_fg and loss_kd_bg, if of weight over 0; and shares of the cells (NaN of none):
            kd/fg_gate, kd/bg_gate: open; kd/fg_better, kd/bg_better: where the teacher is better.
        """
        cells = batch.split(self.option["assign"], self.option["normalize"])
        foreground, background = cells.foreground.float(), cells.background.float()  # (N, R)
        shown = {"gate": foreground + background}
        if self.needs_logits:
            asked = {"quality": self.gated, "boxes": self.needs_boxes, **self.divergence}
            found = batch.compare(cells, **asked)
        if self.gated:
            student, teacher = found.student_quality, found.teacher_quality
            shown["gate"] = teacher_gate(student, teacher, cells, **self.gating)
            shown["better"] = teacher > student
        sums = torch.stack([foreground.sum(), background.sum(), cells.weight.sum()])
        num_fg, num_bg, weight = world_mean(sums)
        losses = {}
        if self.fg_weight > 0:
            adapted = [phi(f) for phi, f in zip(self.adapters, batch.student.features)]
            loss = cosine_loss(adapted, batch.teacher.features, cells.weight * shown["gate"])
            losses["loss_kd_fg"] = self.fg_weight * loss / safe(weight)
        if self.bg_weight > 0:
            loss = (shown["gate"] * found.kl).sum()
            by_fg = (num_fg > 0) & (self.option["bg_normalizer"] == "fg")
            losses["loss_kd_bg"] = self.bg_weight * loss / safe(torch.where(by_fg, num_fg, num_bg))
        shares = {
            f"kd/{name}_{what}": (there * part).sum() / part.sum()
            for name, part in (("fg", foreground), ("bg", background))
            for what, there in shown.items()
        }
        return losses, shares
