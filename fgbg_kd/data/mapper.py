"""Detectron2's mapper with this package's image reader. Its errors name the image."""

import copy

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data.transforms import AugInput

from ..utils.errors import DataError
from .images import read_image


class NamingMapper(DatasetMapper):
    """DatasetMapper for boxes that uses :func:`read_image`. Its errors name the image."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DataError: the image cannot be read or prepared.
        """
        try:
            return self._map(copy.deepcopy(dataset_dict))
        except Exception as error:
            raise DataError(
                f"The image {dataset_dict['file_name']} cannot be used ({error}): replace the file "
                "and continue with --resume."
            ) from error

    def _map(self, dataset_dict: dict) -> dict:
        """DatasetMapper.__call__ without semantic segmentation and proposals."""
        image = read_image(dataset_dict["file_name"], self.image_format)
        utils.check_image_size(dataset_dict, image)
        augmented = AugInput(image)
        transforms = self.augmentations(augmented)
        image = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(image)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[1:])
        return dataset_dict
