"""Two sets of real photos, from files that the user has: VOC 2007 and the Roboflow Aquarium.

The folder ``splits`` has a text file per set. Each line names a part and its photos. Neighbours in
one film, photos by one photographer and look-alikes are in the same part. So AP on these parts
cannot be set beside published AP on VOC 2007, which has another split.
"""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...utils.files import read_json
from .packages import build_folder, coco_dict, summarise, write_json

RECIPE = 1  # increase it when the same files give other pixels or boxes
PARTS = ("train", "val", "test")
SPLITS = Path(__file__).with_name("splits")
SHARED = Path("../shared/data")  # it can hold the sets in the form that this file makes


class Box(NamedTuple):
    """An object in a photo.

    Attributes:
        category: name of its class.
        corners: x0, y0, x1, y1 as shares of the photo's width and height, 0 to 1.
        difficult: whether VOC calls the object difficult to recognise.
    """

    category: str
    corners: tuple[float, float, float, float]
    difficult: bool = False


class RealSet(NamedTuple):
    """A set of real photos and the form of the user's files.

    Attributes:
        name: of the folder of the made set, and of the file in ``splits``.
        find: a function from the user's folder to {name of a photo: path of its file}.
        read: a function from the path of a photo and its (width, height) in pixels to its boxes.
        classes: names of the classes.
        longest_side: of a made photo, in pixels. Smaller photos keep their size.
        quality: of its JPEG file.
        needs: what the user must have, for messages.
        attribution: of photos and boxes.
    """

    name: str
    find: Callable[[Path], dict[str, Path]]
    read: Callable[[Path, tuple[int, int]], list[Box]]
    classes: tuple[str, ...]
    longest_side: int
    quality: int
    needs: str
    attribution: str


def _find_voc(root: Path) -> dict[str, Path]:
    folder = root / "VOC2007" if (root / "VOC2007").is_dir() else root
    return {path.stem: path for path in (folder / "JPEGImages").glob("*.jpg")}


def _read_voc(photo: Path, size: tuple[int, int]) -> list[Box]:
    """VOC counts pixels from 1, and a box holds the pixels xmin to xmax: its left is xmin - 1."""
    width, height = size
    boxes = []
    tree = ElementTree.parse(photo.parents[1] / "Annotations" / f"{photo.stem}.xml")
    for item in tree.iter("object"):
        corner = {e.tag: float(e.text) for e in item.find("bndbox")}
        left, top = (corner["xmin"] - 1) / width, (corner["ymin"] - 1) / height
        corners = (left, top, corner["xmax"] / width, corner["ymax"] / height)
        boxes.append(Box(item.findtext("name"), corners, item.findtext("difficult") == "1"))
    return boxes


def _find_aquarium(root: Path) -> dict[str, Path]:
    """The photo of the file IMG_8551_MOV-1_jpg.rf.HASH.jpg has the name IMG_8551_MOV1."""
    names = {}
    for path in root.glob("*/images/*.jpg"):
        original = re.sub(r"(_jpe?g)+$", "", path.stem.partition(".rf.")[0])
        names[original.replace("-", "")] = path
    return names


def _read_aquarium(photo: Path, size: tuple[int, int]) -> list[Box]:
    """A line of Roboflow's YOLO export: class, then centre x, centre y, width, height as shares."""
    boxes = []
    for line in (photo.parents[1] / "labels" / f"{photo.stem}.txt").read_text().splitlines():
        category, x, y, w, h = map(float, line.split())
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        boxes.append(Box(AQUARIUM.classes[int(category)], corners))
    return boxes


