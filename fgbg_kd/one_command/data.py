"""The user's data as COCO files: PASCAL VOC and YOLO are converted, a test part is split off."""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from ..data.groups import split
from ..data.images import IMAGE_SUFFIXES
from ..data.validation import read_coco
from ..utils.errors import DataError, FgBgError
from ..utils.files import digest_of_files, sha256_of, write_whole

logger = logging.getLogger(__name__)

_FORMATS = (
    "COCO: train.json photos/; PASCAL VOC: a folder with Annotations and JPEGImages, or with .xml "
    "files beside the images; YOLO: data.yaml, or the folder that holds it"
)
# Names of the parts in data.yaml and in ImageSets/Main, the best first.
_PARTS = {"train": ("trainval", "train"), "test": ("test", "val", "valid")}


class Data(NamedTuple):
    """Training and test set.

    Attributes:
        train, test: path of a COCO file, and folder of its images.
        note: where the test set comes from.
    """

    train: tuple[str, str]
    test: tuple[str, str]
    note: str


def prepare(train: Sequence[str], test: Sequence[str], folder: Path) -> Data:
    """Finds both sets. Converted and split files are written to a folder.

    Args:
        train: a COCO file and its folder of images, or one path of another format.
        test: the same, or empty: the test part of the same VOC or YOLO data, or a part of the
            training set.
        folder: for the files.

    Raises:
        DataError: a path is not there or is of no known format, the data are damaged, or an image
            of converted data is in both sets.
    """
    shared = list(test) in ([], list(train))
    found = _find(train, "train", folder, shared)
    if found is None:
        raise DataError(
            f"--train {' '.join(train)}: no training images are named there. Add the entry train "
            "to data.yaml."
        )
    content = read_coco(found[0], training=True)
    note = f"test set: {' '.join(test)}"
    other = _find(test, "test", folder)
    if test and other is None:
        raise DataError(
            f"--test {' '.join(test)}: no test images are named there. Add the entry test to "
            "data.yaml."
        )
    if other is None and len(train) == 1:
        other = _find(train, "test", folder, shared=True)
        note = f"test set: the test part of {train[0]}"
    if other is not None:
        if Path(other[0]).is_relative_to(folder.resolve()):
            _same_categories(other[0], content["categories"])
        sets = (content, found[1]), (read_coco(other[0], training=False), other[1])
        if all(a.get("iscrowd") for a in sets[1][0].get("annotations", ())):
            raise DataError(
                f"{other[0]}: no box of the test set counts, so there is no AP. Give annotations "
                "with boxes that are not iscrowd."
            )
        _check_apart(*sets, converted=min(len(train), len(test)) < 2)
        return Data(found, other, note)
    parts, folder = split(content, found[0]), folder.resolve()
    # VOC's difficult objects are not counted in a test set.
    for annotation in parts[1]["annotations"] if len(train) == 1 else ():
        annotation["iscrowd"] = annotation.get("difficult", 0)
    for name, part in zip(("train_part", "test_part"), parts):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.json", json.dumps(part))
    first, second = (str(folder / f"{name}_part.json") for name in ("train", "test"))
    return Data((first, found[1]), (second, found[1]), parts[2])


def _find(
    values: Sequence[str], part: str, folder: Path, shared: bool = False
) -> tuple[str, str] | None:
    """The COCO file and the images of a part; None: the data do not name this part.

    Args:
        shared: whether the same data hold both parts. A VOC folder must then list the test part in
            ImageSets.
    """
    if not values:
        return None
    path = Path(values[0])
    if len(values) > 2 or not path.exists():
        what = f"there is no {path}" if not path.exists() else "give one or two paths"
        raise DataError(f"--{part} {' '.join(values)}: {what}. Known formats: {_FORMATS}.")
    if len(values) == 2:
        images = os.path.abspath(values[1])
        if not path.is_file() or not os.path.isdir(images):
            what = "give a COCO file and the folder of its images"
            if not os.path.exists(images):
                what = f"there is no folder {values[1]}"
            raise DataError(f"--{part} {' '.join(values)}: {what}. Known formats: {_FORMATS}.")
        return os.path.abspath(path), images
    if path.suffix == ".json":
        raise DataError(
            f"--{part} {path}: give the folder of its images too: --{part} {path} photos/"
        )
    if yaml_file := _yaml_file(path):
        return _from_yolo(yaml_file, part, folder)
    if is_voc(path):
        return _from_voc(path, part, folder, shared)
    raise DataError(f"--{part} {path} has none of the known formats: {_FORMATS}.")


