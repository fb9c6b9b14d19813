"""The only image reader: training, evaluation and prediction see the same pixels of a file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps

from ..utils.errors import DataError

# Files with these suffixes are images. Other files can be images, too.
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
# Keys of Pillow's image.info in which an orientation can stand.
_METADATA = {"exif", "xmp", "XML:com.adobe.xmp"}


def read_image(path: str, order: str) -> np.ndarray:
    """Reads an image file and turns it upright by its EXIF orientation.

    Detectron2's own reader turns a TIFF twice, and OpenCV's turns a JPEG only.

    Args:
        path: a file that Pillow can read. If it holds several images, the first is read.
        order: "RGB", "BGR", "L" (grey), or another format of Detectron2's INPUT.FORMAT.

    Returns:
        (H, W, 3) uint8; (H, W, 1) for "L".

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the image cannot be decoded, is too large, or has more than 8 bits per channel.
    """
    try:
        with PathManager.open(str(path), "rb") as file:
            image = Image.open(file)
            _turn_upright(image)
            if image.mode[0] in "IF":  # a conversion to 8 bits would clip values at 255
                raise DataError(
                    f"{path} has more than 8 bits per channel (Pillow's mode {image.mode}): "
                    "convert it to 8 bits per channel."
                )
            return convert_PIL_to_numpy(image, order)
    except (FileNotFoundError, DataError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {too_large(error)}") from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path} is damaged, or is not an image ({error}).") from error


def files_below(folder: str | Path) -> Iterator[Path]:
    """The files below a folder, also behind links to folders. Hidden ones are left out."""
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = [  # a link to a folder above would never end
            name
            for name in filter(_is_shown, folders)
            if os.path.realpath(os.path.join(place, name)) not in entered
        ]
        yield from (Path(place, name) for name in filter(_is_shown, names))


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


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
    """The message for an image that Pillow refuses because of its size."""
    fact = str(error).partition(", could be")[0]
    return (
        f"the image is too large ({fact}). Split the image or make it smaller. To read it "
        "anyway, write `import PIL.Image; PIL.Image.MAX_IMAGE_PIXELS = None` into a file "
        "large_images.py and give --import large_images.py to the tool."
    )


def header_orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8, without decoding the image."""
    if image.format != "TIFF" and not _METADATA & image.info.keys():
        return 1  # getexif() would decode the whole image if it is a PNG
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata: the image is taken as it is stored
        return 1
    return value if value in range(1, 9) else 1


def _turn_upright(image: Image.Image) -> None:
    image.load()
    with contextlib.suppress(Exception):  # damaged metadata: the image is taken as it is stored
        ImageOps.exif_transpose(image, in_place=True)


def pick(records: list[dict], count: int) -> list[dict]:
    """Chooses images that are spread evenly over a set, independent of any results.

    Args:
        records: Detectron2's dataset dicts. If some have objects, the others are left out.
        count: largest number of images.
    """

    def has_objects(record):
        return any(not a.get("iscrowd") for a in record.get("annotations", ()))

    records = list(filter(has_objects, records)) or records
    places = np.linspace(0, len(records) - 1, min(count, len(records)))
    return [records[i] for i in places.astype(int)]
