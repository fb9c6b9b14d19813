"""Distillation methods: FgBg, and the methods for comparison. MODEL.KD.METHOD selects one."""

from ..detectors.dense import DenseOutput
from .adapters import aligned, build_adapters
from .base import METHOD_REGISTRY, Batch, Method, build_method, complete_options, get_method
from .cwd import CWD
from .defeat import DeFeat
from .fgbg import FgBg
from .fgd import FGD
from .mgd import MGD
from .mimic import Mimic
from .pkd import PKD
from .qfl import QFL

__all__ = [
    "CWD",
    "FGD",
    "METHOD_REGISTRY",
    "MGD",
    "PKD",
    "QFL",
    "Batch",
    "DeFeat",
    "DenseOutput",
    "FgBg",
    "Method",
    "Mimic",
    "aligned",
    "build_adapters",
    "build_method",
    "complete_options",
    "get_method",
]
