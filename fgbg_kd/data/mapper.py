"""Detectron2's mapper with this package's image reader, and the sizes in which it reads."""

import copy
import sys

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data.transforms import AugInput
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..utils.errors import ConfigError, DataError
from .images import read_image


class NamingMapper(DatasetMapper):
    """DatasetMapper for boxes that uses :func:`read_image`. Its errors name the image."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DataError: the image cannot be read or prepared.
        """
        dataset_dict, file = copy.deepcopy(dataset_dict), dataset_dict["file_name"]
        try:
            image = read_image(file, self.image_format)
            utils.check_image_size(dataset_dict, image)
        except Exception as error:
            then = ""
            if self.is_train:
                then = " and continue with --resume (distill.py: give the same command again)"
            raise DataError(
                f"The image {file} cannot be used ({error}): replace the file{then}."
            ) from error
        try:
            return self._map(dataset_dict, image)
        except Exception as error:
            raise DataError(
                f"The image {file} was read, but an augmentation or an annotation of it failed "
                f"({type(error).__name__}: {error}): correct the augmentation or the annotation."
            ) from error

    def _map(self, dataset_dict: dict, image: np.ndarray) -> dict:
        """DatasetMapper.__call__ without semantic segmentation and proposals."""
        augmented = AugInput(image)
        transforms = self.augmentations(augmented)
        image = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(image)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[1:])
        return dataset_dict


def check_image_format(cfg: DictConfig, order: str | None) -> None:
    """Compares the channel order of a Python config's images with that of its detector.

    In a YAML config, INPUT.FORMAT sets both.

    Args:
        order: the detector's ``input_format``; None: it has none.

    Raises:
        ConfigError: they differ.
    """
    for part in ("train", "test"):
        key = f"dataloader.{part}.mapper.image_format"
        found = OmegaConf.select(cfg, key)
        if order and found and found != order:
            raise ConfigError(
                f"{key} is {found}, but the detector's input_format is {order}: give both the "
                "order of the detector's pixel_mean and of its pretrained weights."
            )


def test_size_of(cfg: CfgNode | DictConfig) -> tuple[int, int] | None:
    """Smallest and largest side of a test image in a config; None: a Python config lacks them.

    The smallest side is 0 where images are not resized, as in Detectron2.
    """
    if isinstance(cfg, CfgNode):
        return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resize = resize_of(OmegaConf.select(cfg, "dataloader.test")) or {}
    side, limit = resize.get("short_edge_length"), resize.get("max_size")
    sides = set(side) if isinstance(side, ListConfig) else {side}  # (800, 800) is 800, too
    if len(sides) != 1 or None in (*sides, limit):
        return None
    return sides.pop(), limit


def resize_of(loader: DictConfig | None) -> DictConfig | None:
    """The ResizeShortestEdge of a Python config's loader (dataloader.test); None: it has none."""
    steps = None if loader is None else OmegaConf.select(loader, "mapper.augmentations")
    if not isinstance(steps, ListConfig):
        return None
    found = (s for s in steps if isinstance(s, DictConfig) and "short_edge_length" in s)
    return next(found, None)


def usual_size(cfg: CfgNode | DictConfig) -> tuple[int, int] | None:
    """(height, width) of a training image of a config, with sides 3 : 4; None: not resized."""
    if isinstance(cfg, CfgNode):
        sizes, sampling = sorted(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        limit = cfg.INPUT.MAX_SIZE_TRAIN
    else:
        resize = resize_of(OmegaConf.select(cfg, "dataloader.train"))
        if resize is None:
            return None
        sizes, sampling = resize.short_edge_length, resize.get("sample_style", "range")
        sizes = [sizes] if isinstance(sizes, int) else sorted(sizes)
        limit = resize.get("max_size", sys.maxsize)
    short = sizes[len(sizes) // 2]
    if sampling == "range":
        short = (sizes[0] + sizes[-1]) // 2
    short = min(short, limit * 3 // 4)
    return (short, short * 4 // 3) if short else None
