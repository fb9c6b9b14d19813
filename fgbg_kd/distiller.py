"""The meta-architecture: a student that trains beside a frozen teacher and is alone after."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import get_event_storage
from torch import nn

from .config import student_config
from .loss import DenseOutput, FgBgLoss
from .teacher import (
    PRECISIONS,
    accelerate,
    build_teacher,
    check_anchors,
    check_pair,
    precision,
    same_input,
    teacher_images,
)

# Iterations between two readings of the gate's shares: each waits for the device. It is the period
# of Detectron2's writers, which would not show more.
_LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class FgBgDistiller(nn.Module):
    """Trains a DenseDetector (RetinaNet, FCOS) under the guidance of another.

    Thesis: "Distilling one-stage object detection network via decoupling foreground and background
    features" (Tamkang University). In training it returns the student's own losses and, beside
    them, ``loss_kd_fg`` and ``loss_kd_bg`` (:class:`FgBgLoss`). In inference it is the student.

    The teacher is no submodule: neither state_dict, nor the optimizer, nor DDP, nor ``train()``
    sees it, only ``.to()`` and its kin do.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None = None,
        teacher_precision: str = "auto",
        kd: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            student: a DenseDetector.
            teacher: a frozen DenseDetector (:func:`build_teacher`); None: plain training.
            teacher_precision: "fp32", "bf16", "fp16", or "auto": as the student trains.
            kd: keyword arguments of :class:`FgBgLoss`. With both weights 0 the teacher is not
                used and training is plain training, bit for bit.

        Raises:
            TeacherError: student and teacher do not fit together.
        """
        super().__init__()
        self.student = student
        kd = dict(kd or {})
        if teacher is not None and kd.get("fg_weight") == 0 and kd.get("bg_weight") == 0:
            teacher = None
        self.__dict__["teacher"] = teacher
        self.kd = None
        if teacher_precision not in PRECISIONS:
            raise ValueError(
                f"MODEL.KD.TEACHER.PRECISION is {teacher_precision!r}: choose from "
                f"{tuple(PRECISIONS)}."
            )
        self.teacher_precision = teacher_precision
        if teacher is not None:
            levels = check_pair(student, teacher)
            self.strides = [level.stride for level in levels]
            self.same_input = same_input(student, teacher)
            # Drawn apart, so that student and data order are those of plain training.
            with torch.random.fork_rng(devices=[]):
                self.kd = FgBgLoss(
                    [level.student_channels for level in levels],
                    [level.teacher_channels for level in levels],
                    **kd,
                )
            if self.kd.bg_weight > 0:
                check_anchors(student, teacher)
            accelerate(teacher)

    @classmethod
    def from_config(cls, cfg):
        kd = cfg.MODEL.KD
        student = build_model(student_config(cfg))
        teacher = None
        if kd.TEACHER.CONFIG and (kd.FG_WEIGHT != 0 or kd.BG_WEIGHT != 0):
            teacher = build_teacher(kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS)
        options = {k.lower(): v for k, v in kd.items() if k not in ("STUDENT", "TEACHER")}
        return {
            "student": student,
            "teacher": teacher,
            "teacher_precision": kd.TEACHER.PRECISION,
            "kd": options,
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn, *args, **kwargs):
        if self.teacher is not None:
            self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: list[dict]):
        """Detectron2's model interface: a dict of losses in training, detections in inference."""
        if not self.training or self.teacher is None:
            return self.student(batched_inputs)
        student = self.student
        images = student.preprocess_image(batched_inputs)
        features, predictions = run_dense(student, images.tensor)
        gt = [x["instances"].to(self.device) for x in batched_inputs]
        losses = student.forward_training(images, features, predictions, gt)
        # The logits and deltas come first in every DenseDetector's predictions.
        output = DenseOutput(features, *predictions[:2])
        losses.update(self._distil(batched_inputs, images, output, gt))
        return losses

    def _distil(self, batched_inputs, images, student: DenseOutput, gt) -> dict:
        storage = get_event_storage()
        scale = self.kd.scale_at(storage.iter)
        if scale == 0:
            return self.kd.zero(student)
        with torch.no_grad(), precision(self.teacher_precision, self.device):
            inputs = images.tensor
            if not self.same_input:
                inputs = teacher_images(self.teacher, self.student, images, batched_inputs)
            features, predictions = run_dense(self.teacher, inputs, head=self.kd.needs_head)
        losses, shares = self.kd(
            student,
            DenseOutput(features, *(predictions or ())[:2]),
            (self.student, self.teacher),
            [x.gt_boxes.tensor for x in gt],
            [x.gt_classes for x in gt],
            images.image_sizes,
            self.strides,
        )
        if (storage.iter + 1) % _LOG_PERIOD == 0:
            storage.put_scalars(
                **{name: share.item() for name, share in shares.items()}, smoothing_hint=False
            )
        return {name: scale * loss for name, loss in losses.items()}


def run_dense(detector: nn.Module, images: torch.Tensor, head: bool = True):
    """DenseDetector.forward between its preprocessing and its losses.

    Args:
        images: (N, 3, H, W), normalised and padded.

    Returns:
        Features per level, and the head's predictions (None if not asked for).
    """
    features = detector.backbone(images)
    features = [features[name] for name in detector.head_in_features]
    return features, detector.head(features) if head else None
