"""Checks of image files before training starts on them."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, TiffImagePlugin

from ..utils.errors import DataError
from .images import has_frames, header_orientation, too_large

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
    turned = animated = 0
    faults = []
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many at once
        for entry, (fault, orientation, frames) in zip(
            images, pool.map(lambda entry: _image_fault(entry, folder), images)
        ):
            turned += orientation != 1
            animated += frames
            if fault:
                faults.append((entry["file_name"], fault))
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} of {len(images)} images in {folder} cannot be used:\n  "
            + "\n  ".join(f"{name}: {fault}{_found(folder, name)}" for name, fault in faults[:5])
            + more
            + "\nFix these files, or remove their entries from the JSON file."
        )
    if animated:
        logger.warning(
            f"{animated} of {len(images)} images in {folder} have several frames or pages. Only "
            "the first one of each is used."
        )
    if turned:
        logger.warning(
            f"{turned} of {len(images)} images in {folder} have an EXIF orientation and are turned "
            "upright. Their boxes must refer to the upright image."
        )


def _found(folder: str, name: str) -> str:
    """Where a file is, if it is not at its file_name; "" if nothing like it is found."""
    if os.path.exists(os.path.join(folder, name)):
        return ""
    slashes = name.replace("\\", "/")
    for place in (slashes, os.path.basename(slashes)):
        if os.path.exists(os.path.join(folder, place)):
            return f", but there is {place}: write this as its file_name"
    where, base = os.path.split(slashes)
    if os.path.isdir(os.path.join(folder, where)):
        for near in os.listdir(os.path.join(folder, where)):
            if near.lower() == base.lower():
                return f", but there is {near} (capital letters count): write this as its file_name"
    return ""


def _image_fault(entry: dict, folder: str) -> tuple[str, int, bool]:
    """What is wrong with an image file ("" = nothing).

    Returns:
        Also its EXIF orientation (1 = upright), and whether it has several frames.
    """
    try:
        with Image.open(os.path.join(folder, entry["file_name"])) as image:
            size, mode, orientation = _stored_size(image), image.mode, header_orientation(image)
            frames = has_frames(image)
    except FileNotFoundError:
        return "there is no such file", 1, False
    except Image.DecompressionBombError as error:
        return too_large(error), 1, False
    except Exception as error:  # Pillow raises many types
        return str(error), 1, False
    if mode[0] in "IF":  # Detectron2 would clip values at 255
        fix = "convert it to 8 bits per channel"
        fault = f"it has more than 8 bits per channel (Pillow's mode {mode}): {fix}"
        return fault, orientation, frames
    upright = size[::-1] if orientation > 4 else size  # over 4: turned by 90 degrees
    recorded = entry["width"], entry["height"]
    if upright != recorded:
        how = " after its EXIF orientation is applied" if orientation > 4 else ""
        return (
            f"the JSON file says {recorded} (width, height), but the image is {upright}{how}",
            orientation,
            frames,
        )
    return "", orientation, frames


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before an image is turned. For a TIFF, ``size`` may be the size after."""
    if image.format == "TIFF":
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size
