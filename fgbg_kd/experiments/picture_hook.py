"""Pictures of distillation in TensorBoard during training."""

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..distiller import FgBgDistiller
from ..engine.hooks import unwrapped
from .drawing import draw_distillation


class DistillationPictures(HookBase):
    """Puts a picture of an image in the batch into the event storage, as "distillation".

    The hook does not change training, bit for bit. Register it before the writers. Then they write
    the picture in the same step.

    Example::

        trainer.register_hooks([DistillationPictures(cfg.VIS_PERIOD)])
    """

    def __init__(self, period: int):
        """
        Args:
            period: iterations between two pictures; 0: no pictures.
        """
        self.period = period

    def after_step(self):
        model = unwrapped(self.trainer.model)
        if (
            self.period <= 0
            or (self.trainer.iter + 1) % self.period
            or not comm.is_main_process()
            or not isinstance(model, FgBgDistiller)
            or model.teacher is None
        ):
            return
        # In FgBgTrainer, an inner trainer runs the steps.
        batch = getattr(self.trainer, "_trainer", self.trainer).batch
        inputs = next((x for x in batch if len(x["instances"])), batch[0])
        self.trainer.storage.put_image("distillation", draw_distillation(model, inputs))
