"""The operators of FgBg. They take tensors and do not depend on a detector.

Each file has the definition in plain PyTorch. ``x_triton.py`` has the fused kernels of ``x.py``.
"""

from .common import BACKGROUND, PADDING
from .features import FeatureComparison, compare_features, cosine_similarity
from .gate import teacher_gate
from .predictions import Comparison, compare_predictions, kl_divergence, prediction_quality
from .split import Split, pack, split
from .standardise import standardise

__all__ = [
    "BACKGROUND",
    "PADDING",
    "Comparison",
    "FeatureComparison",
    "Split",
    "compare_features",
    "compare_predictions",
    "cosine_similarity",
    "kl_divergence",
    "pack",
    "prediction_quality",
    "split",
    "standardise",
    "teacher_gate",
]
