"""The meta-architecture that trains a student with a frozen teacher."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .config import method_options, student_config
from .data import training_classes, usual_size
from .detectors.dense import DenseOutput, DenseView
from .detectors.load import starts_trained
from .matching import (
    SharedLevel,
    check_predictions,
    dense_student,
    inherited_weights,
    match_classes,
    options_of_pair,
    same_anchors,
    select,
    select_unwarped,
    shared_levels,
    shrink_of,
)
from .methods import Batch, Method, build_method, complete_options, get_method
from .methods.base import check_not_negative
from .own_losses import labeled_first, own_losses
from .teacher import Teacher, accelerate, build_teacher, check_same_format, check_teacher_file
from .utils.errors import ConfigError, TeacherError

logger = logging.getLogger(__name__)

# Number of iterations between two readings of a method's statistics. Each reading waits for the
# device. Detectron2's writers write as often by default.
_LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class FgBgDistiller(nn.Module):
    """Trains a one-stage detector under the guidance of another detector.

    Thesis: "Distilling one-stage object detection network via decoupling foreground and background
    features" (Tamkang University). In training it returns the student's own losses and the losses
    of a :class:`~fgbg_kd.methods.Method`. The default method, FgBg, has the losses ``loss_kd_fg``,
    ``loss_kd_bg_features`` and ``loss_kd_bg``. In inference it returns the student's detections.

    Attributes:
        student: the detector that learns.
        teacher: a :class:`~fgbg_kd.teacher.Teacher`, or None: plain training.
        method: the Method, or None without a teacher.
        levels: the feature levels that student and teacher share.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        method: Mapping[str, Any] | None = None,
        warmup_iters: int = 0,
        stop_iter: int = 0,
        unlabeled_weight: float = 1.0,
        classes: Sequence[str] | None = None,
        inherit: Sequence[str] = (),
        image_size: tuple[int, int] | None = None,
        pretrained: bool = False,
    ):
        """
        Args:
            student: a dense detector.
            teacher: the result of :func:`~fgbg_kd.teacher.build_teacher`, or a frozen detector,
                which is changed in place. None: plain training. If the detector is not dense
                (Faster R-CNN), only its features are used.
            method: "name" of the method (default "FgBg") and its options. Missing options have the
                defaults of the config. If the options switch the method off, training equals plain
                training bit for bit.
            warmup_iters: number of iterations in which the distillation losses grow linearly from
                0; 0: no warm-up. A config that does not set it gets the learning rate's warm-up.
            stop_iter: from this iteration on, the distillation losses are 0; 0: never.
            unlabeled_weight: scales the student's own losses on photos without labels; 0: off.
            classes: names of the student's classes, to find the teacher's. None: not known.
            inherit: parts that :meth:`inherit` copies from the teacher: "fpn", "head".
            image_size: usual (height, width) of the training images. A teacher that warps images to
                one size (SSD) needs it, so that levels of similar size meet. None: not known.
            pretrained: whether the student, or its backbone, starts from trained weights.

        Raises:
            TeacherError: student and teacher do not fit together.
            ValueError: an unknown option, or a value out of range.
        """
        super().__init__()
        check_not_negative("", warmup_iters=warmup_iters, stop_iter=stop_iter)
        check_not_negative("UNLABELED", loss_weight=unlabeled_weight)
        self.student = student
        self.warmup_iters, self.stop_iter = warmup_iters, stop_iter
        self.unlabeled_weight, self.pretrained = unlabeled_weight, pretrained
        self.method: Method | None = None
        self.levels: list[SharedLevel] = []
        self.same_anchors = False
        self._inherited: dict[str, Tensor] = {}
        name, options = _method_of(method)
        if get_method(name).is_off(options):
            _say_that_it_is_off(name, inherit)
            teacher = None
        if isinstance(teacher, nn.Module):
            teacher = Teacher(teacher)
        # Not a registered submodule: state_dict, the optimizer and train() do not see the teacher.
        self.__dict__["teacher"] = teacher
        if teacher is not None:
            self._meet(teacher, name, options, classes, image_size)
            self._inherited = inherited_weights(student, teacher.detector, inherit)
            accelerate(teacher.detector)

    def _meet(self, teacher: Teacher, name: str, options: dict, classes, image_size) -> None:
        """Finds the common levels and classes, and builds the method for them."""
        student = dense_student(self.student)
        check_same_format(student, teacher.view)
        shrink = shrink_of(student, teacher.view, image_size)
        self.levels = levels = shared_levels(student, teacher.view, shrink)
        if isinstance(teacher.view, DenseView):
            match_classes(student, teacher.view, classes, teacher.class_names)
            if classes and teacher.class_names:  # the head has them now
                teacher.class_names = list(classes)
            self.same_anchors = same_anchors(student, teacher.view, levels)
        given = options
        options = options_of_pair(name, given, student, teacher.view, self.pretrained)
        node = f"MODEL.KD.{name.upper()}"
        new = ", ".join(f"{node}.{k.upper()} {v}" for k, v in options.items() if v != given[k])
        if not isinstance(teacher.view, DenseView):
            logger.warning(
                f"The teacher, a {teacher.view.name}, predicts no classes per cell. Only its "
                f"features are used{', with ' if new else ''}{new}."
            )
        elif new:
            logger.info(f"For this pair: {new}.")
        # The global random state stays unchanged, so that the student and the order of the data
        # are the same as in plain training.
        with torch.random.fork_rng(devices=[]):
            channels = zip(*(level.channels for level in levels))
            self.method = build_method(name, *channels, **options)
        check_predictions(name, self.method, student, teacher.view, self.same_anchors)

    @classmethod
    def from_config(cls, cfg):
        kd = cfg.MODEL.KD
        student = build_model(student_config(cfg))
        options = method_options(cfg)
        teacher = None
        if not kd.TEACHER.CONFIG:
            if kd.TEACHER.WEIGHTS:
                raise TeacherError(
                    f"MODEL.KD.TEACHER.WEIGHTS is {kd.TEACHER.WEIGHTS}, but "
                    "MODEL.KD.TEACHER.CONFIG is empty: name the config that these weights were "
                    "trained with."
                )
            logger.warning("MODEL.KD.TEACHER.CONFIG is empty: this is plain training.")
        elif not get_method(kd.METHOD).is_off(options):
            teacher = build_teacher(**{key.lower(): kd.TEACHER[key] for key in _TEACHER_KEYS})
            check_teacher_file(teacher.weights, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
        warmup = cfg.SOLVER.WARMUP_ITERS if kd.WARMUP_ITERS == -1 else kd.WARMUP_ITERS
        return {
            "student": student,
            "teacher": teacher,
            "method": {"name": kd.METHOD, **options},
            "warmup_iters": warmup,
            "stop_iter": kd.STOP_ITER,
            "unlabeled_weight": kd.UNLABELED.LOSS_WEIGHT,
            "classes": training_classes(cfg) if teacher is not None else None,
            "inherit": kd.INHERIT,
            "image_size": usual_size(cfg),
            "pretrained": starts_trained(cfg),
        }

    @property
    def device(self) -> torch.device:
        return self.student.device

    def _apply(self, fn, *args, **kwargs):
        if self.teacher is not None:
            self.teacher.detector._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, batched_inputs: list[dict]):
        """Detectron2's model interface: a dict of losses in training, detections in inference."""
        if not self.training or self.teacher is None:
            return self.student(batched_inputs)
        student = dense_student(self.student)
        batched_inputs, labeled = labeled_first(batched_inputs)
        batched_inputs = student.as_seen(batched_inputs)
        images = student.preprocess(batched_inputs)
        gt = [x["instances"].to(self.device) for x in batched_inputs]
        output = student.run(images.tensor, logits=self.method.needs_logits)
        losses = own_losses(student, images, output, gt, labeled, self.unlabeled_weight)
        scale = self.scale_at(get_event_storage().iter)
        if scale == 0:
            return losses | self._zeros(output)
        target = self.teacher(images, batched_inputs, student, logits=self.method.needs_logits)
        batch = self.match(output, target, images, gt)
        if batch.loss_normalizer is not None and labeled < len(gt):  # it is of the labelled images
            normalizer = batch.loss_normalizer * len(gt) / labeled
            batch = batch._replace(loss_normalizer=normalizer)
        guidance, statistics = self.method(batch)
        _log(statistics)
        return losses | {name: scale * loss for name, loss in guidance.items()}

    def match(self, student: DenseOutput, teacher: DenseOutput, images: ImageList, gt) -> Batch:
        """Puts both outputs on the shared levels, with maps of equal size, and adds ground truth.

        Args:
            student, teacher: outputs, each on its own levels.
            images: the student's batch.
            gt: N Instances on the device.
        """
        of = dense_student(self.student)
        mine, theirs = zip(*(level.place for level in self.levels))
        shapes = [student.features[i].shape[-2:] for i in mine]
        strides = [level.stride for level in self.levels]
        if self.teacher.warps(images):
            teacher = select_unwarped(teacher, theirs, shapes, strides, images.image_sizes)
        else:
            teacher = select(teacher, theirs, shapes)
        student = select(student, mine, shapes)
        return Batch(
            student=student,
            teacher=teacher,
            gt_boxes=[x.gt_boxes.tensor for x in gt],
            gt_classes=[x.gt_classes for x in gt],
            image_sizes=images.image_sizes,
            strides=strides,
            num_classes=of.num_classes,
            same_anchors=self.same_anchors,
            loss_normalizer=of.loss_normalizer,
        )

    def scale_at(self, iteration: int) -> float:
        """Factor for the method's losses: linear warm-up, then 1, and 0 from stop_iter on."""
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        return min(1.0, (iteration + 1) / self.warmup_iters) if self.warmup_iters else 1.0

    def _zeros(self, output: DenseOutput) -> dict[str, Tensor]:
        """Losses of 0. DistributedDataParallel requires every parameter in their graph."""
        zero = output.features[0].new_zeros(())
        zero = sum([p.sum() for p in self.method.parameters()], zero) * 0.0
        return dict.fromkeys(self.method.losses, zero)

    def inherit(self) -> None:
        """Copies the parts in MODEL.KD.INHERIT from the teacher into the student, once.

        The engines call it after MODEL.WEIGHTS is loaded. They do not call it in a resumed run.
        """
        if self._inherited:
            self.student.load_state_dict(self._inherited, strict=False)
            logger.info(f"Inherited from the teacher: {', '.join(self._inherited)}.")
        self._inherited = {}


