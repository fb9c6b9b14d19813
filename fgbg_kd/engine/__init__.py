"""Training and evaluation, on Detectron2's own engine."""

from .launch import launch
from .lazy import build_lazy, evaluate_lazy, load_lazy_config, load_lazy_student, train_lazy
from .resume import evaluation_dir, keep_record, last_checkpoint
from .run_dir import lock_output_dir
from .trainer import FgBgTrainer, load_config, read_config, read_run_config

__all__ = [
    "FgBgTrainer",
    "build_lazy",
    "evaluate_lazy",
    "evaluation_dir",
    "keep_record",
    "last_checkpoint",
    "launch",
    "load_config",
    "load_lazy_config",
    "load_lazy_student",
    "lock_output_dir",
    "read_config",
    "read_run_config",
    "train_lazy",
]
