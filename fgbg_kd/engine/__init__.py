"""Training and evaluation, on Detectron2's own engine."""

from .checkpointer import last_checkpoint
from .launch import launch
from .lazy import build_lazy, evaluate_lazy, load_lazy_config, load_lazy_student, train_lazy
from .run_dir import evaluation_dir, keep_previous_config, lock_output_dir
from .trainer import FgBgTrainer, load_config, read_config, read_for, read_run_config

__all__ = [
    "FgBgTrainer",
    "build_lazy",
    "evaluate_lazy",
    "evaluation_dir",
    "keep_previous_config",
    "last_checkpoint",
    "launch",
    "load_config",
    "load_lazy_config",
    "load_lazy_student",
    "lock_output_dir",
    "read_config",
    "read_for",
    "read_run_config",
    "train_lazy",
]
