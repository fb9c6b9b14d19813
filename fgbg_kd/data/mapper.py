"""Detectron2's mapper, with the image's name in what goes wrong."""

from detectron2.data import DatasetMapper

from ..utils.errors import DataError


class NamingMapper(DatasetMapper):
    """DatasetMapper whose errors say which image they are about; PIL's and NumPy's do not."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DataError: the image cannot be read or prepared.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            raise DataError(
                f"The image {dataset_dict['file_name']} cannot be used ({error}): mend it and go "
                "on with --resume."
            ) from error
