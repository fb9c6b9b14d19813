"""Pictures of distillation for the images of a registered set, written to files."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model

from ..data import NamingMapper
from ..data.images import pick
from ..detectors.load import without_pretrained
from ..distiller import FgBgDistiller
from ..engine import build_lazy, load_config, load_lazy_config
from ..matching import dense_student
from ..utils.errors import ConfigError, DataError, FgBgError
from .angle_and_kl import collect, draw_angle_and_kl
from .cell_maps import cell_maps, load_student
from .drawing import confident, confident_teacher, draw_panels
from .side_by_side import draw_row

_FITTED_ON = 64  # number of images to fit the adapters of a student without adapters

Bar = Callable[[Sequence, str], Iterable]  # gets images and a title, returns them with progress


class Opened(NamedTuple):
    """The parts of a config that distils, for pictures.

    Attributes:
        distiller: the distiller in eval mode.
        mapper: reads an image as for testing, with ground truth.
        training, test: names of the sets.
    """

    distiller: FgBgDistiller
    mapper: NamingMapper
    training: tuple[str, ...]
    test: tuple[str, ...]


def open_distiller(config: str, opts: Sequence[str] = ()) -> Opened:
    """Builds the distiller of a YAML or Python config.

    Raises:
        ConfigError: the config does not distil.
    """
    if config.endswith(".py"):
        cfg = load_lazy_config(config, list(opts))
        model, data = build_lazy(cfg).to(cfg.train.device), cfg.dataloader
        of = data.test.mapper
        augmentations, order = instantiate(of.augmentations), of.image_format
        sets = [data[part].dataset.names for part in ("train", "test")]
    else:
        cfg = load_config(config, list(opts))
        model = build_model(without_pretrained(cfg))
        augmentations, order = build_augmentation(cfg, False), cfg.INPUT.FORMAT
        sets = [cfg.DATASETS.TRAIN, cfg.DATASETS.TEST]
    if not isinstance(model, FgBgDistiller) or model.teacher is None:
        raise ConfigError(f"{config} does not distil: give a config with a teacher.")
    mapper = NamingMapper(True, augmentations=augmentations, image_format=order)
    return Opened(model.eval(), mapper, *((s,) if isinstance(s, str) else tuple(s) for s in sets))


class Students:
    """Students from checkpoints, by name, that share a distiller.

    Args:
        opened: the distiller and its sets.
        weights: {name: path of the checkpoint}.
        bar: shows progress.
        maps: whether maps are drawn. Only maps need adapters.

    Raises:
        CheckpointError: a checkpoint does not fit.
        ConfigError: adapters are needed, and DATASETS.TRAIN is empty.
    """

    def __init__(self, opened: Opened, weights: dict[str, str], bar: Bar, maps: bool = True):
        self.opened = opened
        self._parts = {}
        for name, path in weights.items():
            training = self._training(bar) if maps else None
            adapters = load_student(opened.distiller, path, training)
            self._parts[name] = opened.distiller.student, opened.distiller.method, adapters

    def _training(self, bar: Bar) -> Iterator[dict]:
        if not self.opened.training:
            raise ConfigError("No adapters can be fitted: DATASETS.TRAIN is empty. Name a set.")
        records = pick(DatasetCatalog.get(self.opened.training[0]), _FITTED_ON)
        for record in bar(records, "fitting adapters"):
            yield self.opened.mapper(record)

    def __iter__(self):
        """Puts each student into the distiller, and yields its name and adapters."""
        distiller = self.opened.distiller
        for name, (distiller.student, distiller.method, adapters) in self._parts.items():
            yield name, adapters


def draw_images(
    opened: Opened, students: Students, records: Sequence[dict], classes: Sequence[str] | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Draws the panels of each image. Yields its file name and (H, W, 3) uint8 RGB."""
    distiller, order = opened.distiller, opened.mapper.image_format
    for record in records:
        (inputs,) = dense_student(distiller.student).as_seen([opened.mapper(record)])
        maps, found = {}, confident_teacher(distiller, inputs, order)
        for name, adapters in students:
            maps[name] = cell_maps(distiller, inputs, adapters)
            found[name] = confident(distiller.student, inputs, order)
        title = Path(record["file_name"]).name
        yield record["file_name"], draw_panels(inputs, order, maps, found, classes, title)


