"""Training and evaluation by a Python config (LazyConfig), with Detectron2's usual fields:
model, dataloader, optimizer, lr_multiplier and train, as in its tools/lazyconfig_train_net.py."""

import copy
import logging
import os

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import SafeCheckpointer
from ..config import student_model
from ..data import training_classes
from ..pair import channel_order
from .ema import WeightAverage
from .finite import FiniteAMPTrainer, FiniteTrainer
from .gate_watch import GateWatch
from .loader import ResumableLoader
from .resume import IterationState, RunCheckpointer, rewind_metrics, warm_up
from .trainer import Inheritance, TeacherCheck, adapters_of, detector_of, distributed

logger = logging.getLogger(__name__)


def load_lazy_config(config_file: str, opts: list[str] = ()) -> DictConfig:
    """Reads a Python config, which is code that runs, and overrides like ``train.max_iter=9``."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config_file), list(opts))
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device here: train.device is set to cpu.")
        cfg.train.device = "cpu"
    return cfg


def train_lazy(cfg: DictConfig, resume: bool = False) -> dict:
    """Trains ``cfg.model``, a plain detector or an FgBgDistiller.

    As with FgBgTrainer, checkpoints hold the (student's) detector under its own names, and the
    adapters beside it under the key "kd".

    Returns:
        The last results of the evaluation, {} without one.
    """
    model = build_lazy(cfg).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    seed = cfg.train.get("seed", -1)
    if seed < 0:
        seed = comm.shared_random_seed()
    loader = _train_loader(cfg.dataloader.train, seed)
    trainer = (FiniteAMPTrainer if cfg.train.amp.enabled else FiniteTrainer)(
        distributed(model, **cfg.train.ddp),
        loader,
        optimizer,
        output_dir=cfg.train.output_dir,
    )
    checkpointer = RunCheckpointer(
        detector_of(model), cfg.train.output_dir, trainer=trainer, **adapters_of(model)
    )
    results = {}

    def evaluate():
        results.clear()
        results.update(evaluate_lazy(cfg, trainer.model))
        return results

    period = cfg.train.checkpointer.period
    trainer.register_hooks([IterationState(detector_of(model), seed, period)])
    if getattr(model, "teacher", None) is not None:
        min_ap = cfg.train.get("teacher_min_ap", 0)
        check = TeacherCheck(min_ap, lambda x: evaluate_lazy(cfg, x, channel_order(x)))
        trainer.register_hooks([check, Inheritance(), GateWatch()])
    if decay := cfg.train.get("ema_decay", 0):
        trainer.register_hooks([WeightAverage(detector_of(model), decay)])
    on_main, saving, writing = comm.is_main_process(), None, None
    if on_main:
        saving = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        writing = hooks.PeriodicWriter(writers, period=cfg.train.log_period)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saving,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            writing,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if isinstance(loader, ResumableLoader):
        loader.start = start
    elif start:
        logger.warning("dataloader.train is not Detectron2's loader: the data begins anew.")
    warm_up(start)
    metrics = os.path.join(cfg.train.output_dir, "metrics.json")
    if resume and on_main and os.path.isfile(metrics):
        rewind_metrics(metrics, start)
    trainer.train(start, cfg.train.max_iter)
    return results


def evaluate_lazy(cfg: DictConfig, model: nn.Module, image_format: str = "") -> dict:
    """Results of ``dataloader.evaluator`` on ``dataloader.test``; {} if the config has none.

    Args:
        image_format: "RGB" or "BGR", for a model that takes another than the config's mapper gives.
    """
    if cfg.dataloader.get("evaluator") is None:
        return {}
    test = copy.deepcopy(cfg.dataloader.test)
    if image_format:
        test.mapper.image_format = image_format
    results = inference_on_dataset(model, instantiate(test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def load_lazy_student(cfg: DictConfig, resume: bool = False) -> nn.Module:
    """The student of ``cfg.model``, or the plain detector that it is; no teacher is built.

    Args:
        resume: take the last checkpoint in ``train.output_dir``, not ``train.init_checkpoint``.
    """
    model = instantiate(student_model(cfg.model)).to(cfg.train.device)
    SafeCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=resume
    )
    return model


def _train_loader(cfg: DictConfig, seed: int):
    """``dataloader.train``; if it is Detectron2's own loader, one that can resume, as by YAML."""
    options = set(cfg) - {"_target_"}
    target = locate(cfg._target_) if isinstance(cfg._target_, str) else cfg._target_
    known = {"dataset", "mapper", "total_batch_size", "aspect_ratio_grouping", "num_workers"}
    if target is not build_detection_train_loader or not options <= known:
        return instantiate(cfg)
    parts = {name: instantiate(cfg[name]) for name in options}
    sampler = TrainingSampler(len(parts["dataset"]), seed=seed)
    return ResumableLoader(**parts, sampler=sampler, seed=seed)


def build_lazy(cfg: DictConfig) -> nn.Module:
    """``cfg.model``, told the names of the training set's classes and checked against them."""
    classes = training_classes(cfg)
    if student_model(cfg.model) is not cfg.model and "classes" not in cfg.model:
        cfg.model.classes = classes
    model = instantiate(cfg.model)
    number = getattr(detector_of(model), "num_classes", None)
    if classes and number is not None and len(classes) != number:
        raise ValueError(
            f"The training set has {len(classes)} classes ({', '.join(classes[:10])}), the "
            f"detector {number}: set num_classes={len(classes)} of the model."
        )
    return model
