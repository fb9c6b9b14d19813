"""The three operators of the method: the split, the cosine term and the KL term."""

from .cosine import cosine_loss, cosine_similarity
from .kl import kl_divergence, kl_loss
from .split import Split, pack, split

__all__ = [
    "Split",
    "cosine_loss",
    "cosine_similarity",
    "kl_divergence",
    "kl_loss",
    "pack",
    "split",
]
