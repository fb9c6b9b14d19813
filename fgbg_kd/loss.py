"""Foreground by direction, background by prediction, both only where the teacher is better."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from .gate import prediction_quality, teacher_gate
from .ops import Split, cosine_loss, kl_loss, pack, split

_CHOICES = {
    "assign": ("all", "scale"),
    "normalize": ("object", "cell"),
    "adapter": ("auto", "none", "conv"),
    "kl": ("sigmoid", "softmax"),
    "bg_normalizer": ("fg", "bg"),
    "gate": ("off", "cell", "object", "image"),
}


class DenseOutput(NamedTuple):
    """What a dense detector computes for a batch, per level.

    Attributes:
        features: (N, C, H_l, W_l).
        logits: (N, A*K, H_l, W_l) class logits; None where the head was not needed.
        deltas: (N, A*4, H_l, W_l) box deltas; None likewise.
    """

    features: Sequence[Tensor]
    logits: Sequence[Tensor] | None = None
    deltas: Sequence[Tensor] | None = None


class FgBgLoss(nn.Module):
    """L_fg and L_bg of one batch.

    L_fg = sum over foreground cells of w g (1 - cos(phi(S), T)) / sum of w
    L_bg = sum over background cells of g T^2 KL(teacher || student) / number of foreground cells

    with the cell weight w (:func:`split`), the gate g (:func:`teacher_gate`) and the adapter phi.
    The sums go over the whole batch, of all workers: neither image nor batch nor map size changes
    the scale of a term. Cells that the gate shuts add nothing to the sums above and stay in those
    below, so a term fades as the student catches up. In a batch without any object L_bg is
    divided by the number of background cells.

    The keyword arguments are the keys of MODEL.KD (config.py says what each means).
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        fg_weight: float = 3.0,
        bg_weight: float = 1.0,
        warmup_iters: int = 0,
        stop_iter: int = 0,
        assign: str = "all",
        normalize: str = "object",
        adapter: str = "auto",
        kl: str = "sigmoid",
        temperature: float = 1.0,
        bg_normalizer: str = "fg",
        gate: str = "cell",
        gate_margin: float = 0.0,
        gate_softness: float = 0.0,
    ):
        """
        Args:
            student_channels, teacher_channels: C per level.

        Raises:
            ValueError: an option that is not one of its choices, or out of range.
        """
        super().__init__()
        for name, choices in _CHOICES.items():
            value = locals()[name]
            if value not in choices:
                raise ValueError(f"MODEL.KD.{name.upper()} is {value!r}: choose from {choices}.")
        for name in ("fg_weight", "bg_weight", "warmup_iters", "stop_iter", "gate_softness"):
            if not locals()[name] >= 0:
                raise ValueError(f"MODEL.KD.{name.upper()} is {locals()[name]}: it must be >= 0.")
        if not temperature > 0:
            raise ValueError(f"MODEL.KD.TEMPERATURE is {temperature}: it must be over 0.")
        self.fg_weight, self.bg_weight = fg_weight, bg_weight
        self.warmup_iters, self.stop_iter = warmup_iters, stop_iter
        self.assign, self.normalize = assign, normalize
        self.kl, self.temperature, self.bg_normalizer = kl, temperature, bg_normalizer
        self.gate, self.gate_margin, self.gate_softness = gate, gate_margin, gate_softness
        # Built only if used: parameters without a gradient would stop DistributedDataParallel.
        channels = zip(student_channels, teacher_channels) if fg_weight > 0 else ()
        self.adapters = nn.ModuleList(_adapter(s, t, adapter) for s, t in channels)

    @property
    def needs_head(self) -> bool:
        """Whether the teacher's predictions are needed, not its features alone."""
        return self.bg_weight > 0 or self.gate != "off"

    def scale_at(self, iteration: int) -> float:
        """Factor of both weights: linear warm-up, then 1, 0 from stop_iter on."""
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0

    def zero(self, student: DenseOutput) -> dict[str, Tensor]:
        """The losses where there is nothing to learn: 0, with every parameter in the graph."""
        nothing = sum(p.sum() for p in self.adapters.parameters()) * 0.0
        return {k: student.features[0].sum() * 0.0 + nothing for k in self._active()}

    def _active(self) -> list[str]:
        weights = {"loss_kd_fg": self.fg_weight, "loss_kd_bg": self.bg_weight}
        return [name for name, weight in weights.items() if weight > 0]

    def forward(
        self,
        student: DenseOutput,
        teacher: DenseOutput,
        detectors: tuple[nn.Module, nn.Module],
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        strides: Sequence[int],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Args:
            student, teacher: outputs for the same batch, on the same levels.
            detectors: the two DenseDetectors, which decode their own boxes for the gate.
            gt_boxes, gt_classes: N tensors (B_i, 4) XYXY in pixels, and (B_i,).
            image_sizes: N pairs (height, width) before padding.
            strides: per level.

        Returns:
            The weighted losses, and statistics to log (both scalars on the device):
            kd/fg_gate and kd/bg_gate, the share of cells where the teacher guides.
        """
        level_shapes = [tuple(f.shape[-2:]) for f in student.features]
        cells = split(
            gt_boxes,
            image_sizes,
            level_shapes,
            strides,
            assign=self.assign,
            normalize=self.normalize,
        )
        gate = self._gate(student, teacher, detectors, cells, gt_classes)  # (N, R)
        foreground, background = cells.foreground.float(), cells.background.float()
        num_fg, num_bg, fg_weight = _world_mean(
            torch.stack([foreground.sum(), background.sum(), cells.weight.sum()])
        )
        losses = {}
        if self.fg_weight > 0:
            adapted = [phi(f) for phi, f in zip(self.adapters, student.features)]
            loss = cosine_loss(adapted, teacher.features, cells.weight * gate)
            losses["loss_kd_fg"] = self.fg_weight * loss / _floor(fg_weight)
        if self.bg_weight > 0:
            loss = kl_loss(
                student.logits,
                teacher.logits,
                background * gate,
                detectors[0].num_classes,
                self.kl,
                self.temperature,
            )
            # Without any foreground the unit is missing: then the mean over the background, or a
            # batch of empty images would weigh hundreds of times as much as any other.
            by_fg = (num_fg > 0) & (self.bg_normalizer == "fg")
            normalizer = torch.where(by_fg, num_fg, num_bg)
            losses["loss_kd_bg"] = self.bg_weight * loss / _floor(normalizer)
        shares = {
            "kd/fg_gate": (gate * foreground).sum() / _floor(foreground.sum()),
            "kd/bg_gate": (gate * background).sum() / _floor(background.sum()),
        }
        return losses, shares

    def _gate(self, student, teacher, detectors, cells: Split, gt_classes) -> Tensor:
        if self.gate == "off":  # the teacher's head may not have been run
            return (cells.foreground | cells.background).float()
        classes = pack(gt_classes)
        quality = [
            prediction_quality(d, o.features, o.logits, o.deltas, cells, classes)
            for d, o in zip(detectors, (student, teacher))
        ]
        return teacher_gate(
            *quality, cells, mode=self.gate, margin=self.gate_margin, softness=self.gate_softness
        )


def _adapter(student: int, teacher: int, mode: str) -> nn.Module:
    if mode == "conv" or (mode == "auto" and student != teacher):
        return nn.Conv2d(student, teacher, kernel_size=1)
    if student != teacher:
        raise ValueError(
            f"MODEL.KD.ADAPTER is 'none', but the student has {student} channels and the teacher "
            f"{teacher}: use 'auto'."
        )
    return nn.Identity()


def _world_mean(sums: Tensor) -> Tensor:
    """Mean over workers of a per-worker sum; DDP averages gradients, so this makes them whole."""
    size = comm.get_world_size()
    if size > 1:
        torch.distributed.all_reduce(sums)
    return sums / size


def _floor(normalizer: Tensor) -> Tensor:
    """A normaliser that is 0 (no object in the batch) leaves the sum as it is."""
    return torch.where(normalizer > 0, normalizer, 1)
