"""DefaultTrainer with student checkpoints, exact resume, AdamW and checks of the teacher."""

import logging
import os
import weakref
from collections.abc import Sequence

import torch
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n, setup_logger

from ..config import get_fgbg_kd_cfg
from ..data import (
    BoxEvaluator,
    NamingMapper,
    check_num_classes,
    check_same_classes,
    register_datasets,
    training_classes,
)
from ..detectors.dense import channel_order, num_classes_of
from ..teacher import Teacher
from ..teacher_cache import check_fixed_input
from ..utils.build_errors import explained
from ..utils.config_files import expand_paths, merge_overrides, merge_yaml
from ..utils.config_values import check_values
from ..utils.errors import ConfigError, TeacherError
from .checkpointer import RunCheckpointer
from .hooks import beside_detector, detector_of, run_hooks
from .loader import ResumableLoader, random_numbers
from .non_finite import FiniteAMPTrainer, FiniteTrainer
from .resume import begin, run_seed, warm_up
from .unlabeled import Unlabeled, add_unlabeled
from .writers import build_writers

logger = logging.getLogger(__name__)


def load_config(config_file: str, opts: list[str] = (), resume: bool = False):
    """Reads a YAML config with KEY VALUE overrides and registers the data that it names.

    Returns:
        The frozen config. If SEED is -1, a seed is drawn. On resume, the drawn seed is used again.
    """
    cfg = read_run_config(config_file, opts, resume)
    register_datasets(cfg)
    return cfg


def read_run_config(config_file: str, opts: list[str] = (), resume: bool = False):
    """:func:`load_config` without registration of data, so that a log can be opened first."""
    cfg = read_config(config_file, opts)
    cfg.SEED = run_seed(cfg.SEED, cfg.OUTPUT_DIR, resume)
    cfg.freeze()
    return cfg


def read_config(config_file: str, opts: list[str] = ()):
    """The config with its overrides. It is not frozen, and a SEED of -1 stays -1."""
    cfg = get_fgbg_kd_cfg()
    merge_yaml(cfg, config_file)
    merge_overrides(cfg, opts)
    expand_paths(cfg)
    check_values(cfg)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        # Logged once, because a tool may read many configs.
        log_first_n(
            logging.WARNING,
            "No CUDA device is available: MODEL.DEVICE is set to cpu.",
            name=__name__,
        )
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        logger.warning("Detectron2 has mixed precision on CUDA only: SOLVER.AMP is turned off.")
        cfg.SOLVER.AMP.ENABLED = False
    return cfg


