"""Training and evaluation, on Detectron2's own engine."""

from .launch import launch
from .trainer import FgBgTrainer, load_config

__all__ = ["FgBgTrainer", "launch", "load_config"]
