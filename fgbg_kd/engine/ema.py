"""Exponential moving average of a detector's weights, evaluated and saved in their place.

SOLVER.EMA_DECAY by YAML, train.ema_decay by a Python config.
"""

from detectron2.engine import HookBase
from timm.utils import ModelEmaV3
from torch import nn


class WeightAverage(HookBase):
    """Between two steps the detector holds the average, in a step the weights that are trained.

    So evaluation and checkpoints see the average, under the detector's own names, whatever it is
    and whoever looks; the trained weights lie in the checkpoint's trainer state, for ``--resume``.
    It stands before the hooks that look.
    """

    def __init__(self, detector: nn.Module, decay: float):
        """
        Args:
            detector: its parameters and buffers are averaged.
            decay: of the average, in [0, 1); less in the first iterations, so that the average
                forgets the start.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of averaged weights is {decay}: it must be in [0, 1).")
        self.detector = detector
        self.ema = ModelEmaV3(detector, decay, use_warmup=True)
        self.swapped = False  # whether the detector holds the average, and self.ema what is trained
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
        """Exchanges storage: no copies, and the optimizer's parameters stay the same objects."""
        pair = (m.state_dict(keep_vars=True).values() for m in (self.detector, self.ema.module))
        for a, b in zip(*pair):
            a.data, b.data = b.data, a.data
        self.swapped = not self.swapped

    def state_dict(self):
        return {"weights": self.ema.module.state_dict(), "swapped": self.swapped}

    def load_state_dict(self, state):
        # The checkpoint's model is loaded into the detector already: the other half of the pair.
        self.ema.module.load_state_dict(state["weights"])
        self.swapped, self.resumed = state["swapped"], True
