"""Training and evaluation, on Detectron2's own engine."""

from .trainer import FgBgTrainer, load_config

__all__ = ["FgBgTrainer", "load_config"]
