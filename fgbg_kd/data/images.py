"""The one reader of images: training, evaluation and prediction see the same pixels of a file."""

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from ..utils.errors import DataError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str, order: str) -> np.ndarray:
    """Reads an image file and turns it upright by its EXIF orientation.

    Detectron2's own reader turns a TIFF twice, and OpenCV's turns a JPEG only.

    Args:
        path: of any format that Pillow reads; the first image of several.
        order: "RGB", "BGR", "L" (grey), or another format of Detectron2's INPUT.FORMAT.

    Returns:
        (H, W, 3) uint8; (H, W, 1) for "L".

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be decoded, is too large, or has pixels of more than 8 bits.
    """
    try:
        with PathManager.open(str(path), "rb") as file:
            image = _upright(Image.open(file))
            if image.mode[0] in "IF":  # a conversion to 8 bits would cut them off at 255
                raise DataError(
                    f"{path} has pixels of more than 8 bits (Pillow's mode {image.mode}): scale "
                    "them to 8 bits."
                )
            return convert_PIL_to_numpy(image, order)
    except (FileNotFoundError, DataError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {too_large(error)}") from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path} is a damaged image, or none ({error}).") from error


def too_narrow(height: int, width: int, longest: int) -> bool:
    """Whether an image has no pixel left across when its longer side is reduced to ``longest``."""
    return longest * min(height, width) < max(height, width) / 2


def has_frames(image: Image.Image) -> bool:
    """Whether an image has several frames or pages, of which only the first is read."""
    if image.format == "MPO":  # a photo of a phone with a small copy of itself
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged file can raise anything; reading it will tell
        return False


def too_large(error: Image.DecompressionBombError) -> str:
    """What to do about an image that Pillow refuses for its size, in words."""
    fact = str(error).partition(", could be")[0]
    return (
        f"the image is too large ({fact}). Cut it into parts or make it smaller. To read it all "
        "the same, write `import PIL.Image; PIL.Image.MAX_IMAGE_PIXELS = None` into a file "
        "large_images.py and give --import large_images.py to the tool."
    )


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some formats (TIFF) are turned here, and forget their orientation
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data: the image is taken as it is stored
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def pick(records: list[dict], count: int) -> list[dict]:
    """Images spread evenly over a set, so that no result decides which are shown.

    Args:
        records: Detectron2's dataset dicts. If any has objects, the others are left out.
        count: how many images at most.
    """

    def has_objects(record):
        return any(not a.get("iscrowd") for a in record.get("annotations", ()))

    records = list(filter(has_objects, records)) or records
    places = np.linspace(0, len(records) - 1, min(count, len(records)))
    return [records[i] for i in places.astype(int)]
