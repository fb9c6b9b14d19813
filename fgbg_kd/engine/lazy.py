"""Training and evaluation by a Python config (LazyConfig).

The config has the fields that Detectron2's tools/lazyconfig_train_net.py reads: model, dataloader,
optimizer, lr_multiplier and train.
"""

import copy
import difflib
import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import get_fgbg_kd_cfg, student_model
from ..data import (
    BoxEvaluator,
    NamingMapper,
    check_image_format,
    check_same_classes,
    resize_of,
    training_classes,
    usual_size,
)
from ..data.classes import names_of_sets
from ..detectors.dense import DenseView, channel_order, lenient_view, num_classes_of
from ..detectors.load import load_exactly
from ..teacher import Teacher, check_teacher_file
from ..teacher_cache import check_fixed_input
from ..utils.build_errors import explained
from ..utils.config_files import expand_paths
from ..utils.config_values import check_values
from ..utils.errors import ConfigError
from .checkpointer import RunCheckpointer, last_checkpoint
from .hooks import beside_detector, detector_of, run_hooks
from .loader import ResumableLoader, random_numbers
from .non_finite import FiniteAMPTrainer, FiniteTrainer
from .resume import begin, run_seed, warm_up
from .trainer import distributed
from .unlabeled import Unlabeled, add_unlabeled
from .writers import build_writers

logger = logging.getLogger(__name__)


# Valid keys of ``train`` that Detectron2's configs may lack.
_OWN_KEYS = (
    "train.seed",
    "train.ema_decay",
    "train.channels_last",
    "train.teacher_min_ap",
    "train.unlabeled",
    "train.unlabeled_share",
    "train.unlabeled_precision",
    "train.unlabeled_file",
    "train.writers",
)


def load_lazy_config(config_file: str, opts: list[str] = (), resume: bool = False) -> DictConfig:
    """Reads a Python config with overrides such as ``train.max_iter=9``.

    A Python config is a program, and this function runs it. If ``train.seed`` is -1 or missing, a
    seed is drawn. On resume, the seed that was drawn for the run is used again.

    Raises:
        ConfigError: the file does not exist, or an override names an unknown key.
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"{config_file}: there is no such config.")
    cfg = LazyConfig.load(config_file)
    for override in opts:
        _check_key(cfg, override.partition("=")[0])
    cfg = LazyConfig.apply_overrides(cfg, list(opts))
    expand_paths(cfg)
    check_values(cfg)
    if cfg.train.log_period < 1:
        raise ConfigError(f"train.log_period is {cfg.train.log_period}: set it to at least 1.")
    cfg.train.seed = run_seed(cfg.train.get("seed", -1), cfg.train.output_dir, resume)
    for part in ("train", "test"):
        mapper = OmegaConf.select(cfg, f"dataloader.{part}.mapper")
        if mapper is not None and _locate(mapper) is DatasetMapper:
            mapper._target_ = NamingMapper  # reads images like the rest of this package
    evaluator = cfg.dataloader.get("evaluator")
    if isinstance(evaluator, DictConfig) and _locate(evaluator) is COCOEvaluator:
        if set(evaluator) <= {"_target_", "dataset_name", "output_dir"}:
            evaluator._target_ = BoxEvaluator
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device is available: train.device is set to cpu.")
        cfg.train.device = "cpu"
    if cfg.train.device == "cpu" and cfg.train.amp.enabled:
        logger.warning("Detectron2 has mixed precision on CUDA only: train.amp is turned off.")
        cfg.train.amp.enabled = False
    return cfg


def _locate(node: DictConfig):
    """The class or function that a node of a config calls."""
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuses an unknown key.

    Keys of nodes with ``_target_`` and of ``model.method`` are checked later, when they are called.
    """
    where, _, name = key.lstrip("+~").rpartition(".")
    node = OmegaConf.select(cfg, where) if where else cfg
    if key in _OWN_KEYS or not isinstance(node, DictConfig):
        return
    if name not in node and "_target_" not in node and where != "model.method":
        own = [k.removeprefix("train.") for k in _OWN_KEYS] if where == "train" else []
        near = difflib.get_close_matches(name, [*map(str, node), *own], 1)
        raise ConfigError(
            f"{key} is not a key of the config{f': did you mean {near[0]}?' if near else '.'} "
            f"{where or 'The config'} has {', '.join(sorted(map(str, node)))}."
        )