VOC07 = RealSet(
    name="voc07",
    find=_find_voc,
    read=_read_voc,
    classes=(
        *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
        *("train", "tvmonitor"),
    ),
    longest_side=320,
    quality=80,
    needs="VOCdevkit/VOC2007 with JPEGImages and Annotations of the 4,952 test photos "
    "(VOCtest_06-Nov-2007.tar)",
    attribution="PASCAL VOC 2007, test photos; the photos are from Flickr and subject to its terms",
)
AQUARIUM = RealSet(
    name="aquarium",
    find=_find_aquarium,
    read=_read_aquarium,
    classes=("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"),
    longest_side=512,
    quality=85,
    needs="the Roboflow Aquarium, version raw-1024, in YOLO format: train, valid and test, each "
    "with images and labels",
    attribution="Roboflow Aquarium, CC BY 4.0",
)


def build_real(folder, real: RealSet, source=None, *, shared=SHARED, progress=None):
    """Makes a folder with train.json, val.json, test.json (COCO) and images.

    Objects that VOC calls difficult are ignored (iscrowd 1) in val and test. In train they are
    ordinary boxes with the key "difficult".

    Args:
        folder: path of the folder.
        real: the set.
        source: the user's folder. None: ``shared/NAME`` is copied.
        shared: a folder that can hold the set in its made form.
        progress: None, or a function that gets ("photos", photos that are done, number of photos).

    Returns:
        The content of meta.json, and whether the folder was made by this call.

    Raises:
        FileNotFoundError: there is no source, or a photo or its boxes are missing in it.
        FileExistsError: see :func:`.packages.build_folder`.
    """
    made = Path(shared, real.name)

    def write(partial):
        if source is not None:
            return _write(partial, real, Path(source), progress)
        if not (made / "train.json").is_file():
            raise FileNotFoundError(f"name your files with --from FOLDER. It needs {real.needs}")
        for part in PARTS:
            shutil.copy(made / f"{part}.json", partial)
        shutil.copytree(made / "images", partial / "images")
        return _summary(partial)

    return build_folder(folder, {"recipe": RECIPE, "set": real.name}, write)


def split_of(real: RealSet) -> dict[str, list[str]]:
    """The names of the photos of each part: {"train": [...], "val": [...], "test": [...]}."""
    lines = (SPLITS / f"{real.name}.txt").read_text().splitlines()
    return {part: names for part, *names in map(str.split, lines)}


def _write(partial, real, source, progress):
    photos, split = real.find(source), split_of(real)
    wanted = [name for part in PARTS for name in split[part]]
    if missing := [name for name in wanted if name not in photos]:
        raise FileNotFoundError(
            f"{source} lacks {len(missing)} of {len(wanted)} photos, such as {missing[0]}: "
            f"it needs {real.needs}"
        )
    (partial / "images").mkdir()
    done = 0
    for part in PARTS:
        images, annotations = [], []
        for name in split[part]:
            _add(partial / "images" / f"{name}.jpg", real, photos[name], part, images, annotations)
            done += 1
            if progress:
                progress("photos", done, len(wanted))
        info = {"description": f"{real.name}, {part}", "attribution": real.attribution}
        coco = coco_dict(images, annotations, real.classes, info)
        write_json(partial / f"{part}.json", coco)
    return _summary(partial)


def _add(file, real, photo, part, images, annotations):
    """Writes a photo to ``file``, and appends it and its boxes to lists of COCO's entries."""
    with Image.open(photo) as image:
        size = image.size
        scale = min(1.0, real.longest_side / max(size))
        width, height = (round(scale * side) for side in size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        resized.save(file, "JPEG", quality=real.quality, optimize=True)
    image_id = len(images) + 1
    images.append({"id": image_id, "file_name": file.name, "width": width, "height": height})
    for box in real.read(photo, size):
        x0, y0, x1, y1 = box.corners
        x, y, w, h = x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height
        if min(w, h) <= 0:  # the Aquarium has two such boxes
            continue
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": real.classes.index(box.category) + 1,
                "bbox": [round(v, 2) for v in (x, y, w, h)],
                "area": round(w * h, 2),
                "iscrowd": int(box.difficult and part != "train"),
                **({"difficult": 1} if box.difficult else {}),
            }
        )


def _summary(folder):
    return {part: summarise(read_json(folder / f"{part}.json")) for part in PARTS}
