"""Tree crowns: aerial photos with hand-drawn boxes, cut into a train and a test set (COCO format).

The photos are NEON imagery as shipped in the package deepforest. A photo is divided by region: a
strip as wide as its widest crown lies between train and test, so no crown touches both. Regions
are then cut into tiles, because decoding a 17 MB photo for every crop would dominate training.

Rules for a box that a border cuts:
- region border: clipped if at least half of its area is inside, else not labelled;
- train tile: clipped if at least 40 % of it is inside, else not labelled (the tile beside it,
  half a tile further, shows it whole);
- test tile: counted once, in the tile that shows most of it, if that is at least 40 %; every other
  piece of a crown is a region to ignore (iscrowd 1), so finding it is neither right nor wrong.
"""

import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import cv2
import numpy as np

from .packages import CACHE, build_folder, coco_dict, fetch, read_member, summarise, write_json

RECIPE = 1  # raise it when the same options make other pixels or boxes

PACKAGE = "deepforest==2.1.0"
PACKAGE_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
ATTRIBUTION = (
    "Imagery: National Ecological Observatory Network (NEON), CC0 at the time of the package "
    "(February 2026); boxes: DeepForest (Weinstein et al.), MIT licence"
)

REGION_KEEP = 0.5
TILE_KEEP = 0.4
TRAIN_TILE, TRAIN_STRIDE = 400, 200
TEST_TILE = 256


class Photo(NamedTuple):
    name: str  # of the .png and .xml inside the package
    train: tuple  # x0, y0, x1, y1 in pixels; None stands for the photo's own border
    test: tuple


# The smallest photo is too small to divide and serves training only.
PHOTOS = (
    Photo("2019_YELL_2_528000_4978000_image_crop2", (0, 0, None, 1590), (0, 1704, None, None)),
    Photo("2019_YELL_2_541000_4977000_image_crop", (0, 360, None, None), (0, 0, None, 256)),
    Photo("OSBS_029", (0, 0, None, None), None),
)

# To choose options without the test set: the training regions above, of which the lower third of
# the first becomes the test set.
TUNING_PHOTOS = (
    PHOTOS[0]._replace(train=(0, 0, None, 950), test=(0, 1064, None, 1590)),
    *(photo._replace(test=None) for photo in PHOTOS[1:]),
)


def read_boxes(xml):
    """Boxes (N, 4) x0 y0 x1 y1 of a Pascal VOC file, in its order."""
    tags = ("xmin", "ymin", "xmax", "ymax")
    found = ElementTree.fromstring(xml).iter("bndbox")
    boxes = [[float(box.find(tag).text) for tag in tags] for box in found]
    return np.array(boxes, np.float64).reshape(-1, 4)


def clip(boxes, region):
    """Boxes cut at the region's border, and the share of each box's area inside, (N,)."""
    low, high = region[:2] * 2, region[2:] * 2
    inside = boxes.clip(low, high)
    return inside, area(inside) / area(boxes)


def area(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def split_photo(boxes, train, test):
    """Clipped boxes and their original indices for both regions; no box may be in both.

    Returns {"train": (boxes, index), "test": ...}; a box that only touches a region is in neither.
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
    """Starts of overlapping tiles that cover start..stop; the last one is shifted inwards."""
    last = max(start, stop - tile)
    return sorted({min(at, last) for at in range(start, last + stride, stride)})


def train_tiles(region):
    x0, y0, x1, y1 = region
    return [
        (x, y, min(x + TRAIN_TILE, x1), min(y + TRAIN_TILE, y1))
        for y in sliding(y0, y1, TRAIN_TILE, TRAIN_STRIDE)
        for x in sliding(x0, x1, TRAIN_TILE, TRAIN_STRIDE)
    ]


def test_tiles(region):
    """Equal tiles of about 256 pixels: they cover the region and do not overlap."""
    x0, y0, x1, y1 = region
    xs = np.linspace(x0, x1, max(1, round((x1 - x0) / TEST_TILE)) + 1).round().astype(int).tolist()
    ys = np.linspace(y0, y1, max(1, round((y1 - y0) / TEST_TILE)) + 1).round().astype(int).tolist()
    rows, columns = zip(ys[:-1], ys[1:], strict=True), list(zip(xs[:-1], xs[1:], strict=True))
    return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]


test_tiles.__test__ = False  # not a test, whatever its name makes pytest think


def label_tiles(boxes, tiles, once):
    """Per tile: clipped boxes (K, 4), their indices (K,), and whether to ignore each (K,).

    once=False (train): every tile labels what it shows enough of. once=True (test): a box counts in
    the tile that shows most of it; its other pieces are to be ignored.
    """
    clipped = [clip(boxes, tile) for tile in tiles]
    shares = np.array([share for _, share in clipped]).reshape(len(tiles), len(boxes))
    counted = shares >= TILE_KEEP
    if once and len(boxes):
        best = shares.argmax(0)  # the first of equals
        counted &= np.arange(len(tiles))[:, None] == best
    labelled = []
    for row, (inside, share) in enumerate(clipped):
        index = np.flatnonzero((share > 0) if once else counted[row])
        labelled.append((inside[index], index, ~counted[row][index]))
    return labelled


def add_photo(folder, coco, split, photo, image, boxes, region, tree_ids):
    """Write one region's tiles to folder/split and append them to the COCO lists."""
    images, annotations = coco
    tiles = train_tiles(region) if split == "train" else test_tiles(region)
    if split == "test":  # crowns that a region's border cuts more than in half are there to ignore
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
                    "tree": int(tree),  # the same crown has the same number in every tile
                }
            )


def build_trees(folder, *, photos=PHOTOS, cache=CACHE, progress=None):
    """Make the tree crowns under `folder`; (meta, was_built), see packages.build_folder."""
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
            split_photo(boxes, **regions)  # asserts that no crown touches both regions
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