def train_lazy(cfg: DictConfig, resume: bool = False, extra_hooks: Sequence[HookBase] = ()) -> dict:
    """Trains ``cfg.model``, a plain detector or an FgBgDistiller.

    Checkpoints have the same format as with :class:`~fgbg_kd.engine.FgBgTrainer`.

    Args:
        extra_hooks: the user's hooks. They run after each step, before its results are written.

    Returns:
        The results of the last evaluation; {} without an evaluation.
    """
    train, output_dir = cfg.train, cfg.train.output_dir
    seed = run_seed(train.get("seed", -1), output_dir, resume)
    model = build_lazy(cfg).to(train.device)
    if train.get("channels_last", False):
        model.to(memory_format=torch.channels_last)
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        check_teacher_file(teacher.weights, train.init_checkpoint, output_dir)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = _train_loader(
        cfg.dataloader.train, seed, teacher is not None and teacher.cache is not None
    )
    if train.get("unlabeled"):
        add_unlabeled(loader, teacher, _unlabeled(cfg, teacher))
    trainer = (FiniteAMPTrainer if train.amp.enabled else FiniteTrainer)(
        distributed(model, **train.ddp), loader, optimizer, output_dir=output_dir, seed=seed
    )
    checkpointer = RunCheckpointer(
        detector_of(model),
        output_dir,
        max_to_keep=train.checkpointer.get("max_to_keep") or 0,
        trainer=trainer,
        **beside_detector(model),
    )
    results = {}

    def evaluate():
        results.clear()
        results.update(evaluate_lazy(cfg, trainer.model))
        return results

    trainer.register_hooks(_hooks(cfg, model, seed, checkpointer, evaluate, extra_hooks))
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    begin(start, train.max_iter, loader, output_dir, seed, resume)
    warm_up(start, train.device)
    trainer.train(start, train.max_iter)
    return results


def _hooks(cfg: DictConfig, model: nn.Module, seed: int, checkpointer, evaluate, extra_hooks):
    """All hooks of a run, in the same order as in DefaultTrainer."""
    train = cfg.train
    period, saving, writing = train.checkpointer.period, None, None
    if comm.is_main_process():
        saving = hooks.PeriodicCheckpointer(checkpointer, period)
        writers = [
            *build_writers(_listed(train.get("writers", [])), train.output_dir),
            *default_writers(train.output_dir, train.max_iter),
        ]
        writing = hooks.PeriodicWriter(writers, period=train.log_period)
    own = run_hooks(
        model,
        seed=seed,
        checkpoint_period=period,
        ema_decay=train.get("ema_decay", 0),
        min_ap=train.get("teacher_min_ap", 0),
        test_teacher=lambda x: evaluate_lazy(cfg, x.detector, _test_for(x, cfg)),
        evaluations=lambda: _evaluations(cfg),
    )
    return [
        *own,
        *extra_hooks,
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        saving,
        hooks.EvalHook(train.eval_period, evaluate),
        writing,
    ]


def _evaluations(cfg: DictConfig):
    """The loader and the evaluators of the test set, if there is one."""
    if cfg.dataloader.get("evaluator") is not None:
        found = instantiate(cfg.dataloader.evaluator)
        evaluators = [found] if isinstance(found, DatasetEvaluator) else list(found)
        yield instantiate(cfg.dataloader.test), evaluators


def _test_for(teacher: Teacher, cfg: DictConfig) -> DictConfig:
    """``dataloader.test`` with images in a teacher's channel order and test size."""
    test = copy.deepcopy(cfg.dataloader.test)
    test.mapper.image_format = channel_order(teacher.detector)
    resize = resize_of(test)
    if resize is not None and teacher.test_size is not None:
        side, resize.max_size = teacher.test_size
        resize.short_edge_length = [side, side]  # both for "range" and for "choice"
    return test


