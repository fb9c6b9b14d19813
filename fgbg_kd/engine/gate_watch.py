"""Warns early in a run if the student hardly follows the teacher on objects."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


class GateWatch(HookBase):
    """Warns if the gate of the objects is nearly closed from the start.

    The hook averages kd/fg_gate over the first iterations. The distiller writes it every 20
    iterations, so that the GPU is rarely waited for. With GATE False it is 1, so the hook never
    warns. Methods without kd/fg_gate are not judged.
    """

    def __init__(self, iterations: int = 100, least: float = 0.2):
        """
        Args:
            iterations: number of iterations to average, from the start of a new run.
            least: the hook warns if the mean gate is lower. A gate is in [0, 1].
        """
        self.iterations, self.least = iterations, least
        self.gates: list[float] = []

    def after_step(self):
        trainer = self.trainer
        if trainer.start_iter > 0 or trainer.iter >= self.iterations:
            return
        gate, when = trainer.storage.latest().get("kd/fg_gate", (0.0, -1))
        if when == trainer.iter:  # a batch without objects has no gate
            self.gates.append(gate)
        if trainer.iter + 1 == min(self.iterations, trainer.max_iter) and self.gates:
            self._judge(sum(self.gates) / len(self.gates))

    def _judge(self, gate: float):
        if gate < self.least:
            logger.warning(
                f"The student hardly follows the teacher: in the first {self.trainer.iter + 1} "
                f"iterations, the mean gate of the objects was {gate:.3f}. So the teacher's scores "
                "on the objects are low, or lower than the student's. Check that "
                "MODEL.KD.TEACHER.CONFIG is the config that the teacher was trained with (classes, "
                "INPUT.FORMAT, PIXEL_MEAN). Check that the student does not start from better "
                "weights (MODEL.WEIGHTS). Set MODEL.KD.TEACHER.MIN_AP to measure the teacher "
                "before training."
            )
