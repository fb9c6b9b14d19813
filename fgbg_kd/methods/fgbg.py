"""Foreground by direction, background by prediction, where the teacher is not clearly worse."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..gate import teacher_gate
from ..ops import cosine_loss
from .base import METHOD_REGISTRY, Batch, Method, build_adapters, safe, world_mean

_CHOICES = {
    "assign": ("all", "scale"),
    "normalize": ("object", "cell"),
    "adapter": ("auto", "none", "conv"),
    "kl": ("sigmoid", "softmax"),
    "bg_normalizer": ("fg", "bg"),
    "gate": ("off", "cell", "object", "image"),
}


@METHOD_REGISTRY.register()
class FgBg(Method):
    """Our method: L_fg and L_bg of one batch.

    L_fg = sum over foreground cells of w g (1 - cos(phi(S), T)) / sum of w
    L_bg = sum over background cells of g T^2 KL(teacher || student) / number of foreground cells

    with the cell weight w (:func:`split`), the gate g (:func:`teacher_gate`) and the adapter phi.
    The sums go over the whole batch, of all workers: neither image nor batch nor map size changes
    the scale of a term. Cells that the gate shuts add nothing to the sums above and stay in those
    below, so a term fades as the student catches up. In a batch without any object L_bg is
    divided by the number of background cells. Where the detectors have other anchors (RetinaNet and
    FCOS), the KL compares the largest logit of each class over the anchors of a cell.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        fg_weight: float = 3.0,
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
    ):
        """
        Args:
            student_channels, teacher_channels: C per level.
            fg_weight: scale of loss_kd_fg, the cosine term; 0 = off.
            bg_weight: scale of loss_kd_bg, the KL term; 0 = off. With both 0 training is plain
                training.
            assign: "all": every box on every level; "scale": each box on the one level that fits
                its size.
            normalize: weight of a foreground cell: "object": 1 / (cells of its box on that level);
                "cell": 1.
            adapter: 1x1 convolution from student to teacher channels, per level. "auto": where they
                differ; "conv": always; "none": never (an error where they differ).
            kl: distribution of the background KL. "sigmoid": a Bernoulli per class, as RetinaNet
                and FCOS predict; "softmax": over the classes and a background logit of 0.
            temperature: of the KL; 1 = the predictions as they are.
            bg_normalizer: the background KL is divided by the number of foreground ("fg") or
                background ("bg") cells.
            gate: the student learns where the teacher's prediction is better. "cell", "object",
                "image": over what the two qualities are averaged before they are compared; "off" =
                it learns everywhere.
            gate_margin: by how much the teacher's quality (0..1) must be better; 0 = at all; under
                0 it may be worse by so much, for a teacher that is a little less sure of the
                background than an untrained student still says what the background looks like.
            gate_softness: over 0: a sigmoid of this width in quality instead of a step; 0 = a hard
                gate.

        Raises:
            ValueError: an option that is not one of its choices, or out of range.
        """
        super().__init__()
        for name, choices in _CHOICES.items():
            value = locals()[name]
            if value not in choices:
                raise ValueError(f"MODEL.KD.{name.upper()} is {value!r}: choose from {choices}.")
        for name in ("fg_weight", "bg_weight", "gate_softness"):
            if not locals()[name] >= 0:
                raise ValueError(f"MODEL.KD.{name.upper()} is {locals()[name]}: it must be >= 0.")
        if not temperature > 0:
            raise ValueError(f"MODEL.KD.TEMPERATURE is {temperature}: it must be over 0.")
        self.fg_weight, self.bg_weight = fg_weight, bg_weight
        self.assign, self.normalize = assign, normalize
        self.kl, self.temperature, self.bg_normalizer = kl, temperature, bg_normalizer
        self.gate, self.gate_margin, self.gate_softness = gate, gate_margin, gate_softness
        # Built only if used: parameters without a gradient would stop DistributedDataParallel.
        self.adapters = nn.ModuleList()
        if fg_weight > 0:
            self.adapters = build_adapters(student_channels, teacher_channels, adapter)

    @property
    def needs_logits(self) -> bool:
        return self.bg_weight > 0 or self.needs_boxes

    @property
    def needs_boxes(self) -> bool:
        return self.gate != "off"

    @classmethod
    def without_predictions(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "bg_weight": 0.0, "gate": "off"}

    @property
    def losses(self) -> list[str]:
        weights = {"loss_kd_fg": self.fg_weight, "loss_kd_bg": self.bg_weight}
        return [name for name, weight in weights.items() if weight > 0]

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Returns:
            loss_kd_fg and loss_kd_bg, without a term of weight 0; and shares of the foreground
            and background cells (NaN where there are none): kd/fg_gate and kd/bg_gate, where the
            teacher guides; with a gate kd/fg_better and kd/bg_better, where its quality is higher.
        """
        student, teacher = batch.student, batch.teacher
        cells = batch.split(self.assign, self.normalize)
        gate = (cells.foreground | cells.background).float()  # (N, R)
        if self.needs_logits:
            compared = batch.compare(
                cells,
                kl=self.kl if self.bg_weight > 0 else None,
                temperature=self.temperature,
                quality=self.needs_boxes,
            )
        if self.needs_boxes:
            gate = teacher_gate(
                compared.student_quality,
                compared.teacher_quality,
                cells,
                mode=self.gate,
                margin=self.gate_margin,
                softness=self.gate_softness,
            )
        foreground, background = cells.foreground.float(), cells.background.float()
        num_fg, num_bg, fg_weight = world_mean(
            torch.stack([foreground.sum(), background.sum(), cells.weight.sum()])
        )
        losses = {}
        if self.fg_weight > 0:
            adapted = [phi(f) for phi, f in zip(self.adapters, student.features)]
            loss = cosine_loss(adapted, teacher.features, cells.weight * gate)
            losses["loss_kd_fg"] = self.fg_weight * loss / safe(fg_weight)
        if self.bg_weight > 0:
            loss = (gate * compared.kl).sum()
            # Without any foreground the unit is missing: then the mean over the background, or a
            # batch of empty images would weigh hundreds of times as much as any other.
            by_fg = (num_fg > 0) & (self.bg_normalizer == "fg")
            normalizer = torch.where(by_fg, num_fg, num_bg)
            losses["loss_kd_bg"] = self.bg_weight * loss / safe(normalizer)
        where = {"gate": gate}
        if self.needs_boxes:
            where["better"] = compared.teacher_quality > compared.student_quality
        shares = {
            f"kd/{name}_{what}": (there * part).sum() / part.sum()
            for name, part in (("fg", foreground), ("bg", background))
            for what, there in where.items()
        }
        return losses, shares
