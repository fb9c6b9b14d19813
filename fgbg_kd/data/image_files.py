"""Checks of image files before training starts on them."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

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
        headers = pool.map(lambda entry: _checked(entry, folder), images)
        for entry, found in zip(images, headers):
            turned += found.orientation != 1
            animated += found.frames
            if found.fault:
                faults.append((entry["file_name"], found.fault))
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


class Header(NamedTuple):
    """What an image file says about itself.

    Attributes:
        fault: why it cannot be used; "": nothing. The other values then mean nothing.
        size: (width, height) in pixels after its orientation is applied.
        orientation: of EXIF; 1 = upright.
        frames: whether it has several frames or pages.
    """

    fault: str
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    frames: bool = False


def read_header(path: str) -> Header:
    """Reads an image file without decoding it. All faults are in the result."""
    try:
        with Image.open(path) as image:
            size, mode, orientation = _stored_size(image), image.mode, header_orientation(image)
            frames = has_frames(image)
    except FileNotFoundError:
        return Header("there is no such file")
    except Image.DecompressionBombError as error:
        return Header(too_large(error))
    except Exception as error:  # Pillow raises many types
        return Header(str(error))
    upright = size[::-1] if orientation > 4 else size  # over 4: turned by 90 degrees
    fault = ""
    if mode[0] in "IF":  # Detectron2 would clip values at 255
        fix = "convert it to 8 bits per channel"
        fault = f"it has more than 8 bits per channel (Pillow's mode {mode}): {fix}"
    return Header(fault, upright, orientation, frames)


def _checked(entry: dict, folder: str) -> Header:
    """The header of an entry's file. Another size than the entry says is a fault."""
    found = read_header(os.path.join(folder, entry["file_name"]))
    recorded = entry["width"], entry["height"]
    if found.fault or found.size == recorded:
        return found
    how = " after its EXIF orientation is applied" if found.orientation > 4 else ""
    return found._replace(
        fault=f"the JSON file says {recorded} (width, height), but the image is {found.size}{how}"
    )


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before an image is turned. For a TIFF, ``size`` may be the size after."""
    if image.format == "TIFF":
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size
