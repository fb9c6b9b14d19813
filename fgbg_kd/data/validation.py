"""Checks a COCO file before training. Each error names the entries with the fault.

docs/bad_input.md lists all cases. Faults that Detectron2 handles itself are not checked.
"""

import json
import logging
from collections import Counter

from ..utils.errors import DataError

logger = logging.getLogger(__name__)

_KEYS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}
_EVALUATED = {"area": (int, float), "iscrowd": (int, float)}  # read by COCO's evaluation only
_LARGEST_AREA = 1e10  # COCO's evaluation ignores larger objects
_MOST_DETECTIONS = 100  # per class and image: COCO's evaluation ignores further detections


def read_coco(path: str, *, training: bool) -> dict:
    """Reads a COCO file and checks all of it.

    Boxes without area or outside their image are not errors: training leaves them out. Boxes partly
    outside are not errors either: training clips them at the border. A warning counts these boxes.

    Args:
        path: the JSON file.
        training: True: the file must have a box to train on. False: COCO's evaluation must be able
            to use the file.

    Returns:
        The content of the file.

    Raises:
        DataError: it is not a COCO file, or some of its entries are not valid.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, str(error)) from error
    except (ValueError, RecursionError) as error:
        if "BOM" in str(error):
            raise _not_utf8(path, "it begins with a byte order mark") from error
        raise DataError(
            f"{path} is not a complete JSON file ({error}): it is damaged or was cut off. Download "
            "or create it again."
        ) from error
    check_coco(content, path, training=training)
    return content


def _not_utf8(path: str, why: str) -> DataError:
    return DataError(
        f"{path} is not plain UTF-8 text ({why}). pycocotools could not read it either. Save it as "
        "UTF-8 without a byte order mark (an editor's or PowerShell's option utf8NoBOM)."
    )


def check_coco(content, path: str, *, training: bool) -> None:
    """The checks of :func:`read_coco` for a parsed file.

    Args:
        content: the parsed JSON.
        path: the file's path, for the messages.
        training: see :func:`read_coco`.

    Raises:
        DataError: see :func:`read_coco`.
    """
    _check_entries(content, path, training)
    _check_references(content, path)
    annotations = content.get("annotations", ())
    if not training:
        _check_evaluated(annotations, path)
    _check_boxes(content, path, training)
    _count_unusable_shapes(annotations, path)
    _count_repeated_boxes(annotations, path)
    if training:
        _name_classes_without_boxes(content, path)


def _check_entries(content: dict, path: str, training: bool) -> None:
    for group, keys in _KEYS.items():
        if group == "annotations" and not training:
            if isinstance(content, dict) and group not in content:
                continue  # a test set without ground truth: Detectron2 writes the detections
            keys = keys | _EVALUATED
        entries = content.get(group) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not (entries or group == "annotations"):
            raise DataError(
                f'{path} is not a COCO file: it has no list "{group}", or the list is empty.'
            )
        _refuse(
            path,
            f"{group} that lack a key or have a value of another type",
            f"each needs {_types(keys)}",
            [e for e in entries if not _has(e, keys)],
        )
        _refuse(
            path,
            f"{group} with an id over 2**63 - 1",
            "number them from 1",
            [e for e in entries if abs(e["id"]) >= 2**63],  # NumPy would round them
        )
        count = Counter(e["id"] for e in entries)
        _refuse(
            path,
            f"{group} with an id that repeats",
            "give each entry its own id",
            [e for e in entries if count[e["id"]] > 1],
        )


def _check_references(content: dict, path: str) -> None:
    images = {i["id"] for i in content["images"]}
    categories = {c["id"] for c in content["categories"]}
    annotations = content.get("annotations", ())
    count = Counter(c["name"] for c in content["categories"])
    _refuse(
        path,
        "categories with a name that repeats",
        "rename or remove the duplicates",
        [c for c in content["categories"] if count[c["name"]] > 1],
    )
    count = Counter(i["file_name"] for i in content["images"])
    _refuse(
        path,
        "images with a file_name that repeats",
        "list each file once, and give all of its annotations that image_id: an entry with a part "
        "of the objects teaches that the others are background",
        [i for i in content["images"] if count[i["file_name"]] > 1],
    )
    _refuse(
        path,
        "annotations whose image_id or category_id is not listed",
        "add the image or the category, or remove the annotations",
        [
            a
            for a in annotations
            if a["image_id"] not in images or a["category_id"] not in categories
        ],
    )
    _refuse(
        path,
        'annotations with "ignore", which Detectron2 does not know',
        'use "iscrowd": 1',
        [a for a in annotations if a.get("ignore", 0)],
    )
    _refuse(
        path,
        'annotations whose "iscrowd" is not 0 or 1 (such as null, or "0" in quotes)',
        "write 0 for an object and 1 for a crowd",
        [a for a in annotations if not _is_flag(a.get("iscrowd", 0))],
    )
    _refuse(
        path,
        "images whose height or width is under 1",
        "write the size in pixels",
        [i for i in content["images"] if min(i["height"], i["width"]) < 1],
    )


def _check_evaluated(annotations: list[dict], path: str) -> None:
    """Refuses or counts objects that COCO's evaluation would silently ignore or never match."""
    _refuse(
        path,
        'annotations whose "area" COCO\'s evaluation ignores: negative, not finite or over 1e10',
        "write the area in pixels (of the mask, or width * height of the box)",
        [a for a in annotations if not 0 <= a["area"] <= _LARGEST_AREA],
    )
    if not any(not a["iscrowd"] for a in annotations):
        logger.warning(f"{path} has no objects (or only crowds): AP cannot be computed on it.")
    crowded = Counter((a["image_id"], a["category_id"]) for a in annotations if not a["iscrowd"])
    crowded = sum(number > _MOST_DETECTIONS for number in crowded.values())
    if crowded:
        logger.warning(
            f"{path}: in {crowded} cases an image has more than {_MOST_DETECTIONS} objects of one "
            f"class. COCO's evaluation uses at most {_MOST_DETECTIONS} detections of a class in an "
            "image, so AP cannot reach 100."
        )


