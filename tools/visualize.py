#!/usr/bin/env python
"""Draws what distillation sees: split, gate, cosine and KL cell by cell, and detections.

Example:
    tools/visualize.py --config-file configs/quickstart/digits_distilled.yaml \\
        --weights output/quickstart/distilled_seed0/model_final.pth \\
        --before output/quickstart/student_seed0/model_final.pth --count 4

A picture an image: ground truth and detections above; below, per level, which object owns each
cell, where the teacher is good enough to learn from (MODEL.KD.GATE_MARGIN), the cosine of the
student's and the teacher's features (before and after), and the background KL that enters the
loss. A checkpoint without adapters, such as a plain student's, gets some for the cosine where it
needs them: linear maps, fitted by least squares on 64 images of the training set.

With --observation FILE it draws instead, of all these images and the student of --weights, two
real feature vectors that softmax and KL take for nearly the same, though they point elsewhere.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import _quiet  # noqa: F401
import cv2
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from tqdm import tqdm

from fgbg_kd import FgBgDistiller
from fgbg_kd.detectors.load import without_pretrained
from fgbg_kd.engine import build_lazy, load_config, load_lazy_config
from fgbg_kd.experiments.angle_and_kl import collect, draw_observation
from fgbg_kd.experiments.cost import pick
from fgbg_kd.experiments.drawing import cell_maps, confident, draw_panels, load_student

FITTED_ON = 64  # images for the adapters of a student that has none


def open_distiller(config: str, opts: list[str]):
    """The distiller of a YAML or Python config, augmentations and channel order of its test input,
    and the names of a training and a test set."""
    if config.endswith(".py"):
        cfg = load_lazy_config(config, opts)
        model, data = build_lazy(cfg).to(cfg.train.device), cfg.dataloader
        mapper = data.test.mapper
        test = instantiate(mapper.augmentations), mapper.image_format
        sets = [data[part].dataset.names for part in ("train", "test")]
    else:
        cfg = load_config(config, opts)
        model = build_model(without_pretrained(cfg))
        test = build_augmentation(cfg, False), cfg.INPUT.FORMAT
        sets = [cfg.DATASETS.TRAIN, cfg.DATASETS.TEST]
    if not isinstance(model, FgBgDistiller) or model.teacher is None:
        raise ValueError(f"{config} does not distil: give a config with a teacher.")
    return model.eval(), *test, *((s,) if isinstance(s, str) else tuple(s) for s in sets)


def named(records: list[dict], files: list[str], set_name: str) -> list[dict]:
    """The images of a set by their paths, or by their file names."""
    found = []
    for file in files:
        path = Path(file).resolve()
        same = [r for r in records if Path(r["file_name"]).resolve() == path]
        same = same or [r for r in records if Path(r["file_name"]).name == file]
        if not same:
            raise ValueError(f"{file} is no image of the set {set_name}, with its ground truth.")
        found.append(same[0])
    return found


def visualize(args) -> None:
    for path in filter(None, (args.weights, args.before)):
        if "://" not in path and not Path(path).is_file():
            raise ValueError(f"{path}: there is no such checkpoint.")
    if not args.show:
        check_writable(args.observation or args.output / "x.png")
    distiller, augmentations, order, train, test = open_distiller(args.config_file, args.opts)
    if not args.set and not test:
        raise ValueError("DATASETS.TEST names no set: give one with --set.")
    name = args.set or test[0]
    if name not in DatasetCatalog.list():
        raise ValueError(f"There is no set {name!r}; this config has {', '.join(train + test)}.")
    mapper = DatasetMapper(True, augmentations=augmentations, image_format=order)
    records = DatasetCatalog.get(name)
    records = named(records, args.image, name) if args.image else pick(records, args.count)
    classes = MetadataCatalog.get(name).get("thing_classes")

    def training():
        if not train:
            raise ValueError("No adapters can be fitted: DATASETS.TRAIN names no set.")
        images = pick(DatasetCatalog.get(train[0]), FITTED_ON)
        for record in tqdm(images, desc="fitting adapters", leave=False, disable=None):
            yield mapper(record)

    names = ("before", "after") if args.before else ("student",)
    students = {}
    for role, weights in zip(names, filter(None, (args.before, args.weights))):
        adapters = load_student(distiller, weights, training())
        students[role] = distiller.student, distiller.kd, adapters
    if args.observation:
        bar = tqdm(records, desc="collecting vectors", leave=False, disable=None)
        vectors = collect(distiller, (mapper(r) for r in bar), adapters)
        number = vectors.place[vectors.most_telling()][0]
        picture = draw_observation(distiller, vectors, mapper(records[number]))
        write(args.observation, picture)
        return
    drawn: set[Path] = set()
    for record in tqdm(records, desc="drawing", leave=False, disable=None):
        inputs = mapper(record)
        maps, found = {}, {"teacher": confident(distiller.teacher, inputs, order)}
        for role, (distiller.student, distiller.kd, adapters) in students.items():
            maps[role] = cell_maps(distiller, inputs, adapters)
            found[role] = confident(distiller.student, inputs, order)
        picture = draw_panels(inputs, order, maps, found, classes, Path(record["file_name"]).name)
        if args.show:
            cv2.imshow("fgbg_kd: any key for the next, q to end", picture[:, :, ::-1])
            if cv2.waitKey() == ord("q"):
                return
        else:
            path = path_of_its_own(args.output, record["file_name"], drawn)
            write(path, picture)
            drawn.add(path)


def path_of_its_own(folder: Path, file: str, taken: set[Path]) -> Path:
    """Images of a set can have one name in several folders: the second gets a number."""
    stem, number = Path(file).stem, 1
    path = folder / f"{stem}.png"
    while path in taken:
        number += 1
        path = folder / f"{stem}_{number}.png"
    return path


def check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if not cv2.haveImageWriter(str(path)):
        raise ValueError(f"{path} cannot be written: give a name that ends in .png or .jpg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written there.")


def write(path: Path, picture) -> None:
    if not cv2.imwrite(str(path), picture[:, :, ::-1]):
        raise ValueError(f"{path} cannot be written.")
    tqdm.write(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="one that distils")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of a student")
    parser.add_argument("--before", metavar="FILE", help="another, such as a plain student's")
    parser.add_argument("--set", metavar="NAME", help="a registered set; default: the test set")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--image", action="append", metavar="FILE", help="of the set; repeatable")
    images.add_argument("--count", type=int, default=4, help="images, spread evenly over the set")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, default=Path("output/visualize"), metavar="FOLDER")
    where.add_argument("--show", action="store_true", help="in a window")
    where.add_argument("--observation", type=Path, metavar="FILE", help="see above")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count: at least 1")
    visualize(args)


if __name__ == "__main__":
    logging.getLogger("fgbg_kd").setLevel(logging.ERROR)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"visualize: {error}")
    except cv2.error as error:
        sys.exit(f"visualize: OpenCV has no window here, use --output ({error})")
