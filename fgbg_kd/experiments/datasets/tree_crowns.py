"""Tree crowns: aerial photos with hand-drawn boxes, cut into a train and a test set (COCO format).

The photos are NEON imagery from the package deepforest. A photo is divided into a train region and
a test region. The strip between them is as wide as the widest crown, so no crown touches both.
Regions are cut into tiles: to decode a photo of 17 MB for every crop would dominate training time.

A box that a border cuts is clipped. Its label depends on the share of its area that is inside:

- Train region: a box with less than 50 % inside is not labelled.
- Train tile: a box with less than 40 % inside is not labelled. Tiles overlap by half, so another
  tile shows more of it.
- Test region: a box with less than 50 % inside is ignored.
- Test tile: a box counts once, in the tile that shows most of it, if this is at least 40 %. Its
  parts in other tiles are ignored.

An ignored box has iscrowd 1: a detection of it is neither right nor wrong.
"""

import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import cv2
import numpy as np

from .packages import CACHE, build_folder, coco_dict, fetch, read_member, summarise, write_json

RECIPE = 1  # increase it when the same options give other pixels or boxes

PACKAGE = "deepforest==2.1.0"
PACKAGE_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
ATTRIBUTION = (
    "Imagery: National Ecological Observatory Network (NEON), CC0 at the time of the package "
    "(February 2026); boxes: DeepForest (Weinstein et al.), MIT licence"
)

REGION_KEEP = 0.5  # smallest share of a box inside its region
TILE_KEEP = 0.4  # smallest share of a box inside a tile
TRAIN_TILE, TRAIN_STRIDE = 400, 200  # pixels
TEST_TILE = 256  # pixels, approximately


class Photo(NamedTuple):
    """A photo of the package and its regions.

    Attributes:
        name: name of the .png and the .xml file in the package, without the suffix.
        train, test: regions x0, y0, x1, y1 in pixels. A coordinate None is the border of the photo.
            A region None is empty.
    """

    name: str
    train: tuple
    test: tuple


# The smallest photo is too small to divide. All of it is for training.
PHOTOS = (
    Photo("2019_YELL_2_528000_4978000_image_crop2", (0, 0, None, 1590), (0, 1704, None, None)),
    Photo("2019_YELL_2_541000_4977000_image_crop", (0, 360, None, None), (0, 0, None, 256)),
    Photo("OSBS_029", (0, 0, None, None), None),
)

# For the choice of options without the test set. Only the training regions above are used. The
# lower third of the first region is the test region.
TUNING_PHOTOS = (
    PHOTOS[0]._replace(train=(0, 0, None, 950), test=(0, 1064, None, 1590)),
    *(photo._replace(test=None) for photo in PHOTOS[1:]),
)


def read_boxes(xml):
    """The boxes of a Pascal VOC file.

    Args:
        xml: content of the file, text or bytes.

    Returns:
        (N, 4) float64 x0, y0, x1, y1 in pixels, in the order of the file.
    """
    tags = ("xmin", "ymin", "xmax", "ymax")
    found = ElementTree.fromstring(xml).iter("bndbox")
    boxes = [[float(box.find(tag).text) for tag in tags] for box in found]
    return np.array(boxes, np.float64).reshape(-1, 4)


def clip(boxes, region):
    """Clips boxes to a region.

    Args:
        boxes: (N, 4) x0, y0, x1, y1, with an area over 0.
        region: x0, y0, x1, y1.

    Returns:
        The clipped boxes (N, 4), and the share of each box's area that is inside, (N,).
    """
    low, high = region[:2] * 2, region[2:] * 2
    inside = boxes.clip(low, high)
    return inside, area(inside) / area(boxes)


