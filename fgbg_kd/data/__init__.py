"""Datasets: the user's COCO files, and the two embedded sets."""

from .coco_files import check_num_classes, register_datasets, training_classes
from .mapper import NamingMapper
from .validation import DataError

__all__ = [
    "DataError",
    "NamingMapper",
    "check_num_classes",
    "register_datasets",
    "training_classes",
]
