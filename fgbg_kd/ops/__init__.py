"""The operators of the method. They take tensors and know no detector.

Each file holds the definition in plain PyTorch; the fused kernel of ``x.py`` is ``x_triton.py``.
"""

from .common import BACKGROUND, PADDING
from .cosine import cosine_loss, cosine_similarity
from .gate import teacher_gate
from .predictions import Comparison, compare_predictions, kl_divergence, prediction_quality
from .split import Split, pack, split

__all__ = [
    "BACKGROUND",
    "PADDING",
    "Comparison",
    "Split",
    "compare_predictions",
    "cosine_loss",
    "cosine_similarity",
    "kl_divergence",
    "pack",
    "prediction_quality",
    "split",
    "teacher_gate",
]
