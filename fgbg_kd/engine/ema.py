"""Exponential moving average (EMA) of a detector's weights.

SOLVER.EMA_DECAY in YAML, or train.ema_decay in a Python config, switches it on.
"""

from detectron2.engine import HookBase
from timm.utils import ModelEmaV3
from torch import nn

from ..utils.errors import ConfigError


class WeightAverage(HookBase):
    """Averages the weights. Evaluation and checkpoints use the average.

    During a training step the detector holds the trained weights. Between two steps it holds the
    average, under the same parameter names. Checkpoints also hold the trained weights, in the
    trainer state, for ``--resume``.

    Register this hook before the hooks that evaluate or save.
    """

    def __init__(self, detector: nn.Module, decay: float):
        """
        Args:
            detector: its parameters and buffers are averaged.
            decay: weight of the previous average in each update, in [0, 1). timm's ModelEmaV3
                reduces the decay in the first iterations, so that the average forgets the initial
                weights.

        Raises:
            ConfigError: ``decay`` is outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ConfigError(
                f"SOLVER.EMA_DECAY (train.ema_decay) is {decay}: choose a value from 0 (off) to "
                "less than 1, such as 0.9998."
            )
        self.detector = detector
        self.ema = ModelEmaV3(detector, decay, use_warmup=True)
        # True: the detector holds the average, and self.ema holds the trained weights.
        self.swapped = False
        self.resumed = False

    def before_train(self):
        if not self.resumed:
            self.ema.set(self.detector)

    def before_step(self):
        if self.swapped:
            self._swap()

    def after_step(self):
        self.ema.update(self.detector, self.trainer.iter + 1)
        self._swap()

    def _swap(self):
        """Exchanges the storage of the two models.

        Nothing is copied. The parameters stay the same objects, so the optimizer still has them.
        """
        both = (m.state_dict(keep_vars=True).values() for m in (self.detector, self.ema.module))
        for a, b in zip(*both):
            a.data, b.data = b.data, a.data
        self.swapped = not self.swapped

    def state_dict(self):
        return {"weights": self.ema.module.state_dict(), "swapped": self.swapped}

    def load_state_dict(self, state):
        # The checkpointer has already loaded the weights that the detector held.
        self.ema.module.load_state_dict(state["weights"])
        self.swapped, self.resumed = state["swapped"], True