def draw_detections(
    opened: Opened, students: Students, records: Iterable[dict], classes: Sequence[str] | None
) -> np.ndarray:
    """Draws ground truth, teacher and students in a row of panels for each image.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    distiller, order, rows = opened.distiller, opened.mapper.image_format, []
    for record in records:
        inputs = opened.mapper(record)
        found = confident_teacher(distiller, inputs, order)
        found |= {name: confident(distiller.student, inputs, order) for name, _ in students}
        height, width = inputs["image"].shape[-2:]
        for instances in found.values():
            instances.pred_boxes.scale(inputs["width"] / width, inputs["height"] / height)
        rows.append(draw_row(record, found, classes))
    return np.vstack(rows)[:, :, ::-1]


def draw_angle(opened: Opened, students: Students, records: Sequence[dict], bar: Bar):
    """Draws the picture of :func:`draw_angle_and_kl` for the last student: (H, W, 3) uint8 RGB."""
    *_, (_, adapters) = students
    images = (opened.mapper(r) for r in bar(records, "collecting vectors"))
    vectors = collect(opened.distiller, images, adapters)
    number = vectors.place[vectors.most_telling()][0]
    inputs = dense_student(opened.distiller.student).as_seen([opened.mapper(records[number])])
    return draw_angle_and_kl(opened.distiller, vectors, inputs[0])


def visualize(
    config: str,
    opts: Sequence[str],
    weights: str,
    *,
    before: str = "",
    set_name: str = "",
    files: Sequence[str] = (),
    count: int = 4,
    angle_and_kl: Path | None = None,
    detections: Path | None = None,
    bar: Bar = lambda images, title: images,
) -> Iterator[tuple[str, np.ndarray]]:
    """Draws a picture of each image, or a single picture for all images.

    Args:
        config: path of a config that distils.
        opts: overrides of the config.
        weights: checkpoint of a student.
        before: checkpoint of another student, drawn beside the first; "": no other student.
        set_name: a registered set; "": the first test set of the config.
        files: paths or names of images in the set; empty: ``count`` images, spread evenly.
        count: number of images if ``files`` is empty.
        angle_and_kl: path for the picture of angle and KL. It is drawn instead of the others. None:
            it is not drawn.
        detections: path for a picture with the detections in all images. It is drawn instead of the
            others. None: it is not drawn.
        bar: shows progress.

    Yields:
        The path of the image (or of the single picture), and the picture (H, W, 3) uint8 RGB.

    Raises:
        FgBgError: a file is missing, or the config, the set or a checkpoint does not fit.
    """
    for path in filter(None, (weights, before)):
        if "://" not in path and not Path(path).is_file():
            raise FgBgError(f"{path}: there is no such checkpoint: check the path.")
    opened = open_distiller(config, opts)
    if not set_name and not opened.test:
        raise DataError("DATASETS.TEST names no set: give one with --set.")
    name = set_name or opened.test[0]
    if name not in DatasetCatalog.list():
        known = ", ".join(opened.training + opened.test)
        raise DataError(f"There is no set {name!r}: choose from {known}, the sets of this config.")
    records = DatasetCatalog.get(name)
    records = named(records, files, name) if files else pick(records, count)
    shown = {"before": before, "after": weights} if before else {"student": weights}
    students = Students(opened, shown, bar, maps=not detections)
    if angle_and_kl:
        yield str(angle_and_kl), draw_angle(opened, students, records, bar)
        return
    classes, records = MetadataCatalog.get(name).get("thing_classes"), bar(records, "drawing")
    if detections:
        yield str(detections), draw_detections(opened, students, records, classes)
        return
    yield from draw_images(opened, students, records, classes)


def named(records: Sequence[dict], files: Sequence[str], set_name: str) -> list[dict]:
    """The images of a set with some paths or file names.

    Raises:
        DataError: a file is not in the set.
    """
    found = []
    for file in files:
        path = Path(file).resolve()
        same = [r for r in records if Path(r["file_name"]).resolve() == path]
        same = same or [r for r in records if Path(r["file_name"]).name == file]
        if not same:
            raise DataError(
                f"{file} is not in the set {set_name}: give an image of this set, or --set."
            )
        found.append(same[0])
    return found


def path_of_its_own(folder: Path, file: str, taken: set[Path]) -> Path:
    """A path in a folder with the name of an image. A number is added if the path is taken."""
    stem, number = Path(file).stem, 1
    path = folder / f"{stem}.png"
    while path in taken:
        number += 1
        path = folder / f"{stem}_{number}.png"
    return path


def check_writable(path: Path) -> None:
    """Checks that a picture can be written to a path, and makes its folder.

    Raises:
        FgBgError: the picture cannot be written.
        OSError: the folder cannot be made.
    """
    if not cv2.haveImageWriter(str(path)):
        raise FgBgError(f"{path} cannot be written: give a name that ends in .png or .jpg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise FgBgError(f"{path} cannot be written: choose another path.")


def write(path: Path, picture: np.ndarray) -> None:
    """Writes a picture, (H, W, 3) uint8 RGB.

    Raises:
        FgBgError: the file cannot be written.
    """
    if not cv2.imwrite(str(path), picture[:, :, ::-1]):
        raise FgBgError(f"{path} cannot be written: check its folder and the free disk space.")
