"""Datasets: the user's COCO files, and the two embedded sets."""

from .coco_files import check_num_classes, register_datasets, training_classes

__all__ = ["check_num_classes", "register_datasets", "training_classes"]
