"""The hooks that runs from YAML configs and from Python configs share."""

import logging
from collections.abc import Callable, Iterable

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..detectors.dense import DenseView
from ..distiller import FgBgDistiller
from ..teacher import Teacher
from ..utils.errors import ConfigError, TeacherError
from .ema import WeightAverage
from .evaluation_trial import Evaluation, EvaluationTrial
from .gate_watch import GateWatch
from .resume import IterationState

logger = logging.getLogger(__name__)


def run_hooks(
    model: nn.Module,
    *,
    seed: int,
    checkpoint_period: int,
    ema_decay: float,
    min_ap: float,
    test_teacher: Callable[[Teacher], dict],
    evaluations: Callable[[], Iterable[Evaluation]],
) -> list[HookBase]:
    """This package's hooks for a run. Register them before Detectron2's hooks.

    Args:
        model: a plain detector or an FgBgDistiller, distributed or not.
        seed: the run's seed.
        checkpoint_period: number of iterations between two checkpoints.
        ema_decay: decay of the weight average (EMA). 0: no average.
        min_ap, test_teacher: see :class:`TeacherCheck`.
        evaluations: see :class:`EvaluationTrial`.
    """
    model = unwrapped(model)
    student = detector_of(model)
    if student is not model:
        parameters = sum(p.numel() for p in student.parameters()) / 1e6
        logger.info(f"Student {type(student).__name__}: {parameters:.2f} M parameters.")
    hooks = [
        IterationState(student, seed, checkpoint_period),
        EvaluationTrial(student, evaluations),
    ]
    if getattr(model, "teacher", None) is not None:
        hooks += [TeacherCheck(min_ap, test_teacher), Inheritance(), GateWatch()]
    if ema_decay != 0:
        hooks.append(WeightAverage(student, ema_decay))
    return hooks


class TeacherCheck(HookBase):
    """Measures the teacher before the first iteration and stops the run if it is too weak."""

    def __init__(self, min_ap: float, test: Callable[[Teacher], dict]):
        """
        Args:
            min_ap: COCO AP (0 to 100) that the teacher must reach. 0: the AP is not measured.
            test: evaluates a teacher. It returns results in the format of DefaultTrainer.test.
        """
        if not 0 <= min_ap <= 100:
            raise ConfigError(
                f"MODEL.KD.TEACHER.MIN_AP is {min_ap}: AP is between 0 and 100. 0 switches the "
                "check off."
            )
        if 0 < min_ap < 1:
            logger.warning(
                f"MODEL.KD.TEACHER.MIN_AP is {min_ap}, less than one AP of 100. For a share of "
                f"{min_ap}, set {100 * min_ap:g}."
            )
        self.min_ap, self.test = min_ap, test

    def before_train(self):
        if self.min_ap <= 0 or self.trainer.iter > 0:
            return
        teacher = unwrapped(self.trainer.model).teacher
        if not isinstance(teacher.view, DenseView):
            raise TeacherError(
                f"MODEL.KD.TEACHER.MIN_AP cannot measure a {teacher.view.name}: the classes of a "
                "two-stage teacher are not matched to the student's. Set MIN_AP 0, and measure the "
                "teacher with its own config and --eval-only."
            )
        results = self.test(teacher)
        # Only the first process has the results, but all processes must stop.
        ap = comm.all_gather(results.get("bbox", {}).get("AP"))[0]
        if ap is None:
            raise TeacherError(
                "MODEL.KD.TEACHER.MIN_AP: the evaluation gives no AP for the teacher. Name a test "
                "set with annotations, or set MIN_AP 0."
            )
        if not ap >= self.min_ap:
            raise TeacherError(
                f"The teacher reaches {ap:.1f} AP on the test set, less than "
                f"MODEL.KD.TEACHER.MIN_AP {self.min_ap}. Check that it was trained on these "
                "classes. Check that its config has the INPUT.FORMAT and PIXEL_MEAN of its "
                "training."
            )
        logger.info(f"The teacher reaches {ap:.1f} AP on the test set.")


class Inheritance(HookBase):
    """Applies MODEL.KD.INHERIT before the first iteration, after all weights are loaded."""

    def before_train(self):
        if self.trainer.iter == 0:
            unwrapped(self.trainer.model).inherit()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def detector_of(model: nn.Module) -> nn.Module:
    """The student of a distiller, or the plain detector that is given."""
    return model.student if isinstance(model, FgBgDistiller) else model


def beside_detector(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that checkpoints hold beside the detector: {"method": module}, or {}."""
    method = getattr(model, "method", None)
    return {} if method is None else {"method": method}
