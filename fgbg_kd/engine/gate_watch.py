"""Warns early in a run if the teacher hardly leads the student."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


class GateWatch(HookBase):
    """Warns if the teacher finds the objects hardly better than the student.

    The hook averages kd/fg_lead over the first iterations. The distiller writes it every 20
    iterations, so that the GPU is rarely waited for. Without a gate there is no kd/fg_lead, and
    the hook does nothing.
    """

    def __init__(self, iterations: int = 100, least: float = 0.02):
        """
        Args:
            iterations: number of iterations to average, from the start of a new run.
            least: the hook warns if the mean is lower. A lead is in [0, 1].
        """
        self.iterations, self.least = iterations, least
        self.leads: list[float] = []

    def after_step(self):
        trainer = self.trainer
        if trainer.start_iter > 0 or trainer.iter >= self.iterations:
            return
        lead, when = trainer.storage.latest().get("kd/fg_lead", (0.0, -1))
        if when == trainer.iter:  # a batch without objects has no lead
            self.leads.append(lead)
        if trainer.iter + 1 == min(self.iterations, trainer.max_iter) and self.leads:
            self._judge(sum(self.leads) / len(self.leads))

    def _judge(self, lead: float):
        if lead < self.least:
            logger.warning(
                f"The teacher is hardly better than the student: in the first "
                f"{self.trainer.iter + 1} iterations, its best score on an object was higher by "
                f"{lead:.3f} on average. Check that MODEL.KD.TEACHER.CONFIG is the config that the "
                "teacher was trained with (classes, INPUT.FORMAT, PIXEL_MEAN). Check that the "
                "student does not start from better weights (MODEL.WEIGHTS). Set "
                "MODEL.KD.TEACHER.MIN_AP to measure the teacher before training."
            )
