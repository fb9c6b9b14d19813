"""Datasets: the user's COCO files, and the two embedded sets."""

from ..utils.errors import DataError
from .coco_files import check_num_classes, register_datasets, training_classes
from .mapper import NamingMapper

__all__ = [
    "DataError",
    "NamingMapper",
    "check_num_classes",
    "register_datasets",
    "training_classes",
]
