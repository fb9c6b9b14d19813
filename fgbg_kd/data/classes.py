"""Class names. Sets, detectors and files are matched by class name, not by class number."""

import difflib
import functools
import json
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ..config import student_config
from ..utils.errors import ConfigError, DataError


def categories_of(path: str) -> list[dict]:
    """The categories of a COCO file, {"id", "name"}, in the order of their ids.

    Raises:
        DataError: the file has no list of named categories.
    """
    return [{"id": id, "name": name} for id, name in _categories(path, os.path.getmtime(path))]


def class_names(path: str) -> list[str]:
    """The category names of a COCO file, in the order of their ids.

    Raises:
        DataError: the file has no list of named categories.
    """
    return [c["name"] for c in categories_of(path)]


@functools.lru_cache
def _categories(path: str, _modified: float) -> tuple[tuple[int, str], ...]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)["categories"]
        return tuple((c["id"], c["name"]) for c in sorted(content, key=lambda c: c["id"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a COCO file with named categories ({error!r}).") from error


def names_of(categories: list[dict]) -> list[str]:
    """The names of a COCO file's categories, in the order of their ids.

    A detector that is trained on the file has its classes 0, 1, ... in this order.
    """
    return [c["name"] for c in sorted(categories, key=lambda c: c["id"])]


def set_classes(name: str) -> list[str] | None:
    """The class names of a registered set, in the order of the class numbers.

    They are in the metadata of the set. Detectron2 writes those of a COCO file there only when it
    loads the file. Before, they are read from the file.

    Returns:
        The names; None if the set has neither names nor a file.

    Raises:
        DataError: the file is not a COCO file.
    """
    classes = MetadataCatalog.get(name).get("thing_classes")
    return list(classes or [c["name"] for c in set_categories(name)]) or None


def set_categories(name: str) -> list[dict]:
    """The COCO categories of a registered set, {"id", "name"}, in the order of the class numbers.

    A set without COCO ids has the class numbers 0, 1, ... as ids, as in the COCO files that
    Detectron2 makes of such sets.

    Returns:
        The categories; [] if the names are not known.

    Raises:
        DataError: the set's file is not a COCO file.
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if not classes:
        path = metadata.get("json_file", "")
        return categories_of(path) if os.path.isfile(path) else []
    numbers = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {n: id for id, n in numbers.items()}
    return [{"id": ids.get(n, n), "name": name} for n, name in enumerate(classes)]


def training_classes(cfg: CfgNode | DictConfig) -> list[str] | None:
    """The class names of a config's training set, in the order of the class numbers.

    They are read from DATASETS.TRAIN_JSON, or are those of a registered set (:func:`set_classes`).

    Returns:
        The names; None if neither source has names.

    Raises:
        DataError: DATASETS.TRAIN_JSON is not a COCO file.
    """
    if isinstance(cfg, CfgNode) and cfg.DATASETS.TRAIN_JSON:
        path = cfg.DATASETS.TRAIN_JSON
        return class_names(path) if os.path.isfile(path) else None
    return next(filter(None, map(set_classes, names_of_sets(cfg))), None)


def names_of_sets(cfg: CfgNode | DictConfig, part: str = "train") -> list[str]:
    """The names of a config's training sets, or with ``part="test"`` of its test sets."""
    if isinstance(cfg, CfgNode):
        return list(cfg.DATASETS[part.upper()])
    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") or []
    return [names] if isinstance(names, str) else list(names)


def match_categories(classes: Sequence[str], categories: list[dict], path: str) -> dict[int, int]:
    """Matches the categories of a COCO file to the classes of a detector by name.

    Args:
        classes: names of the detector's classes 0, 1, ...
        categories: the file's categories: dicts with "id" and "name", in any order and numbering.
        path: the file's path, for the message.

    Returns:
        Class number by category id: {1: 1, 2: 0} if the file has the detector's two classes in the
        other order.

    Raises:
        DataError: the names differ. The message lists both.

    Example::

        numbers = match_categories(["cat", "dog"], content["categories"], "val.json")
        category_ids = {number: id for id, number in numbers.items()}
    """
    ids = {c["name"]: c["id"] for c in categories}
    if set(ids) != set(classes):
        absent = sorted(set(classes) - set(ids))
        hints = {x: difflib.get_close_matches(x, set(ids) - set(classes), 1) for x in absent}
        renamed = [f"rename {near[0]!r} to {name!r}" for name, near in hints.items() if near]
        lacking = [name for name, near in hints.items() if not near]
        extra = sorted(set(ids) - set(classes) - {near[0] for near in hints.values() if near})
        fixes = [*renamed]
        if lacking:
            fixes.append(f'add {_listed(lacking)} to its list "categories" (they need no '
                         "annotations)")  # fmt: skip
        if extra:
            fixes.append(f"remove {_listed(extra)} with their annotations")
        raise DataError(
            f"{path} and the training set have different classes.\n"
            f"  {path}: {_listed(names_of(categories))}\n"
            f"  training: {_listed(classes)}\n"
            f"Change {path}: {'; '.join(fixes)}."
        )
    return {ids[name]: number for number, name in enumerate(classes)}


def check_num_classes(cfg: CfgNode, num_classes: int) -> None:
    """Checks that a detector and the registered sets of a config have equally many classes.

    Otherwise the detector could be trained or evaluated with wrong classes without an error.

    Args:
        num_classes: the detector's number of classes.

    Raises:
        ConfigError: the detector and the sets have different numbers of classes.
    """
    detector = student_config(cfg).MODEL.META_ARCHITECTURE
    node = "ROI_HEADS" if detector == "GeneralizedRCNN" else detector.upper()
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = set_classes(name)
        if classes is not None and len(classes) != num_classes:
            raise ConfigError(
                f"The set {name} has {len(classes)} classes ({_listed(classes)}), but the detector "
                f"has {num_classes}: set MODEL.{node}.NUM_CLASSES {len(classes)}."
            )


def check_same_classes(sets: Sequence[str]) -> None:
    """Checks that registered sets have the same class names in the same order.

    Args:
        sets: names in Detectron2's MetadataCatalog. Sets without known names are skipped.

    Raises:
        DataError: two sets differ. The message lists the classes of both.
    """
    known = [(name, classes) for name in sets if (classes := set_classes(name))]
    for name, classes in known[1:]:
        first, expected = known[0]
        if classes != expected:
            same = set(classes) == set(expected)
            raise DataError(
                f"The sets {first} and {name} have "
                f"{'the same classes in different orders' if same else 'different classes'}.\n"
                f"  {first}: {_listed(expected)}\n  {name}: {_listed(classes)}\n"
                "Give both the same classes in the same order (thing_classes of their metadata)."
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more