def read_for(teacher: Teacher, cfg):
    """A copy of a config that reads test images for a teacher: in its channel order and size."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = channel_order(teacher.detector)
    if teacher.test_size is not None:
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = teacher.test_size
    return cfg


class FgBgTrainer(DefaultTrainer):
    """Trains a plain detector like DefaultTrainer, or the student of an FgBgDistiller.

    Checkpoints hold the student under the parameter names of the plain detector. The method's
    parameters are in the same file under the key "method". If SEED is set, a run that is killed and
    resumed ends with the same weights as an uninterrupted run. :func:`load_config` sets SEED.
    """

    def __init__(self, cfg, hooks: Sequence[HookBase] = ()):
        """
        Args:
            cfg: a config from :func:`load_config`.
            hooks: the user's hooks. They run after each step, before its results are written.
        """
        # DefaultTrainer's constructor cannot distribute a model on CPUs. It would also save
        # the whole model in checkpoints.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        if cfg.SEED < 0:
            cfg.SEED = comm.shared_random_seed()
        cfg.freeze()
        self.cfg, self.extra_hooks = cfg, list(hooks)
        model = self.build_model(cfg)
        with explained(cfg, "optimizer"):
            optimizer = self.build_optimizer(cfg, model)
        trainer = FiniteAMPTrainer if cfg.SOLVER.AMP.ENABLED else FiniteTrainer
        with explained(cfg, "training data"):
            loader = self.build_train_loader(cfg)
        if cfg.DATASETS.UNLABELED:
            teacher = getattr(model, "teacher", None)
            add_unlabeled(loader, teacher, self.unlabeled(cfg, teacher))
        self._trainer = trainer(
            distributed(model), loader, optimizer, output_dir=cfg.OUTPUT_DIR, seed=cfg.SEED
        )
        with explained(cfg, "schedule of the learning rate (SOLVER)"):
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RunCheckpointer(
            detector_of(model),
            cfg.OUTPUT_DIR,
            max_to_keep=cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP,
            trainer=weakref.proxy(self),
            **beside_detector(model),
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg, num_workers: int):
        """Detectron2's scaling by SOLVER.REFERENCE_WORLD_SIZE. It also scales MODEL.KD.*_ITER*."""
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if reference in (0, num_workers):
            return scaled
        scaled = scaled.clone()
        scaled.defrost()
        for key in ("STOP_ITER", "WARMUP_ITERS"):
            if scaled.MODEL.KD[key] > 0:  # -1 follows SOLVER.WARMUP_ITERS, which is scaled
                scaled.MODEL.KD[key] = round(scaled.MODEL.KD[key] * reference / num_workers)
        scaled.freeze()
        return scaled

    def resume_or_load(self, resume=True):
        super().resume_or_load(resume=resume)
        span = self.start_iter, self.max_iter
        begin(*span, self.data_loader, self.cfg.OUTPUT_DIR, self.cfg.SEED, resume)
        warm_up(self.start_iter, self.cfg.MODEL.DEVICE)

    @classmethod
    def build_model(cls, cfg):
        with explained(cfg):
            model = super().build_model(cfg)
        detector = detector_of(model)
        check_same_classes((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if (number := num_classes_of(detector)) is not None:
            check_num_classes(cfg, number)
        if cfg.SOLVER.CHANNELS_LAST:  # activations follow the format of the weights
            model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "AdamW":
            raise ConfigError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}: use SGD or AdamW.")
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
    def build_lr_scheduler(cls, cfg, optimizer):
        try:
            return super().build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            raise ConfigError(
                f"SOLVER.LR_SCHEDULER_NAME is {cfg.SOLVER.LR_SCHEDULER_NAME!r}, and Detectron2 "
                f"cannot build this schedule ({error}): use WarmupMultiStepLR or WarmupCosineLR."
            ) from error

    @classmethod
    def build_train_loader(cls, cfg):
        mapper = NamingMapper(cfg, True)
        if cfg.MODEL.META_ARCHITECTURE == "FgBgDistiller" and cfg.MODEL.KD.TEACHER.CACHE:
            check_fixed_input(mapper)
        with random_numbers(cfg.SEED):  # Detectron2 v0.6 draws the sampler's seed
            parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
        return ResumableLoader(**parts, seed=cfg.SEED)

    @classmethod
    def unlabeled(cls, cfg, teacher: Teacher | None) -> Unlabeled:
        """The photos without labels of a config, and how they are used."""
        options = cfg.MODEL.KD.UNLABELED
        reading = cfg if teacher is None else read_for(teacher, cfg)
        return Unlabeled(
            folders=cfg.DATASETS.UNLABELED,
            share=options.SHARE,
            precision=options.PRECISION,
            file=options.FILE or os.path.join(cfg.OUTPUT_DIR, "unlabeled.json"),
            training=[x for name in cfg.DATASETS.TRAIN for x in DatasetCatalog.get(name)],
            tests=cfg.DATASETS.TEST,
            classes=training_classes(cfg),
            mapper=NamingMapper(reading, False),
            longest=cfg.INPUT.MAX_SIZE_TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=NamingMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:  # their files have the same names
            folder = os.path.join(folder, dataset_name)
        return BoxEvaluator(dataset_name, folder)

    def build_hooks(self):
        cfg, trainer = self.cfg, weakref.proxy(self)
        own = run_hooks(
            self.model,
            seed=cfg.SEED,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            ema_decay=cfg.SOLVER.EMA_DECAY,
            min_ap=cfg.MODEL.KD.TEACHER.MIN_AP,
            test_teacher=lambda teacher: trainer.test_teacher(teacher),
            evaluations=lambda: trainer.evaluations(),
        )
        return own + self.extra_hooks + super().build_hooks()

    def build_writers(self):
        return [*build_writers(self.cfg.WRITERS, self.cfg.OUTPUT_DIR), *super().build_writers()]

    def evaluations(self):
        """The loader and the evaluators of each test set."""
        for name in self.cfg.DATASETS.TEST:
            loader = self.build_test_loader(self.cfg, name)
            yield loader, [self.build_evaluator(self.cfg, name)]

    def test_teacher(self, teacher: Teacher) -> dict:
        """Results on DATASETS.TEST, whose images are read by :func:`read_for`."""
        if len(self.cfg.DATASETS.TEST) != 1:
            raise TeacherError(
                f"MODEL.KD.TEACHER.MIN_AP needs one test set, but DATASETS.TEST names "
                f"{tuple(self.cfg.DATASETS.TEST)}: name one, or set MIN_AP 0."
            )
        return self.test(read_for(teacher, self.cfg), teacher.detector)

    # Detectron2 v0.6 does not save the optimizer. These two methods equal those of its main branch.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])


def distributed(model, **options):
    """The model, wrapped in DistributedDataParallel if there are several processes."""
    # On CPUs, DistributedDataParallel takes no device, but create_ddp_model would give one.
    on_cpu = next(model.parameters()).device.type == "cpu"
    devices = {"device_ids": None} if on_cpu else {}
    return create_ddp_model(model, **{"broadcast_buffers": False, **devices, **options})
