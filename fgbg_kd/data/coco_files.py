"""Registers the user's COCO-format data, which config keys name. No Python code is needed."""

import json
import logging
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from detectron2.utils import comm
from omegaconf import DictConfig

from ..utils.errors import ConfigError, DataError
from .classes import match_categories, names_of, names_of_sets, training_classes
from .image_files import check_images
from .images import too_narrow
from .validation import read_coco

logger = logging.getLogger(__name__)

_registered: dict[str, tuple] = {}


def register_datasets(cfg: CfgNode, training: bool = True) -> None:
    """Checks and registers the sets that DATASETS.{TRAIN,TEST}_JSON and _IMAGES name.

    The classes of the test set are matched to the training classes by name. So the two files may
    number them differently.

    Args:
        training: False: registers only the test set. The training file need not exist. If it
            exists, its class names are used.

    Raises:
        ConfigError: a file has several names, a name is already used, or a path does not exist.
        DataError: a file is not valid COCO format, its images do not fit it, or the test set has
            other classes than the training set.
    """
    for part in ("TRAIN", "TEST") if training else ("TEST",):
        names = cfg.DATASETS[part]
        path, images = cfg.DATASETS[f"{part}_JSON"], cfg.DATASETS[f"{part}_IMAGES"]
        if not path:
            continue
        if len(names) != 1:
            raise ConfigError(
                f"DATASETS.{part}_JSON is one set, but DATASETS.{part} has {len(names)} names "
                f'{tuple(names)}: give it one name, such as ("my_data",).'
            )
        _check_paths(path, images, part)
        classes = training_classes(cfg) if part == "TEST" else None
        if part == "TEST" and not classes and cfg.DATASETS.TRAIN_JSON:
            logger.warning(
                f"DATASETS.TRAIN_JSON {cfg.DATASETS.TRAIN_JSON} does not exist, so the classes are "
                f"taken in the order of {path}. If the training file has another order, names and "
                "AP are wrong."
            )
        shapes = cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON
        content = read_coco(path, training=part == "TRAIN")  # a test set needs other fields too
        _register(names[0], content, path, images, part, classes, shapes)
        _check_proportions(names[0], content["images"], part, cfg.INPUT[f"MAX_SIZE_{part}"])


def _check_paths(path: str, images: str, part: str) -> None:
    for key, value, exists, kind in (
        ("JSON", path, os.path.isfile(path), "file"),
        ("IMAGES", images, os.path.isdir(images), "folder"),
    ):
        if not exists:
            raise ConfigError(f"DATASETS.{part}_{key} is {value!r}: there is no such {kind}.")


def _check_proportions(name: str, images: list[dict], part: str, longest: int) -> None:
    narrow = [i for i in images if too_narrow(i["height"], i["width"], longest)]
    if narrow:
        raise DataError(
            f"{len(narrow)} images of {name} are too narrow, such as {narrow[0]['file_name']} with "
            f"{narrow[0]['width']}x{narrow[0]['height']} pixels: if the longer side is reduced to "
            f"INPUT.MAX_SIZE_{part} {longest}, the shorter one has no pixel. Cut them into parts, "
            "or remove them from the JSON file."
        )


def _register(
    name: str,
    content: dict,
    path: str,
    images: str,
    part: str,
    classes: list[str] | None,
    shapes: bool,
) -> None:
    if name in _registered:
        *origin, known = _registered[name]
        if origin == [path, images, shapes] and classes in (None, known):
            return
    if name in DatasetCatalog.list():
        raise ConfigError(
            f"DATASETS.{part}: the name {name!r} is taken by another set: choose another name."
        )
    if comm.is_main_process():
        check_images(content["images"], images)
    own = names_of(content["categories"])
    numbers = match_categories(classes or own, content["categories"], path)
    if classes and classes != own:
        logger.warning(
            f"{path} numbers its classes differently from the training set. They are matched by "
            "name."
        )
    DatasetCatalog.register(name, lambda: read_records(path, images, numbers, shapes))
    MetadataCatalog.get(name).set(
        json_file=path,
        image_root=images,
        evaluator_type="coco",
        thing_classes=list(classes or own),
        thing_dataset_id_to_contiguous_id=numbers,
    )
    _registered[name] = path, images, shapes, list(classes or own)


def names_set_of_another_config(cfg: CfgNode | DictConfig) -> bool:
    """Whether a config names a training set without its file, and another config gave its file.

    Then the classes of that set may not be those of this config: a set of the same name may have
    been registered in the user's own training.
    """
    if isinstance(cfg, CfgNode) and cfg.DATASETS.TRAIN_JSON:
        return False
    return any(name in _registered for name in names_of_sets(cfg))


def read_records(
    path: str, folder: str, numbers: dict[int, int], shapes: bool = False
) -> list[dict]:
    """A COCO file's images and boxes as Detectron2's dataset dicts, sorted by image id.

    Args:
        path: a COCO file that :func:`read_coco` has checked.
        folder: the folder of the images.
        numbers: class number by category id, as from :func:`match_categories`.
        shapes: also read masks and keypoints, with Detectron2's reader. This reader leaves out
            objects with an invalid mask, so it is not used for a box detector.
    """
    if shapes:
        records = load_coco_json(path, folder)
        for a in (a for record in records for a in record["annotations"]):
            a["category_id"] = numbers[a["category_id"]]
        return records
    with open(path, encoding="utf-8") as file:
        return box_records(json.load(file), folder, numbers)


def box_records(content: dict, folder: str, numbers: dict[int, int]) -> list[dict]:
    """:func:`read_records` for a parsed file, without masks and keypoints."""
    records = {
        i["id"]: {
            "file_name": os.path.join(folder, i["file_name"]),
            "height": i["height"],
            "width": i["width"],
            "image_id": i["id"],
            "annotations": [],
        }
        for i in sorted(content["images"], key=lambda i: i["id"])
    }
    for a in content.get("annotations", ()):
        records[a["image_id"]]["annotations"].append(
            {
                "iscrowd": int(a.get("iscrowd", 0)),
                "bbox": a["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": numbers[a["category_id"]],
            }
        )
    return list(records.values())
