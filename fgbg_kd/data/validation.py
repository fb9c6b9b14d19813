"""What a data set must be before training starts on it, checked once, with everything wrong named.

docs/bad_input.md lists every case. What Detectron2 handles by itself is left to it.
"""

import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ..utils.errors import DataError

logger = logging.getLogger(__name__)

_KEYS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}
_EVALUATED = {"area": (int, float), "iscrowd": int}  # COCO's evaluation reads these as well
_ORIENTATION = 0x0112  # EXIF's tag; over 4, height and width change places


def read_coco(path: str, *, training: bool) -> dict:
    """Reads a COCO file and checks all of it.

    Boxes without area, and boxes or parts of boxes outside their image, are no error: Detectron2
    leaves or cuts them out, and a warning counts them.

    Args:
        training: there must be a box to learn from; else COCO's evaluation must be able to use it.

    Raises:
        DataError: no COCO file, or entries that are not as COCO's format wants them.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no whole JSON file ({error}): it is damaged or was cut off. Fetch or make "
            "it again."
        ) from error
    _check_entries(content, path, training)
    _check_boxes(content, path, training)
    return content


def _check_entries(content: dict, path: str, training: bool) -> None:
    for group, keys in _KEYS.items():
        if group == "annotations" and not training:
            if isinstance(content, dict) and group not in content:
                continue  # a test set without ground truth: Detectron2 writes the detections
            keys = keys | _EVALUATED
        entries = content.get(group) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not (entries or group == "annotations"):
            raise DataError(f"{path} is not a COCO file: it needs a list of {group}, not empty.")
        _refuse(
            path,
            f"{group} without {', '.join(keys)} of the right type",
            [e for e in entries if not _has(e, keys)],
        )
        count = Counter(e["id"] for e in entries)
        _refuse(path, f"{group} whose id repeats", [e for e in entries if count[e["id"]] > 1])
    images = {i["id"] for i in content["images"]}
    categories = {c["id"] for c in content["categories"]}
    annotations = content.get("annotations", ())
    _refuse(
        path,
        "annotations of an image or a category that is not listed",
        [
            a
            for a in annotations
            if a["image_id"] not in images or a["category_id"] not in categories
        ],
    )
    if not training:
        _refuse(
            path,
            "annotations with an id under 1, which COCO's evaluation never takes for found: number "
            "them from 1",
            [a for a in annotations if a["id"] < 1],
        )
    _refuse(
        path,
        'annotations with "ignore", which Detectron2 does not know: use "iscrowd"',
        [a for a in annotations if a.get("ignore", 0)],
    )
    _refuse(
        path,
        "images without area",
        [i for i in content["images"] if min(i["height"], i["width"]) < 1],
    )


def _has(entry, keys: dict) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in keys.items())


def _check_boxes(content: dict, path: str, training: bool) -> None:
    annotations = content.get("annotations", ())
    _refuse(
        path,
        "boxes that are not four finite numbers x, y, width, height with width and height >= 0",
        [a for a in annotations if not _is_box(a["bbox"])],
    )
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    empty = outside = cut = useful = 0
    for a in annotations:
        (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
        if w == 0 or h == 0:
            empty += 1
        elif x + w <= 0 or y + h <= 0 or x >= width or y >= height:
            outside += 1
        else:
            cut += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
            useful += not a.get("iscrowd", 0)
    if empty or outside or cut:
        logger.warning(
            f"{path}: of {len(annotations)} boxes, {empty} without area and {outside} outside "
            f"their image are left out, and {cut} are cut at its border. If these are many, are "
            "the boxes x, y, width, height in pixels?"
        )
    if training and not useful:
        raise DataError(f"{path} has no box to learn from: {len(annotations)} annotations in all.")


def _is_box(box: list) -> bool:
    return (
        len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in box)  # nor NaN
        and min(box[2:]) >= 0
    )


def check_images(images: list[dict], folder: str) -> None:
    """Opens every image file as far as its header says what it is.

    Args:
        images: COCO's entries.

    Raises:
        DataError: files that are missing, empty, no images, of more than 8 bits, or of another
            size than is recorded.
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
            + "\nMend them, or take their entries out of the JSON file."
        )
    if turned:
        logger.warning(
            f"{turned} of {len(images)} images in {folder} are turned upright as their EXIF data "
            "says: their boxes must have been drawn on the upright image."
        )


def _image_fault(entry: dict, folder: str) -> tuple[str, int]:
    """What is wrong with an image file ("": nothing), and its EXIF orientation (1: as stored)."""
    try:
        with Image.open(os.path.join(folder, entry["file_name"])) as image:
            size, mode, orientation = image.size, image.mode, _orientation(image)
    except FileNotFoundError:
        return "there is no such file", 1
    except Exception as error:  # PIL has many
        return str(error), 1
    if mode[0] in "IF":  # Detectron2 would cut them off at 255, and see white
        return f"pixels of more than 8 bits (PIL's mode {mode}): scale them to 8", orientation
    upright = size[::-1] if orientation > 4 else size
    recorded = entry["width"], entry["height"]
    if upright != recorded:
        how = ", turned as its EXIF data says" if orientation > 4 else ""
        return f"recorded as {recorded} (width, height), but it is {upright}{how}", orientation
    return "", orientation


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1  # asked all the same, a PNG would be decoded
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Detectron2 takes it as stored then
        return 1
    return value if value in range(1, 9) else 1


def _refuse(path: str, what: str, entries: list) -> None:
    if not entries:
        return
    shown = [str(e.get("id", e) if isinstance(e, dict) else e)[:60] for e in entries[:5]]
    more = ", ..." if len(entries) > 5 else ""
    raise DataError(f"{path} has {len(entries)} {what} (ids {', '.join(shown)}{more}): mend it.")
