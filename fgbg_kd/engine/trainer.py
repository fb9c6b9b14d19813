"""DefaultTrainer with three differences: student checkpoints, AdamW, and checks of the teacher."""

import contextlib
import logging
import os
import random
import weakref

import numpy as np
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import SafeCheckpointer
from ..config import get_fgbg_kd_cfg, merge_overrides, merge_yaml
from ..data import NamingMapper, check_num_classes, register_datasets
from ..distiller import FgBgDistiller
from ..pair import channel_order
from ..teacher import TeacherError

logger = logging.getLogger(__name__)


def load_config(config_file: str, opts: list[str] = ()):
    """Reads a YAML config and key-value overrides, and registers the data that they name."""
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, config_file)
    merge_overrides(cfg, opts)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.warning("No CUDA device here: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    register_datasets(cfg)
    return cfg


class FgBgTrainer(DefaultTrainer):
    """Trains a plain detector as DefaultTrainer does, and a student under FgBgDistiller.

    Checkpoints hold the student under the plain detector's own names; the adapters lie beside it
    under the key "kd".
    """

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        detector = model.student if isinstance(model, FgBgDistiller) else model
        check_num_classes(cfg, detector.num_classes)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "AdamW":
            raise ValueError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}: use SGD or AdamW.")
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=NamingMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=NamingMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    def build_hooks(self):
        # The hooks share the checkpointer, and DefaultTrainer builds both in its constructor:
        # this is the one place between the two.
        model = _unwrapped(self.model)
        detector, adapters, hooks = model, {}, []
        if isinstance(model, FgBgDistiller):
            detector, adapters = model.student, {"kd": model.kd} if model.kd is not None else {}
            if model.teacher is not None:
                hooks += [TeacherCheck(), Inheritance()]
        self.checkpointer = SafeCheckpointer(
            detector, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **adapters
        )
        return hooks + super().build_hooks()

    # v0.6 leaves the optimizer out of its checkpoints; main has these two as they are here.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


class TeacherCheck(HookBase):
    """Before the first iteration, measures the teacher if MODEL.KD.TEACHER.MIN_AP asks for it."""

    def before_train(self):
        cfg, trainer = self.trainer.cfg, self.trainer
        minimum = cfg.MODEL.KD.TEACHER.MIN_AP
        if minimum <= 0 or trainer.iter > 0:
            return
        if len(cfg.DATASETS.TEST) != 1:
            raise TeacherError(
                f"MODEL.KD.TEACHER.MIN_AP needs one set to measure on, DATASETS.TEST names "
                f"{tuple(cfg.DATASETS.TEST)}: name one, or set MIN_AP 0."
            )
        teacher = _unwrapped(trainer.model).teacher
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.FORMAT = channel_order(teacher)
        with _random_states_kept():  # reading data draws numbers that training should draw
            results = trainer.test(cfg, teacher)
        # Only the first worker has the results, and all of them have to stop.
        ap = comm.all_gather(results.get("bbox", {}).get("AP"))[0]
        if not ap >= minimum:
            raise TeacherError(
                f"The teacher reaches {ap:.1f} AP on {cfg.DATASETS.TEST}, less than "
                f"MODEL.KD.TEACHER.MIN_AP {minimum}: is it trained on these classes, and are its "
                "INPUT.FORMAT and PIXEL_MEAN those of its config?"
            )
        logger.info(f"The teacher reaches {ap:.1f} AP on {cfg.DATASETS.TEST}.")


class Inheritance(HookBase):
    """Before the first iteration, when all weights are loaded: MODEL.KD.INHERIT."""

    def before_train(self):
        if self.trainer.iter == 0:
            _unwrapped(self.trainer.model).inherit()


def _unwrapped(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def _random_states_kept():
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