_TEACHER_KEYS = ("CONFIG", "WEIGHTS", "SHA256", "CLASSES", "PRECISION", "CACHE")


def _say_that_it_is_off(name: str, inherit: Sequence[str]) -> None:
    if inherit:
        raise ConfigError(
            f"MODEL.KD.INHERIT copies {', '.join(inherit)} from the teacher, but the "
            f"weights of {name} are 0, and plain training loads no teacher: give a weight "
            "over 0. To use the copy with almost no distillation, set MODEL.KD.STOP_ITER 1."
        )
    logger.info(f"The weights of {name} switch it off: this is plain training.")


def _method_of(method: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The method's name and its complete options."""
    options = {"name": "FgBg", **(method or {})}
    name = options.pop("name")
    get_method(name)
    return name, complete_options(name, options)


def _log(statistics: dict[str, Tensor]) -> None:
    """Puts statistics into the event storage. Also logs the statistics of the first batch."""
    storage = get_event_storage()
    first, last = storage.iter == 0, (storage.iter + 1) % _LOG_PERIOD == 0
    if not (first or last):
        return
    values = {name: value.item() for name, value in statistics.items()}
    values = {name: v for name, v in values.items() if not math.isnan(v)}  # NaN: no cells
    if first and values:
        logger.info(f"First batch: {', '.join(f'{k} {v:.3f}' for k, v in values.items())}.")
    if last:
        storage.put_scalars(**values, smoothing_hint=False)
