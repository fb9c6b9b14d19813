"""Detectron2's mapper, whose errors name the image."""

from detectron2.data import DatasetMapper

from ..utils.errors import DataError


class NamingMapper(DatasetMapper):
    """DatasetMapper whose errors name the image. The errors of PIL and NumPy do not."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DataError: the image cannot be read or prepared.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            raise DataError(
                f"The image {dataset_dict['file_name']} cannot be used ({error}): replace the file "
                "and continue with --resume."
            ) from error
