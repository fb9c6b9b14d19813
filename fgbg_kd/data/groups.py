"""Splits a test part off a training set, by groups of images that belong together."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..utils.errors import DataError

_SHARE = 0.2
_BLOCKS = 20  # number of blocks of neighbouring files, if the names give no groups
_FEW = 5  # fewer groups or images cannot be split well


def group_of(file_name: str) -> str:
    """The film or series of an image: its name without the number at the end.

    "films/river_0042.jpg" and "films/river_0043.jpg" are of the group "films/river". A name that is
    only a number is a group of its own. The random part that Roboflow adds is left out.
    """
    path = PurePosixPath(file_name)
    stem = re.sub(r"[_.][A-Za-z]+\.rf\.\w+$", "", path.stem)
    return str(path.with_name(re.sub(r"[\W_]*\d+$", "", stem) or stem))


def groups_of(file_names: Sequence[str]) -> tuple[dict[str, str], str]:
    """The group of each image, and a text that says how they were found.

    If the names give few groups, or one group holds most images, then blocks of neighbouring names
    are the groups: neighbours may be frames of one film.
    """
    found = {name: group_of(name) for name in file_names}
    sizes = Counter(found.values()).values()
    if len(sizes) >= _FEW and max(sizes) <= len(file_names) / 2:
        return found, f"{len(sizes)} groups of images, by their names"
    length = -(-len(file_names) // _BLOCKS)
    blocks = {name: f"block {i // length}" for i, name in enumerate(sorted(file_names))}
    return blocks, f"{len(set(blocks.values()))} blocks of neighbouring file names"


def split(content: dict, path: str, seed: int = 0, share: float = _SHARE) -> tuple[dict, dict, str]:
    """Splits a COCO file that has been checked. A group is never in both parts.

    Args:
        content: the parsed file.
        path: its path, for the message.
        seed: the same seed gives the same parts.
        share: about this share of the images is in the test part.

    Returns:
        The training part, the test part, and a sentence about them.

    Raises:
        DataError: there are too few images, or a part has no object.
    """
    names = sorted(i["file_name"] for i in content["images"])
    if len(names) < _FEW:
        raise DataError(
            f"{path} has {len(names)} images, too few to split a test part off: give --test."
        )
    group, how = groups_of(names)
    order = sorted(set(group.values()))
    random.Random(seed).shuffle(order)
    members: dict[str, list[str]] = {g: [] for g in order}
    for name in names:
        members[group[name]].append(name)
    chosen: set[str] = set()
    wanted = max(share * len(names), 1)
    for part in members.values():  # each group that brings the number nearer to the wanted one
        if abs(len(chosen) + len(part) - wanted) < wanted - len(chosen):
            chosen.update(part)
    train, test = _part(content, set(names) - chosen), _part(content, chosen)
    if not train["annotations"] or not test["annotations"]:
        raise DataError(f"{path} cannot be split into two parts with objects ({how}): give --test.")
    return (
        train,
        test,
        (
            f"{len(test['images'])} of {len(names)} training images were split off as the test set "
            f"({how}, seed {seed})"
        ),
    )


def _area(annotation: dict) -> float:
    """The area of an object. Training needs none, so a file can lack it."""
    area = annotation.get("area")
    valid = isinstance(area, (int, float)) and area >= 0
    return area if valid else annotation["bbox"][2] * annotation["bbox"][3]


def _part(content: dict, names: set[str]) -> dict:
    images = [i for i in content["images"] if i["file_name"] in names]
    ids = {i["id"] for i in images}
    annotations = [
        a | {"iscrowd": a.get("iscrowd") or 0, "area": _area(a), "id": number}
        for number, a in enumerate(content["annotations"], 1)
        if a["image_id"] in ids
    ]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}