def area(boxes):
    """Areas (N,) of boxes (N, 4) x0, y0, x1, y1."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def split_photo(boxes, train, test):
    """The boxes in the train region and in the test region.

    A box with less than half of its area inside a region is left out.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the photo.
        train, test: regions x0, y0, x1, y1; None: there is no such region.

    Returns:
        {"train": (clipped boxes (K, 4), their indices in ``boxes`` (K,)), "test": likewise}. A
        region that is None has no key.

    Raises:
        AssertionError: a box touches both regions.
    """
    parts = {}
    touched = {}
    for name, region in (("train", train), ("test", test)):
        if region is None:
            continue
        inside, share = clip(boxes, region)
        index = np.flatnonzero(share >= REGION_KEEP)
        parts[name] = inside[index], index
        touched[name] = set(np.flatnonzero(share > 0).tolist())
    both = set.intersection(*touched.values()) if len(touched) > 1 else set()
    assert not both, f"boxes {sorted(both)} touch train {train} and test {test}: widen the gap"
    return parts


def sliding(start, stop, tile, stride):
    """The starts of overlapping tiles that cover the pixels from start to stop.

    The last tile ends at stop. If the range is shorter than a tile, there is one tile.

    Args:
        start, stop, tile, stride: in pixels.

    Returns:
        A sorted list.
    """
    last = max(start, stop - tile)
    return sorted({min(at, last) for at in range(start, last + stride, stride)})


def train_tiles(region):
    """Overlapping tiles of 400 pixels that cover a region. A smaller region is one tile.

    Args:
        region: x0, y0, x1, y1 in pixels.

    Returns:
        x0, y0, x1, y1 of each tile, row by row.
    """
    x0, y0, x1, y1 = region
    return [
        (x, y, min(x + TRAIN_TILE, x1), min(y + TRAIN_TILE, y1))
        for y in sliding(y0, y1, TRAIN_TILE, TRAIN_STRIDE)
        for x in sliding(x0, x1, TRAIN_TILE, TRAIN_STRIDE)
    ]


def test_tiles(region):
    """Tiles of about 256 pixels that cover a region without overlap.

    Args:
        region: x0, y0, x1, y1 in pixels.

    Returns:
        x0, y0, x1, y1 of each tile, row by row.
    """
    x0, y0, x1, y1 = region
    xs = np.linspace(x0, x1, max(1, round((x1 - x0) / TEST_TILE)) + 1).round().astype(int).tolist()
    ys = np.linspace(y0, y1, max(1, round((y1 - y0) / TEST_TILE)) + 1).round().astype(int).tolist()
    rows, columns = zip(ys[:-1], ys[1:], strict=True), list(zip(xs[:-1], xs[1:], strict=True))
    return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]


test_tiles.__test__ = False  # pytest must not take it for a test because of its name


def label_tiles(boxes, tiles, once):
    """The boxes of each tile.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the photo.
        tiles: x0, y0, x1, y1 of each.
        once: False (train): a tile labels each box of which it shows at least TILE_KEEP.
            True (test): a box counts only in the tile that shows most of it, and only if this is
            at least TILE_KEEP. Its other parts are ignored.

    Returns:
        For each tile: clipped boxes (K, 4) in pixels of the photo, their indices in ``boxes`` (K,),
        and whether each is ignored (K,).
    """
    clipped = [clip(boxes, tile) for tile in tiles]
    shares = np.array([share for _, share in clipped]).reshape(len(tiles), len(boxes))
    counted = shares >= TILE_KEEP
    if once and len(boxes):
        best = shares.argmax(0)  # of equal shares, the first
        counted &= np.arange(len(tiles))[:, None] == best
    labelled = []
    for row, (inside, share) in enumerate(clipped):
        index = np.flatnonzero((share > 0) if once else counted[row])
        labelled.append((inside[index], index, ~counted[row][index]))
    return labelled


def add_photo(folder, coco, split, photo, image, boxes, region, tree_ids):
    """Writes the tiles of a region to folder/SPLIT, and appends them to lists of COCO's entries.

    Args:
        folder: path of the data folder.
        coco: the lists of images and annotations.
        split: "train" or "test".
        photo: a :class:`Photo`.
        image: its pixels, (H, W, 3) uint8 BGR.
        boxes: all boxes of the photo, (N, 4) x0, y0, x1, y1 in pixels.
        region: x0, y0, x1, y1 in pixels.
        tree_ids: (N,) number of each crown.
    """
    images, annotations = coco
    tiles = train_tiles(region) if split == "train" else test_tiles(region)
    if split == "test":  # a crown with less than half of its area in the region is ignored
        whole, (kept, index) = boxes, split_photo(boxes, None, region)["test"]
        inside, share = clip(whole, region)
        rest = np.flatnonzero((share > 0) & (share < REGION_KEEP))
        boxes, ids = np.concatenate([kept, inside[rest]]), tree_ids[np.concatenate([index, rest])]
        ignored = np.arange(len(boxes)) >= len(kept)
    else:
        boxes, index = split_photo(boxes, region, None)["train"]
        ids, ignored = tree_ids[index], np.zeros(len(index), bool)
    for tile, (inside, index, ignore) in zip(
        tiles, label_tiles(boxes, tiles, once=split == "test"), strict=True
    ):
        x0, y0, x1, y1 = tile
        name = f"{photo.name}_{x0:04d}_{y0:04d}.jpg"
        ok, raw = cv2.imencode(".jpg", image[y0:y1, x0:x1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        assert ok, name
        (folder / split / name).write_bytes(raw)
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": name, "width": x1 - x0, "height": y1 - y0})
        for box, tree, crowd in zip(inside, ids[index], ignore | ignored[index], strict=True):
            width, height = (box[2:] - box[:2]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [float(box[0] - x0), float(box[1] - y0), width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                    "tree": int(tree),  # a crown has the same number in all tiles
                }
            )


def build_trees(folder, *, photos=PHOTOS, cache=CACHE, progress=None):
    """Makes a folder with the tiles of tree crowns: a train and a test set.

    Args:
        folder: path of the folder.
        photos: the :class:`Photo` entries to use.
        cache: folder of the downloaded wheels.
        progress: None, or a function that gets ("photos", photos that are done, number of photos).

    Returns:
        The content of meta.json, and whether the folder was made by this call. The summary has the
        counts of :func:`.packages.summarise` for each set, and "trees": the number of crowns with a
        box that counts.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
        FileExistsError: see :func:`.packages.build_folder`.
        AssertionError: a crown touches the train and the test region.
    """
    options = {
        "recipe": RECIPE,
        "package": PACKAGE,
        "photos": [tuple(photo) for photo in photos],
        "train_tile": [TRAIN_TILE, TRAIN_STRIDE],
        "test_tile": TEST_TILE,
        "keep": [REGION_KEEP, TILE_KEEP],
    }

    def write(partial):
        wheel = fetch(PACKAGE, PACKAGE_SHA256, cache)
        sets = {"train": ([], []), "test": ([], [])}
        for split in sets:
            (partial / split).mkdir()
        num_trees = 0
        for done, photo in enumerate(photos, start=1):
            boxes = read_boxes(read_member(wheel, f"deepforest/data/{photo.name}.xml"))
            raw = np.frombuffer(read_member(wheel, f"deepforest/data/{photo.name}.png"), np.uint8)
            image = cv2.imdecode(raw, cv2.IMREAD_COLOR)
            height, width = image.shape[:2]
            regions = {"train": photo.train, "test": photo.test}
            for split, region in regions.items():
                if region is not None:
                    ends = (region[2] or width, region[3] or height)
                    regions[split] = (*region[:2], *ends)
            split_photo(boxes, **regions)  # raises if a crown touches both regions
            tree_ids = num_trees + np.arange(len(boxes))
            num_trees += len(boxes)
            for split, region in regions.items():
                if region is not None:
                    add_photo(partial, sets[split], split, photo, image, boxes, region, tree_ids)
            if progress:
                progress("photos", done, len(photos))

        trees = [{a["tree"] for a in annotations} for _, annotations in sets.values()]
        assert not trees[0] & trees[1], f"trees in both sets: {sorted(trees[0] & trees[1])}"
        summary = {}
        for split, (images, annotations) in sets.items():
            info = {"description": f"tree crowns, {split}", "attribution": ATTRIBUTION}
            coco = coco_dict(images, annotations, ["tree"], info)
            write_json(partial / f"{split}.json", coco)
            seen = {a["tree"] for a in annotations if not a["iscrowd"]}
            summary[split] = {**summarise(coco), "trees": len(seen)}
        return summary

    return build_folder(folder, options, write)
