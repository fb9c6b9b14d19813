#!/usr/bin/env python
"""Draws the split, gate, cosine and KL of distillation for each cell, and detections.

Example:
    tools/visualize.py --config-file configs/quickstart/digits_distilled.yaml \\
        --weights output/quickstart/distilled_seed0/model_final.pth \\
        --before output/quickstart/student_seed0/model_final.pth --count 4

Each picture shows an image. The first row has ground truth and detections. Each other row is a
level, with four maps:
- the object that owns each cell,
- the gate of each cell (MODEL.KD.FGBG.GATE),
- the cosine between the features of student and teacher,
- the background KL, times the gate if there is one.

The cosine needs adapters if the channels differ. A checkpoint without adapters, such as a plain
student, gets linear maps. They are fitted by least squares on 64 images of the training set.

--angle-and-kl FILE draws another picture instead, from all images: two feature vectors with
different directions, whose softmax has a small KL.

--detections FILE draws only ground truth and detections, all images in one picture.
"""

import argparse
import logging
import sys
from pathlib import Path

import _quiet
import cv2
from _arguments import add_import_flag
from tqdm import tqdm

from fgbg_kd.experiments.visualize import check_writable, path_of_its_own, visualize, write
from fgbg_kd.utils.errors import FgBgError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a config that distils"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of a student")
    parser.add_argument(
        "--before", default="", metavar="FILE", help="checkpoint of another student"
    )
    parser.add_argument(
        "--set", default="", metavar="NAME", help="a registered set; default: the test set"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image of the set; repeatable",
    )
    images.add_argument("--count", type=int, default=4, help="images, spread evenly over the set")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, default=Path("output/visualize"), metavar="FOLDER")
    where.add_argument("--show", action="store_true", help="show the pictures in a window")
    where.add_argument(
        "--angle-and-kl", type=Path, metavar="FILE", help="draw this picture instead"
    )
    where.add_argument(
        "--detections", type=Path, metavar="FILE", help="draw only detections, in one picture"
    )
    add_import_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    single = args.angle_and_kl or args.detections
    if not args.show:
        check_writable(single or args.output / "x.png")
    pictures = visualize(
        args.config_file,
        args.opts,
        args.weights,
        before=args.before,
        set_name=args.set,
        files=args.image,
        count=args.count,
        angle_and_kl=args.angle_and_kl,
        detections=args.detections,
        bar=lambda images, title: tqdm(images, desc=title, leave=False, disable=None),
    )
    written: set[Path] = set()
    for file, picture in pictures:
        if args.show:
            cv2.imshow("fgbg_kd: any key for the next, q to end", picture[:, :, ::-1])
            if cv2.waitKey() == ord("q"):
                return
            continue
        path = single or path_of_its_own(args.output, file, written)
        write(path, picture)
        written.add(path)
        tqdm.write(str(path))


if __name__ == "__main__":
    logging.getLogger("fgbg_kd").setLevel(logging.ERROR)
    try:
        main()
    except (FgBgError, ValueError, OSError) as error:
        _quiet.stop("visualize", error)
    except cv2.error as error:
        sys.exit(f"visualize: OpenCV cannot open a window: use --output ({error})")
