"""The meta-architecture: a student that trains beside a frozen teacher and is alone after."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from .config import method_options, student_config
from .data import training_classes
from .matching import (
    inherited_weights,
    is_dense,
    level_names,
    match_classes,
    padded,
    renormalized,
    same_anchors,
    same_input,
    select,
    shared_levels,
)
from .methods import METHOD_REGISTRY, Batch, DenseOutput
from .teacher import PRECISIONS, accelerate, build_teacher, check_teacher_file, precision
from .teacher_cache import TeacherCache
from .utils.errors import TeacherError

logger = logging.getLogger(__name__)

# Iterations between two readings of a method's statistics: each waits for the device. It is the
# period of Detectron2's writers, which would not show more.
_LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class FgBgDistiller(nn.Module):
    """Trains a DenseDetector (RetinaNet, FCOS) under the guidance of another detector.

    Thesis: "Distilling one-stage object detection network via decoupling foreground and background
    features" (Tamkang University). In training it returns the student's own losses and, beside
    them, those of a :class:`~fgbg_kd.methods.Method`: ``loss_kd_fg`` and ``loss_kd_bg`` of FgBg,
    unless MODEL.KD.METHOD names another. In inference it is the student.

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
        classes: Sequence[str] | None = None,
        inherit: Sequence[str] = (),
        cache: bool = False,
        vis_period: int = 0,
    ):
        """
        Args:
            student: a DenseDetector.
            teacher: a frozen detector (:func:`build_teacher`), which the distiller keeps and
                changes; None: plain training. One that is not dense (Faster R-CNN) teaches by its
                features alone.
            teacher_precision: "fp32", "bf16", "fp16", or "auto": as the student trains.
            kd: "method", a name in METHOD_REGISTRY ("FgBg"), and its keyword arguments; both
                weights of FgBg 0: the teacher is not used and training is plain training, bit for
                bit. "warmup_iters": linear growth of the losses from 0, "stop_iter": from there
                on they are 0; each 0 = off. (MODEL.KD.WARMUP_ITERS is -1 by default, as long
                as the learning rate's warm-up; here the default is 0.)
            classes: names of the student's classes, by which those of a teacher with others are
                found; None: not known.
            inherit: of "fpn" and "head", what :meth:`inherit` copies from the teacher.
            cache: keep the teacher's outputs: for images that come the same every time.
            vis_period: iterations between two pictures in TensorBoard of what distillation sees
                (:mod:`fgbg_kd.experiments.drawing`); 0 = none.

        Raises:
            TeacherError: student and teacher do not fit together.
        """
        super().__init__()
        self.student = student
        kd = {"method": "FgBg", "warmup_iters": 0, "stop_iter": 0, **(kd or {})}
        method, self.warmup_iters, self.stop_iter = (
            kd.pop(name) for name in ("method", "warmup_iters", "stop_iter")
        )
        for name in ("warmup_iters", "stop_iter"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"MODEL.KD.{name.upper()} is {getattr(self, name)}: it must be >= 0."
                )
        if method in METHOD_REGISTRY:
            known = METHOD_REGISTRY.get(method).options()
            if unknown := sorted(kd.keys() - known.keys()):
                raise ValueError(f"{method} has no option {unknown}: choose from {sorted(known)}.")
        if _is_off(method, kd):
            teacher = None
        self.__dict__["teacher"] = teacher
        self.kd = None
        self.cache = TeacherCache() if cache else None
        if teacher_precision not in PRECISIONS:
            raise ValueError(
                f"MODEL.KD.TEACHER.PRECISION is {teacher_precision!r}: choose from "
                f"{tuple(PRECISIONS)}."
            )
        self.teacher_precision = teacher_precision
        self._inherited = {}
        self.vis_period = vis_period
        if teacher is not None:
            levels = self.levels = shared_levels(student, teacher)
            self.same_input = same_input(student, teacher)
            if is_dense(teacher):
                match_classes(student, teacher, classes)
            else:
                kd = _features_only(method, kd, teacher)
            # Drawn apart, so that student and data order are those of plain training.
            with torch.random.fork_rng(devices=[]):
                self.kd = METHOD_REGISTRY.get(method)(*zip(*(x.channels for x in levels)), **kd)
            _check_predictions(method, self.kd, student, teacher, levels)
            self.same_anchors = is_dense(teacher) and same_anchors(student, teacher, levels)
            self._inherited = inherited_weights(student, teacher, inherit)
            accelerate(teacher)

    @classmethod
    def from_config(cls, cfg):
        kd = cfg.MODEL.KD
        student = build_model(student_config(cfg))
        teacher = None
        options = method_options(cfg)
        if kd.TEACHER.CONFIG and not _is_off(kd.METHOD, options):
            teacher = build_teacher(
                kd.TEACHER.CONFIG, kd.TEACHER.WEIGHTS, kd.TEACHER.SHA256, kd.TEACHER.CLASSES
            )
            check_teacher_file(teacher.weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
        elif not kd.TEACHER.CONFIG:
            if kd.TEACHER.WEIGHTS:
                raise TeacherError(
                    f"MODEL.KD.TEACHER.WEIGHTS is {kd.TEACHER.WEIGHTS}, MODEL.KD.TEACHER.CONFIG is "
                    "empty: give the config that they were trained with."
                )
            logger.warning("MODEL.KD.TEACHER.CONFIG is empty: this is plain training.")
        warmup = cfg.SOLVER.WARMUP_ITERS if kd.WARMUP_ITERS == -1 else kd.WARMUP_ITERS
        schedule = {"warmup_iters": warmup, "stop_iter": kd.STOP_ITER}
        return {
            "student": student,
            "teacher": teacher,
            "teacher_precision": kd.TEACHER.PRECISION,
            "kd": {"method": kd.METHOD, **schedule, **options},
            "classes": training_classes(cfg) if teacher is not None else None,
            "inherit": kd.INHERIT,
            "cache": kd.TEACHER.CACHE,
            "vis_period": cfg.VIS_PERIOD,
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
        storage = get_event_storage()
        if self.vis_period > 0 and (storage.iter + 1) % self.vis_period == 0:
            self._draw(storage, batched_inputs)
        return losses

    def _draw(self, storage, batched_inputs: list[dict]) -> None:
        if comm.is_main_process():  # the only one with a writer, which empties the storage
            from .experiments.drawing import draw_training  # matplotlib is needed here only

            one = next((x for x in batched_inputs if len(x["instances"])), batched_inputs[0])
            storage.put_image("kd", draw_training(self, one))

    def _distil(self, batched_inputs, images, student: DenseOutput, gt) -> dict:
        storage = get_event_storage()
        scale = self._scale_at(storage.iter)
        if scale == 0:  # with every parameter in the graph, as DistributedDataParallel wants it
            zero = sum([p.sum() for p in self.kd.parameters()], student.features[0].sum()) * 0.0
            return dict.fromkeys(self.kd.losses, zero)
        with torch.no_grad():
            teacher = self.teach(batched_inputs, images)
        losses, statistics = self.kd(self.batch(student, teacher, images, gt))
        first, last = storage.iter == 0, (storage.iter + 1) % _LOG_PERIOD == 0
        if first or last:
            values = {name: value.item() for name, value in statistics.items()}
            values = {k: v for k, v in values.items() if not math.isnan(v)}  # of no cells
        if first and values:
            logger.info(f"First batch: {', '.join(f'{k} {v:.3f}' for k, v in values.items())}.")
        if last:
            storage.put_scalars(**values, smoothing_hint=False)
        return {name: scale * loss for name, loss in losses.items()}

    def teach(self, batched_inputs: list[dict], images, everything: bool = False) -> DenseOutput:
        """The teacher's output, on its own levels, for the student's preprocessed images.

        Args:
            everything: logits and deltas too where the method has no need of them.
        """

        def run(x):
            wanted = {"logits": self.kd.needs_logits, "boxes": self.kd.needs_boxes}
            if everything:
                wanted = dict.fromkeys(wanted, is_dense(self.teacher))
            features, predictions = run_dense(self.teacher, x, **wanted)
            return DenseOutput(features, *(predictions or ())[:2])

        with precision(self.teacher_precision, self.device):
            inputs = images.tensor
            if not self.same_input:
                inputs = renormalized(self.teacher, self.student, images)
            inputs = padded(self.teacher, inputs, images.image_sizes)
            if self.cache and not everything:
                return self.cache(run, inputs, batched_inputs)
            return run(inputs)

    def batch(self, student: DenseOutput, teacher: DenseOutput, images, gt) -> Batch:
        """Both outputs on the levels that they share, and the ground truth."""
        index = zip(*(level.index for level in self.levels))
        shapes = [student.features[level.index[0]].shape[-2:] for level in self.levels]
        student, teacher = (
            select(output, i, shapes) for output, i in zip((student, teacher), index)
        )
        return Batch(
            student=student,
            teacher=teacher,
            detectors=(self.student, self.teacher),
            gt_boxes=[x.gt_boxes.tensor for x in gt],
            gt_classes=[x.gt_classes for x in gt],
            image_sizes=images.image_sizes,
            strides=[level.stride for level in self.levels],
            same_anchors=self.same_anchors,
        )

    def inherit(self) -> None:
        """Copies what MODEL.KD.INHERIT names from the teacher into the student, once.

        The engines call it after MODEL.WEIGHTS is loaded, which would overwrite it, and never in a
        run that resumes. The teacher's weights are those of its checkpoint, not folded.
        """
        if self._inherited:
            self.student.load_state_dict(self._inherited, strict=False)
            logger.info(f"Inherited from the teacher: {', '.join(self._inherited)}.")
        self._inherited = {}

    def _scale_at(self, iteration: int) -> float:
        """Factor of the losses: linear warm-up, then 1, 0 from stop_iter on."""
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0


def _is_off(method: str, options: Mapping[str, Any]) -> bool:
    """FgBg without either of its terms: plain training, for which no teacher is needed."""
    return method == "FgBg" and options.get("fg_weight") == options.get("bg_weight") == 0


def _features_only(method: str, options: dict[str, Any], teacher: nn.Module) -> dict[str, Any]:
    """The options of a method for a teacher that is not dense."""
    changed = METHOD_REGISTRY.get(method).without_predictions(options)
    off = [f"{k.upper()} {v}" for k, v in changed.items() if options.get(k) != v]
    logger.warning(
        f"The teacher, a {type(teacher).__name__}, predicts no classes per cell: it teaches by its "
        f"features alone{', with MODEL.KD.' if off else ''}{', '.join(off)}."
    )
    if _is_off(method, changed):
        raise TeacherError("That leaves nothing to learn: set MODEL.KD.FG_WEIGHT over 0.")
    return changed


def _check_predictions(method, kd, student, teacher, levels) -> None:
    if kd.needs_logits and not is_dense(teacher):
        raise TeacherError(
            f"MODEL.KD.METHOD {method} compares predictions per cell, and the teacher, a "
            f"{type(teacher).__name__}, has none: use a RetinaNet or FCOS, or another method."
        )
    if kd.compares_logits and not same_anchors(student, teacher, levels):
        sizes = [d.anchor_generator.num_anchors[0] for d in (student, teacher)]
        raise TeacherError(
            f"Student and teacher have other anchors ({sizes[0]} and {sizes[1]} a cell), and "
            f"MODEL.KD.METHOD {method} compares predictions one by one: give both the same "
            "MODEL.ANCHOR_GENERATOR, or use another method."
        )


def run_dense(
    detector: nn.Module, images: torch.Tensor, *, logits: bool = True, boxes: bool = True
):
    """DenseDetector.forward between its preprocessing and its losses; of others, the features.

    Args:
        images: (N, 3, H, W), normalised and padded.
        logits: False: the head is not run.
        boxes: False: its box branch, half of it, is not run where it can be left out.

    Returns:
        Features per level, and the head's predictions (None if not asked for), the logits first.
    """
    features = detector.backbone(images)
    features = [features[name] for name in level_names(detector)]
    if not logits:
        return features, None
    head = detector.head
    if not boxes and type(head) in (RetinaNetHead, FCOSHead):
        return features, ([head.cls_score(head.cls_subnet(f)) for f in features],)
    return features, head(features)
