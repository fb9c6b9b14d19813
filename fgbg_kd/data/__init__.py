"""The user's data: COCO files are checked, registered, read and evaluated here."""

from ..utils.errors import DataError
from .classes import check_num_classes, check_same_classes, match_categories, training_classes
from .coco_files import register_datasets
from .evaluator import BoxEvaluator
from .mapper import NamingMapper, check_image_format, resize_of, test_size_of, usual_size

__all__ = [
    "BoxEvaluator",
    "DataError",
    "NamingMapper",
    "check_image_format",
    "check_num_classes",
    "check_same_classes",
    "match_categories",
    "register_datasets",
    "resize_of",
    "test_size_of",
    "training_classes",
    "usual_size",
]