def evaluate_lazy(cfg: DictConfig, model: nn.Module, test: DictConfig | None = None) -> dict:
    """Results of ``dataloader.evaluator`` on a test set; {} if the config has no evaluator.

    Args:
        test: config of its loader. None: ``dataloader.test``.
    """
    if cfg.dataloader.get("evaluator") is None:
        return {}
    loader = instantiate(cfg.dataloader.test if test is None else test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def load_lazy_student(cfg: DictConfig, run_dir: str = "") -> nn.Module:
    """The student of ``cfg.model``, or the plain detector; no teacher is built.

    Args:
        run_dir: the last checkpoint in this folder is loaded. If there is none, or ``run_dir`` is
            "", ``train.init_checkpoint`` is loaded.
    """
    model = instantiate(student_model(cfg.model)).to(cfg.train.device)
    load_exactly(model, last_checkpoint(run_dir) or cfg.train.init_checkpoint)
    return model


def _train_loader(cfg: DictConfig, seed: int, cached: bool):
    """``dataloader.train``. Detectron2's own loader is replaced by one that can resume.

    Args:
        cached: the teacher's outputs are cached, so images must be the same in every epoch.
    """
    options = set(cfg) - {"_target_"}
    target = _locate(cfg)
    needed = {"dataset", "mapper", "total_batch_size"}
    known = needed | {"aspect_ratio_grouping", "num_workers"}
    if target is not build_detection_train_loader or not needed <= options <= known:
        return instantiate(cfg)
    parts = {name: instantiate(cfg[name]) for name in options}
    if cached:
        check_fixed_input(parts["mapper"])
    # This Detectron2 version derives the order of images from SEED, as for a YAML config.
    with_seed = get_cfg()
    with_seed.SEED = seed
    with random_numbers(seed):
        sampler = build_detection_train_loader.from_config(
            with_seed, mapper=parts["mapper"], dataset=parts["dataset"]
        )["sampler"]
    return ResumableLoader(**parts, sampler=sampler, seed=seed)


def _unlabeled(cfg: DictConfig, teacher: Teacher | None) -> Unlabeled:
    """The photos without labels of a config, and how they are used."""
    train, data = cfg.train, cfg.dataloader
    defaults = get_fgbg_kd_cfg().MODEL.KD.UNLABELED
    test = data.test if teacher is None else _test_for(teacher, cfg)
    return Unlabeled(
        folders=_listed(train.unlabeled),
        share=train.get("unlabeled_share", defaults.SHARE),
        precision=train.get("unlabeled_precision", defaults.PRECISION),
        file=train.get("unlabeled_file") or os.path.join(train.output_dir, "unlabeled.json"),
        training=[x for name in names_of_sets(cfg) for x in DatasetCatalog.get(name)]
        or instantiate(data.train.dataset),
        tests=names_of_sets(cfg, "test"),
        classes=training_classes(cfg),
        mapper=instantiate(test.mapper),
        longest=(resize_of(data.train) or {}).get("max_size", 0),
        filter_empty=data.train.dataset.get("filter_empty", True),
    )


def build_lazy(cfg: DictConfig) -> nn.Module:
    """Builds ``cfg.model`` and checks its classes and channel order against the data.

    As with a YAML config, an FgBgDistiller gets the class names of the training set and the usual
    size of its images, unless the config gives ``classes`` and ``image_size``. Without
    ``pretrained``, it counts as pretrained if ``train.init_checkpoint`` or the ``weights`` of the
    student's backbone (:class:`fgbg_kd.detectors.TimmBackbone`) are set. If its
    ``warmup_iters`` is -1 or missing, it gets the warm-up length of ``lr_multiplier``.
    """
    classes = training_classes(cfg)
    check_same_classes([*names_of_sets(cfg), *names_of_sets(cfg, "test")])
    if student_model(cfg.model) is not cfg.model:
        if "classes" not in cfg.model:
            cfg.model.classes = classes
        if "image_size" not in cfg.model:
            cfg.model.image_size = usual_size(cfg)
        if "pretrained" not in cfg.model:
            places = ("backbone.weights", "backbone.bottom_up.weights")
            weights = (OmegaConf.select(student_model(cfg.model), x) for x in places)
            cfg.model.pretrained = bool(cfg.train.init_checkpoint) or any(weights)
        if cfg.model.get("warmup_iters", -1) == -1:
            length = cfg.get("lr_multiplier", {}).get("warmup_length", 0.0)
            cfg.model.warmup_iters = round(length * cfg.train.max_iter)
    with explained(cfg):
        model = instantiate(cfg.model)
        if isinstance(found := lenient_view(detector_of(model)), DenseView):
            _ = found.levels  # raises a KeyError where the first iteration would
    check_image_format(cfg, getattr(detector_of(model), "input_format", None))
    number = num_classes_of(detector_of(model))
    if classes and number is not None and len(classes) != number:
        raise ConfigError(
            f"The training set has {len(classes)} classes ({', '.join(classes[:10])}), but the "
            f"detector has {number}: set num_classes={len(classes)} in the model."
        )
    return model


def _listed(value: str | Sequence[str]) -> list[str]:
    """A list, also of one text: ``train.unlabeled=photos`` on the command line."""
    return [value] if isinstance(value, str) else list(value)
