"""A user's own COCO-format data by two keys in the config, without Python."""

import functools
import json
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from ..config import student_config
from .validation import check_images, read_coco

_registered: dict[str, tuple[str, str]] = {}


def register_datasets(cfg) -> None:
    """Registers DATASETS.{TRAIN,TEST} from DATASETS.{TRAIN,TEST}_JSON and _IMAGES, where given.

    Raises:
        ValueError: several names for one file, a name that is taken, or a path that is not there.
        DataError: a file that is not as COCO's format wants it, or images that do not fit it.
    """
    for part in ("TRAIN", "TEST"):
        names = cfg.DATASETS[part]
        path, images = cfg.DATASETS[f"{part}_JSON"], cfg.DATASETS[f"{part}_IMAGES"]
        if not path:
            continue
        if len(names) != 1:
            raise ValueError(
                f"DATASETS.{part}_JSON is one set, but DATASETS.{part} names {tuple(names)}: give "
                'it one name, such as ("my_data",).'
            )
        _register(names[0], path, images, part)


def _register(name: str, path: str, images: str, part: str) -> None:
    for key, value, exists in (
        ("JSON", path, os.path.isfile(path)),
        ("IMAGES", images, os.path.isdir(images)),
    ):
        if not exists:
            raise ValueError(
                f"DATASETS.{part}_{key} is {value!r}: there is no such "
                f"{'file' if key == 'JSON' else 'folder'}."
            )
    if _registered.get(name) == (path, images):
        return
    if name in DatasetCatalog.list():
        raise ValueError(
            f"DATASETS.{part}: the name {name!r} is taken by another set: choose another."
        )
    content = read_coco(path, training=part == "TRAIN")
    if comm.is_main_process():
        check_images(content["images"], images)
    register_coco_instances(name, {}, path, images)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    MetadataCatalog.get(name).set(thing_classes=[c["name"] for c in categories])
    _registered[name] = (path, images)


@functools.lru_cache
def _class_names(path: str) -> list[str]:
    try:
        with open(path) as file:
            categories = json.load(file)["categories"]
        return [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO file with named categories: {error!r}") from error


def training_classes(cfg: CfgNode | DictConfig) -> list[str] | None:
    """Names of the classes of a config's training set, in the order of their numbers.

    None where neither a file nor the metadata of a registered set tells.
    """
    if isinstance(cfg, CfgNode):
        if cfg.DATASETS.TRAIN_JSON:
            path = cfg.DATASETS.TRAIN_JSON
            return _class_names(path) if os.path.isfile(path) else None
        names = cfg.DATASETS.TRAIN
    else:
        names = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
        names = (names,) if isinstance(names, str) else names
    known = (MetadataCatalog.get(name).get("thing_classes") for name in names)
    return next((list(classes) for classes in known if classes), None)


def check_num_classes(cfg, num_classes: int) -> None:
    """The detector must have as many classes as the data, or training learns nonsense silently.

    Raises:
        ValueError: names both numbers.
    """
    detector = student_config(cfg).MODEL.META_ARCHITECTURE
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"The set {name} has {len(classes)} classes ({', '.join(classes[:10])}), the "
                f"detector {num_classes}: set MODEL.{detector.upper()}.NUM_CLASSES {len(classes)}."
            )
