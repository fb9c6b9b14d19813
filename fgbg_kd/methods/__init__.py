"""Ways to distil: ours, :class:`FgBg`, and its peers, chosen by MODEL.KD.METHOD."""

from .base import METHOD_REGISTRY, Batch, DenseOutput, Method
from .fgbg import FgBg

__all__ = ["METHOD_REGISTRY", "Batch", "DenseOutput", "FgBg", "Method"]
