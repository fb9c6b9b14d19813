"""Says early whether the teacher has anything to teach."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

_SHARE = "kd/fg_gate", "kd/bg_gate"


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
        self.shares = []  # pairs of foreground and background

    def after_step(self):
        trainer = self.trainer
        if trainer.start_iter > 0 or trainer.iter >= self.iterations:
            return
        latest = trainer.storage.latest()
        now = [latest[name] for name in _SHARE if name in latest]
        if len(now) == 2 and now[0][1] == trainer.iter:
            self.shares.append([share for share, _ in now])
        if trainer.iter + 1 == min(self.iterations, trainer.max_iter) and self.shares:
            self._judge()

    def _judge(self):
        means = []
        for shares in zip(*self.shares):
            shares = [share for share in shares if share > 0]  # a batch without objects has none
            means.append(sum(shares) / len(shares) if shares else 0.0)
        if means[0] < self.least:
            logger.warning(
                f"The student has next to nothing to learn on objects: in the first "
                f"{self.trainer.iter + 1} iterations the teacher is better than the student on "
                f"{means[0]:.1%} of the foreground cells and {means[1]:.1%} of the background. "
                "Where it is not better it is not followed. Are the teacher's weights, classes, "
                "INPUT.FORMAT and PIXEL_MEAN those it was trained with (MODEL.KD.TEACHER.MIN_AP "
                "measures it), and is it better than what the student starts from?"
            )
