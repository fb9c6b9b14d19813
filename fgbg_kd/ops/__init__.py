"""The three operators of the method: split, cosine term, comparison of predictions."""

from .cosine import cosine_loss, cosine_similarity
from .predictions import (
    Comparison,
    DenseOutput,
    compare_predictions,
    kl_divergence,
    prediction_quality,
)
from .split import BACKGROUND, PADDING, Split, pack, split

__all__ = [
    "BACKGROUND",
    "PADDING",
    "Comparison",
    "DenseOutput",
    "Split",
    "compare_predictions",
    "cosine_loss",
    "cosine_similarity",
    "kl_divergence",
    "pack",
    "prediction_quality",
    "split",
]
