"""Training and evaluation by a Python config (LazyConfig), with Detectron2's usual fields:
model, dataloader, optimizer, lr_multiplier and train, as in its tools/lazyconfig_train_net.py."""

import copy
import difflib
import logging
import os

import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import student_model
from ..data import training_classes
from ..detectors.load import load_exactly
from ..matching import channel_order
from ..teacher import check_teacher_file
from ..teacher_cache import check_fixed_input
from ..utils.errors import ConfigError
from .checkpointer import RunCheckpointer, last_checkpoint
from .hooks import adapters_of, detector_of, run_hooks
from .loader import ResumableLoader, random_numbers
from .non_finite import FiniteAMPTrainer, FiniteTrainer
from .resume import begin, run_seed
from .trainer import distributed

logger = logging.getLogger(__name__)


# Keys of ``train`` that Detectron2's configs do not have, or not all of them.
_OWN_KEYS = "train.seed", "train.ema_decay", "train.teacher_min_ap"


def load_lazy_config(config_file: str, opts: list[str] = (), resume: bool = False) -> DictConfig:
    """Reads a Python config, which is code that runs, and overrides like ``train.max_iter=9``.

    An open ``train.seed`` (-1, or none) is drawn, or on resume that of the run.

    Raises:
        ConfigError: there is no such file, or an override of a key that is not there.
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"{config_file}: there is no such config.")
    cfg = LazyConfig.load(config_file)
    for override in opts:
        _check_key(cfg, override.partition("=")[0])
    cfg = LazyConfig.apply_overrides(cfg, list(opts))
    cfg.train.seed = run_seed(cfg.train.get("seed", -1), cfg.train.output_dir, resume)
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device here: train.device is set to cpu.")
        cfg.train.device = "cpu"
    if cfg.train.device == "cpu" and cfg.train.amp.enabled:
        logger.warning("Detectron2 has mixed precision on CUDA only: train.amp is set off.")
        cfg.train.amp.enabled = False
    return cfg


def _check_key(cfg: DictConfig, key: str) -> None:
    """What takes arguments (``_target_``, ``model.kd``) checks their names itself."""
    where, _, name = key.lstrip("+~").rpartition(".")
    node = OmegaConf.select(cfg, where) if where else cfg
    if key in _OWN_KEYS or not isinstance(node, DictConfig):
        return
    if name not in node and "_target_" not in node and where != "model.kd":
        near = difflib.get_close_matches(name, [str(k) for k in node], 1)
        raise ConfigError(
            f"{key} is no key of the config{f': is it {near[0]}?' if near else '.'} "
            f"{where or 'The config'} has {', '.join(sorted(map(str, node)))}."
        )


def train_lazy(cfg: DictConfig, resume: bool = False) -> dict:
    """Trains ``cfg.model``, a plain detector or an FgBgDistiller.

    As with FgBgTrainer, checkpoints hold the (student's) detector under its own names, and the
    adapters beside it under the key "kd".

    Returns:
        The last results of the evaluation, {} without one.
    """
    train, output_dir = cfg.train, cfg.train.output_dir
    seed = run_seed(train.get("seed", -1), output_dir, resume)
    model = build_lazy(cfg).to(train.device)
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        check_teacher_file(teacher.weights, train.init_checkpoint, output_dir)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = _train_loader(cfg.dataloader.train, seed, bool(getattr(model, "cache", None)))
    trainer = (FiniteAMPTrainer if train.amp.enabled else FiniteTrainer)(
        distributed(model, **train.ddp), loader, optimizer, output_dir=output_dir, seed=seed
    )
    checkpointer = RunCheckpointer(
        detector_of(model),
        output_dir,
        max_to_keep=train.checkpointer.get("max_to_keep") or 0,
        trainer=trainer,
        **adapters_of(model),
    )
    results = {}

    def evaluate():
        results.clear()
        results.update(evaluate_lazy(cfg, trainer.model))
        return results

    period, saving, writing = train.checkpointer.period, None, None
    if comm.is_main_process():
        saving = hooks.PeriodicCheckpointer(checkpointer, period)
        writers = default_writers(output_dir, train.max_iter)
        writing = hooks.PeriodicWriter(writers, period=train.log_period)
    trainer.register_hooks(
        [
            *run_hooks(
                model,
                seed=seed,
                checkpoint_period=period,
                ema_decay=train.get("ema_decay", 0),
                min_ap=train.get("teacher_min_ap", 0),
                test_teacher=lambda x: evaluate_lazy(cfg, x, channel_order(x)),
            ),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saving,
            hooks.EvalHook(train.eval_period, evaluate),
            writing,
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    begin(start, train.max_iter, loader, output_dir, seed, resume)
    trainer.train(start, train.max_iter)
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


def load_lazy_student(cfg: DictConfig, run_dir: str = "") -> nn.Module:
    """The student of ``cfg.model``, or the plain detector that it is; no teacher is built.

    Args:
        run_dir: take the last checkpoint in this folder, if there is one; "": that of
            ``train.init_checkpoint``.
    """
    model = instantiate(student_model(cfg.model)).to(cfg.train.device)
    load_exactly(model, last_checkpoint(run_dir) or cfg.train.init_checkpoint)
    return model


def _train_loader(cfg: DictConfig, seed: int, cached: bool):
    """``dataloader.train``; if it is Detectron2's own loader, one that can resume, as by YAML.

    Args:
        cached: the teacher's outputs are kept, so images must not change.
    """
    options = set(cfg) - {"_target_"}
    target = locate(cfg._target_) if isinstance(cfg._target_, str) else cfg._target_
    needed = {"dataset", "mapper", "total_batch_size"}
    known = needed | {"aspect_ratio_grouping", "num_workers"}
    if target is not build_detection_train_loader or not needed <= options <= known:
        return instantiate(cfg)
    parts = {name: instantiate(cfg[name]) for name in options}
    if cached:
        check_fixed_input(parts["mapper"])
    # The order of images that this version of Detectron2 makes of SEED, as by YAML.
    with_seed = get_cfg()
    with_seed.SEED = seed
    with random_numbers(seed):
        sampler = build_detection_train_loader.from_config(
            with_seed, mapper=parts["mapper"], dataset=parts["dataset"]
        )["sampler"]
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