def _has(entry, keys: dict) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in keys.items())


def _types(keys: dict) -> str:
    names = {int: "a whole number", str: "text", list: "a list", (int, float): "a number"}
    return ", ".join(f"{key} ({names[kind]})" for key, kind in keys.items())


def _is_flag(value) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)


def _check_boxes(content: dict, path: str, training: bool) -> None:
    annotations = content.get("annotations", ())
    _refuse(
        path,
        "boxes that are not four finite numbers x, y, width, height with width and height >= 0",
        "write them in pixels",
        [a for a in annotations if not _is_box(a["bbox"])],
    )
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    _check_units([(a["bbox"], sizes[a["image_id"]]) for a in annotations], path)
    empty = outside = cut = useful = 0
    for a in annotations:
        (x, y, w, h), (width, height) = a["bbox"], sizes[a["image_id"]]
        if w == 0 or h == 0:
            empty += 1
        elif x + w <= 0 or y + h <= 0 or x >= width or y >= height:
            outside += 1
        else:
            cut += _reaches_out(a["bbox"], (width, height))
            useful += not a.get("iscrowd", 0)
    if empty or outside or cut:
        effect = (
            "Training leaves out the first two kinds and clips the third kind at the border."
            if training
            else "COCO's evaluation counts the first two kinds as objects that were not found."
        )
        logger.warning(
            f"{path}: of {len(annotations)} boxes, {empty} have no area, {outside} lie outside "
            f"their image, and {cut} reach over its border. {effect} If there are many, check that "
            "the boxes are x, y, width, height in pixels."
        )
    if training and not useful:
        raise DataError(
            f"{path} has no box to learn from: all of its {len(annotations)} annotations are "
            "crowds (iscrowd 1), have no area, or lie outside their image. Add annotated objects."
        )


