"""Warns early in a run if the teacher is hardly ever better than the student."""

import logging

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

_SHARES = "kd/fg_better", "kd/bg_better"


class GateWatch(HookBase):
    """Warns if the teacher is better than the student on almost no foreground cell.

    The hook averages two statistics over the first iterations: kd/fg_better and kd/bg_better. They
    are the shares of foreground and background cells on which the teacher's quality is higher. A
    method without a gate does not write them, so the hook does nothing. Reading them from the event
    storage does not wait for the GPU.
    """

    def __init__(self, iterations: int = 100, least: float = 0.05):
        """
        Args:
            iterations: number of iterations to average, from the start of a new run.
            least: the hook warns if the teacher is better on a smaller share of the foreground
                cells.
        """
        self.iterations, self.least = iterations, least
        self.shares = {name: [] for name in _SHARES}

    def after_step(self):
        trainer = self.trainer
        if trainer.start_iter > 0 or trainer.iter >= self.iterations:
            return
        latest = trainer.storage.latest()
        for name, shares in self.shares.items():  # a batch without objects has no kd/fg_better
            share, when = latest.get(name, (0.0, -1))
            if when == trainer.iter:
                shares.append(share)
        if trainer.iter + 1 == min(self.iterations, trainer.max_iter) and all(self.shares.values()):
            self._judge(*(sum(shares) / len(shares) for shares in self.shares.values()))

    def _judge(self, foreground: float, background: float):
        if foreground < self.least:
            logger.warning(
                f"The teacher is hardly ever better than the student: in the first "
                f"{self.trainer.iter + 1} iterations it was better on {foreground:.1%} of the "
                f"foreground cells and {background:.1%} of the background cells. Check that "
                "MODEL.KD.TEACHER.CONFIG is the config that the teacher was trained with (classes, "
                "INPUT.FORMAT, PIXEL_MEAN). Check that the student does not start from better "
                "weights (MODEL.WEIGHTS). Set MODEL.KD.TEACHER.MIN_AP to measure the teacher "
                "before training."
            )
