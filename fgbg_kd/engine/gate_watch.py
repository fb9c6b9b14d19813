"""Says early whether the teacher has anything to teach."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

_SHARES = "kd/fg_better", "kd/bg_better"


class GateWatch(HookBase):
    """Warns of a teacher that is worse than its student nearly everywhere.

    The distiller puts the shares into the event storage where the method has a gate; they are read
    there, so nothing waits for the device.
    """

    def __init__(self, iterations: int = 100, least: float = 0.05):
        """
        Args:
            iterations: of a new run, over which the shares are averaged.
            least: share of the foreground cells on which the teacher must be better.
        """
        self.iterations, self.least = iterations, least
        self.shares = {name: [] for name in _SHARES}

    def after_step(self):
        trainer = self.trainer
        if trainer.start_iter > 0 or trainer.iter >= self.iterations:
            return
        latest = trainer.storage.latest()
        for name, shares in self.shares.items():  # a batch without objects has no share of them
            share, when = latest.get(name, (0.0, -1))
            if when == trainer.iter:
                shares.append(share)
        if trainer.iter + 1 == min(self.iterations, trainer.max_iter) and all(self.shares.values()):
            self._judge(*(sum(shares) / len(shares) for shares in self.shares.values()))

    def _judge(self, foreground: float, background: float):
        if foreground < self.least:
            logger.warning(
                f"The student has next to nothing to learn on objects: in the first "
                f"{self.trainer.iter + 1} iterations the teacher is better than the student on "
                f"{foreground:.1%} of the foreground cells and {background:.1%} of the background. "
                "Are the teacher's weights, classes, INPUT.FORMAT and PIXEL_MEAN those it was "
                "trained with (MODEL.KD.TEACHER.MIN_AP measures it), and is it better than what "
                "the student starts from?"
            )