def _is_box(box: list) -> bool:
    return (
        len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in box)  # excludes NaN
        and min(box[2:]) >= 0
    )


def _reaches_out(box: list, size: tuple[int, int]) -> bool:
    """Whether a box reaches more than a pixel over the border of an image (width, height)."""
    (x, y, w, h), (width, height) = box, size
    return x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1


def _check_units(boxes: list[tuple[list, tuple[int, int]]], path: str) -> None:
    """Refuses boxes that are clearly not x, y, width, height in pixels.

    Args:
        boxes: pairs of a box and the (width, height) of its image.
    """
    if len(boxes) < 10:  # too few boxes to decide
        return
    if all(max(box) <= 1 for box, _ in boxes) and any(max(box[2:]) > 0 for box, _ in boxes):
        raise DataError(
            f"{path}: no box is larger than a pixel. The boxes seem to be fractions of the image: "
            "multiply x and width by the image's width, y and height by its height."
        )
    out = sum(_reaches_out(*box) for box in boxes)
    corners = all(
        x < x2 <= width + 1 and y < y2 <= height + 1 for (x, y, x2, y2), (width, height) in boxes
    )
    if out > len(boxes) / 5 and corners:
        raise DataError(
            f"{path}: {out} of {len(boxes)} boxes reach over the border of their image, but all "
            "would fit if they were x1, y1, x2, y2. COCO's format is x, y, width, height: write "
            "x2 - x1 and y2 - y1 in place of x2 and y2."
        )


def _count_unusable_shapes(annotations: list[dict], path: str) -> None:
    """Warns about masks and keypoints that cannot be read. A box detector does not need them."""
    masks = sum(not _is_mask(a.get("segmentation")) for a in annotations)
    keypoints = sum(not _is_keypoints(a.get("keypoints")) for a in annotations)
    if masks or keypoints:
        logger.warning(
            f"{path}: {masks} annotations have a segmentation and {keypoints} have keypoints that "
            "are not valid COCO format. Their boxes are still used."
        )


def _count_repeated_boxes(annotations: list[dict], path: str) -> None:
    boxes = Counter((a["image_id"], a["category_id"], *a["bbox"]) for a in annotations)
    repeated = sum(boxes.values()) - len(boxes)
    if repeated:
        logger.warning(
            f"{path}: {repeated} of {len(annotations)} annotations repeat another one (same image, "
            "class and box). COCO's evaluation counts each as an object of its own, which lowers "
            "AP: remove them."
        )


def _name_classes_without_boxes(content: dict, path: str) -> None:
    used = {a["category_id"] for a in content["annotations"]}
    unused = [c["name"] for c in content["categories"] if c["id"] not in used]
    if unused:
        shown = ", ".join(map(repr, unused[:10])) + (", ..." if len(unused) > 10 else "")
        logger.warning(
            f"{path}: {len(unused)} of {len(content['categories'])} classes have no annotation "
            f"({shown}). The detector gets an output for each and cannot learn it. If it is only "
            "the heading of a group, as in an export of Roboflow, remove it from the list "
            '"categories" of all files.'
        )


def _is_mask(value) -> bool:
    if isinstance(value, dict):  # run lengths
        return isinstance(value.get("counts"), (list, str)) and isinstance(value.get("size"), list)
    if isinstance(value, list):  # polygons of at least three points
        return all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in value)
    return value is None


def _is_keypoints(value) -> bool:
    if isinstance(value, list):
        return len(value) % 3 == 0 and all(
            isinstance(v, (int, float)) and abs(v) < 1e9 for v in value
        )
    return value is None


def _refuse(path: str, what: str, fix: str, entries: list) -> None:
    if not entries:
        return
    shown = [str(e.get("id", e) if isinstance(e, dict) else e)[:60] for e in entries[:5]]
    more = ", ..." if len(entries) > 5 else ""
    raise DataError(f"{path} has {len(entries)} {what} (ids {', '.join(shown)}{more}): {fix}.")
