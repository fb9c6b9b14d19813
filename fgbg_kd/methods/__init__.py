"""Ways to distil: ours, :class:`FgBg`, and its peers, chosen by MODEL.KD.METHOD."""

from ..ops import DenseOutput
from .base import METHOD_REGISTRY, Batch, Method
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
]
