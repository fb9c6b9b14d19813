"""Checks of image files before training starts on them."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, TiffImagePlugin

from ..utils.errors import DataError
from .images import has_frames, too_large

logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # EXIF's tag; for values over 4, height and width are exchanged


def check_images(images: list[dict], folder: str) -> None:
    """Reads the header of every image file and compares it with the file's entry.

    Args:
        images: the entries of a COCO file's list "images".
        folder: where the files are.

    Raises:
        DataError: files are missing, empty, not images, have more than 8 bits per channel, or have
            another size than their entry says.
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
            size, mode, orientation = _stored_size(image), image.mode, _orientation(image)
            frames = has_frames(image)
    except FileNotFoundError:
        return "there is no such file", 1, False
    except Image.DecompressionBombError as error:
        return too_large(error), 1, False
    except Exception as error:  # PIL has many
        return str(error), 1, False
    if mode[0] in "IF":  # Detectron2 would clip values at 255
        fix = "convert it to 8 bits per channel"
        return (
            f"it has more than 8 bits per channel (PIL's mode {mode}): {fix}",
            orientation,
            frames,
        )
    upright = size[::-1] if orientation > 4 else size
    recorded = entry["width"], entry["height"]
    if upright != recorded:
        how = " after turning it as its EXIF orientation says" if orientation > 4 else ""
        return (
            f"the JSON file says {recorded} (width, height), but it is {upright}{how}",
            orientation,
            frames,
        )
    return "", orientation, frames


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before an image is turned; ``size`` of a TIFF may be that afterwards."""
    if image.format == "TIFF":
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1  # getexif() would decode the whole image if it is a PNG
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Detectron2 does not turn such an image either
        return 1
    return value if value in range(1, 9) else 1
