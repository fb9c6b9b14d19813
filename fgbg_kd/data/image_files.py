"""Checks of image files before training starts on them."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, TiffImagePlugin

from ..utils.errors import DataError
from .images import header_orientation, too_large

logger = logging.getLogger(__name__)


def check_images(images: list[dict], folder: str) -> None:
    """Reads the header of every image file and compares it with the image's entry.

    Args:
        images: the entries of a COCO file's list "images".
        folder: where the files are.

    Raises:
        DataError: a file is missing, empty, or not an image, has more than 8 bits per channel, or
            its size differs from its entry.
    """
    turned = 0
    faults = []
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many at once
        for entry, (fault, orientation) in zip(
            images, pool.map(lambda entry: _image_fault(entry, folder), images)
        ):
            turned += orientation != 1
            if fault:
                faults.append(f"{entry['file_name']}: {fault}")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} of {len(images)} images in {folder} cannot be used:\n  "
            + "\n  ".join(faults[:5])
            + more
            + "\nFix these files, or remove their entries from the JSON file."
        )
    if turned:
        logger.warning(
            f"{turned} of {len(images)} images in {folder} have an EXIF orientation and are turned "
            "upright. Their boxes must refer to the upright image."
        )


def _image_fault(entry: dict, folder: str) -> tuple[str, int]:
    """What is wrong with an image file ("" = nothing), and its EXIF orientation (1 = upright)."""
    try:
        with Image.open(os.path.join(folder, entry["file_name"])) as image:
            size, mode, orientation = _stored_size(image), image.mode, header_orientation(image)
    except FileNotFoundError:
        return "there is no such file", 1
    except Image.DecompressionBombError as error:
        return too_large(error), 1
    except Exception as error:  # Pillow raises many types
        return str(error), 1
    if mode[0] in "IF":  # Detectron2 would clip values at 255
        fix = "convert it to 8 bits per channel"
        return f"it has more than 8 bits per channel (Pillow's mode {mode}): {fix}", orientation
    upright = size[::-1] if orientation > 4 else size  # over 4: turned by 90 degrees
    recorded = entry["width"], entry["height"]
    if upright != recorded:
        how = " after its EXIF orientation is applied" if orientation > 4 else ""
        return (
            f"the JSON file says {recorded} (width, height), but the image is {upright}{how}",
            orientation,
        )
    return "", orientation


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before an image is turned. For a TIFF, ``size`` may be the size after."""
    if image.format == "TIFF":
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size