def is_voc(path: Path) -> bool:
    """Whether a folder without ``data.yaml`` is PASCAL VOC, whose classes have no order."""
    return (path / "Annotations").is_dir() or any(path.glob("*.xml"))


def digest_of(values: Sequence[str]) -> str:
    """The sha256 of a COCO file, or a digest of the paths, sizes and times of VOC or YOLO data.

    Args:
        values: as for :func:`prepare`. If there is no such path, the digest is "".
    """
    path = Path(values[0]) if values else Path("")
    if not values or not path.exists():  # prepare refuses it
        return ""
    if yaml_file := _yaml_file(path):
        files = [yaml_file]
        places = {place for part in _PARTS for place in _yolo_folders(yaml_file, part) or ()}
    elif path.is_file():
        return sha256_of(path)
    else:
        files, places = [], {*_voc_folders(path), path / "ImageSets" / "Main"}
    kinds = {".xml", ".txt", *IMAGE_SUFFIXES}
    found = (file for place in places if place.is_dir() for file in place.iterdir())
    return digest_of_files(
        [*files, *sorted(file for file in found if file.suffix.lower() in kinds)]
    )


def _yaml_file(path: Path) -> Path | None:
    """data.yaml of YOLO data; None: the path is of another format."""
    file = path / "data.yaml" if path.is_dir() else path
    return file if file.suffix in (".yaml", ".yml") and file.is_file() else None


def _yolo_folders(file: Path, part: str) -> tuple[Path, Path] | None:
    """The images and the labels of a part; None: data.yaml does not name the part."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = [x for x in _PARTS[part] if content.get(x)]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise DataError(f"{file} is not a data.yaml of YOLO: {error}") from error
    if not names:
        return None
    value = content[names[0]]
    if not isinstance(value, str) or value.endswith(".txt"):
        raise DataError(
            f"{file}: {names[0]} is {value!r}. Only one folder of images can be converted: name "
            "one, or convert the data to COCO format."
        )
    base = file.parent / (content.get("path") or "")
    # Roboflow writes ../train/images, although the folder is beside data.yaml.
    places = [base / value, file.parent / value, file.parent / re.sub(r"^(\.\./)+", "", value)]
    images = next((p for p in places if p.is_dir()), None)
    if images is None:
        raise DataError(
            f"{file}: {names[0]} is {value!r}, and there is no such folder. Correct the path."
        )
    images = images.resolve()
    head, found, tail = str(images).rpartition("images")
    labels = Path(f"{head}labels{tail}") if found else images
    return images, labels if labels.is_dir() else images


def _from_yolo(file: Path, part: str, folder: Path) -> tuple[str, str] | None:
    places = _yolo_folders(file, part)
    if places is None:
        return None
    images, labels = places
    read = _library().DetectionDataset.from_yolo
    return _converted(
        lambda: read(str(images), str(labels), str(file)),
        images,
        folder / f"{part}.json",
    )


def _voc_folders(path: Path) -> tuple[Path, Path]:
    """The images and the annotations."""
    images, annotations = path / "JPEGImages", path / "Annotations"
    return images if images.is_dir() else path, annotations if annotations.is_dir() else path


def _from_voc(path: Path, part: str, folder: Path, shared: bool) -> tuple[str, str] | None:
    sets = {p.stem: p for p in path.glob("ImageSets/Main/*.txt")}
    names = _PARTS[part]
    if part == "train" and shared and "test" not in sets and {"val", "valid"} & sets.keys():
        names = names[::-1]  # val becomes the test part, and trainval holds it
    listed = next((sets[x] for x in names if x in sets), None)
    if part == "test" and shared and listed is None:
        return None
    images, annotations = _voc_folders(path)
    stems = None
    if listed is not None:
        # A line can end with VOC's 1 (the class is there), -1 (it is not) or 0 (difficult).
        lines = {x.strip() for x in listed.read_text().splitlines()}
        stems = lines | {re.sub(r"\s+-?[01]$", "", x) for x in lines}
    read = _library().DetectionDataset.from_pascal_voc
    found = _converted(
        lambda: read(str(images), str(annotations)),
        images.resolve(),
        folder / f"{part}.json",
        stems,
    )
    _mark_difficult(Path(found[0]), annotations, part)
    return found


def _mark_difficult(file: Path, annotations: Path, part: str) -> None:
    """Marks VOC's difficult objects in a converted file, because the library does not mark them.

    In training they are like other objects. In a test set they get iscrowd 1. So they count neither
    as found nor as missed, as in VOC's own evaluation.
    """
    from defusedxml.ElementTree import parse  # of the library

    content, objects = json.loads(file.read_text()), defaultdict(list)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        xml = annotations / f"{Path(image['file_name']).stem}.xml"
        found = parse(xml).getroot().findall("object") if xml.is_file() else []
        for annotation, element in zip(objects[image["id"]], found):  # the library keeps the order
            if element.findtext("difficult", "0").strip() == "1":
                annotation["difficult"] = 1
                annotation["iscrowd"] = int(part == "test")
    write_whole(file, json.dumps(content))


def _converted(read, images: Path, file: Path, names: set[str] | None = None) -> tuple[str, str]:
    """Writes the COCO file of a set that the library reads.

    Args:
        names: stems of the images that belong to the part; None: all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        read().as_coco(annotations_path=str(file))
    except FgBgError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{images} cannot be converted to COCO format: {error}") from error
    content = json.loads(file.read_text())
    if not content.get("images"):
        raise DataError(
            f"{images} has no images with labels. Images in subfolders are not read: put them into "
            "this folder, or convert the data to a COCO file."
        )
    if names is not None:
        content["images"] = [i for i in content["images"] if Path(i["file_name"]).stem in names]
    kept = {i["id"] for i in content["images"]}
    content["annotations"] = [  # masks are not needed; one of several parts is marked as a crowd
        {k: v for k, v in a.items() if k != "segmentation"} | {"iscrowd": 0}
        for a in content["annotations"]
        if a["image_id"] in kept
    ]
    write_whole(file, json.dumps(content))
    return str(file.resolve()), str(images)


def _check_apart(train: tuple[dict, str], test: tuple[dict, str], converted: bool) -> None:
    """Looks for images that are in both sets.

    A user may give two COCO files with the same images on purpose. So they get a warning only.

    Args:
        train, test: content of a COCO file, and folder of its images.
        converted: whether one of the sets was VOC or YOLO data.

    Raises:
        DataError: converted data share images.
    """
    files = [
        {os.path.realpath(os.path.join(folder, image["file_name"])) for image in content["images"]}
        for content, folder in (train, test)
    ]
    both = files[0] & files[1]
    if not both:
        return
    fact = (
        f"{len(both)} of {len(files[1])} test images are training images too, such as {min(both)}"
    )
    if converted:
        raise DataError(
            f"{fact}. AP would be too high. Name other images in data.yaml or ImageSets, or give "
            "another --test."
        )
    logger.warning(f"{fact}. AP is too high then. Give another --test.")


def _same_categories(path: str, categories: list[dict]) -> None:
    """Adds training classes that a converted test set lacks: a VOC folder names no classes.

    Raises:
        DataError: the test set has a class that the training set lacks.
    """
    content = json.loads(Path(path).read_text())
    names = {c["name"] for c in content["categories"]}
    if new := sorted(names - {c["name"] for c in categories}):
        raise DataError(
            f"The test images have objects of {new}, which no training image has: add such "
            "training images, or remove these objects from the labels of the test part."
        )
    number = max((c["id"] for c in content["categories"]), default=0)
    for category in (c for c in categories if c["name"] not in names):
        number += 1
        content["categories"].append({"id": number, "name": category["name"]})
    write_whole(path, json.dumps(content))


def _library():
    try:
        import supervision
    except ImportError as error:
        raise DataError(
            "PASCAL VOC and YOLO data are converted to COCO format by the package supervision, "
            "which is not installed: pip install -e '.[formats]'. Or convert them yourself, and "
            "give --train train.json photos/."
        ) from error
    return supervision
