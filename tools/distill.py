#!/usr/bin/env python
"""Makes a fast detector from a slow one: finds a student, trains it with its teacher, exports it.

Examples:
    tools/distill.py --teacher my_retinanet.yaml model_final.pth --train train.json photos/ \\
        --test test.json photos/ --speedup 3
    tools/distill.py --teacher my_retinanet.yaml model_final.pth --train VOC2007 --dry-run

The student is the largest of a list of light detectors that is fast enough on this machine. All of
them are measured. --dry-run only shows this table.

The folder of --output then holds student.yaml and distilled.yaml, the trainings, student.onnx,
comparison.jpg and report.html. Ctrl-C stops a training. The same command continues it.
"""

import argparse
import logging
import sys
from pathlib import Path

import _quiet
from _arguments import add_import_flag

from fgbg_kd.one_command import distill
from fgbg_kd.utils.errors import FgBgError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher",
        nargs="+",
        required=True,
        metavar=("CONFIG", "WEIGHTS"),
        help="your detector: its config and its checkpoint, or a name of Detectron2's model zoo",
    )
    parser.add_argument(
        "--train",
        nargs="+",
        required=True,
        metavar=("FILE", "IMAGES"),
        help="COCO file and folder of images; or a folder of PASCAL VOC; or data.yaml of YOLO",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=(),
        metavar=("FILE", "IMAGES"),
        help="default: the test part of VOC or YOLO data; else a fifth of --train, by groups of "
        "images",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=(),
        metavar="NAME",
        help="the names of the teacher's classes, in its order; default: those of its data set",
    )
    parser.add_argument(
        "--unlabeled",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="folders of photos without annotations, on which the student learns from the teacher",
    )
    wish = parser.add_argument_group("how fast the student must be")
    wish.add_argument(
        "--speedup", type=float, metavar="X", help="at least X times as fast as the teacher"
    )
    wish.add_argument("--latency", type=float, metavar="MS", help="at most MS ms per image")
    wish.add_argument("--parameters", type=float, metavar="M", help="at most M million parameters")
    wish.add_argument("--student", default="", metavar="NAME", help="a timm model or a YAML config")
    wish.add_argument(
        "--runtime",
        choices=("pytorch", "onnx"),
        default="pytorch",
        help="where the speed is measured; default: %(default)s",
    )
    wish.add_argument("--device", default="", help="cpu or cuda; default: cuda if there is one")
    training = parser.add_argument_group("the training")
    training.add_argument("--hours", type=float, default=0.0, help="for all trainings together")
    training.add_argument("--iterations", type=int, default=0, metavar="N", help="of each training")
    training.add_argument(
        "--backbone-weights",
        default="",
        metavar="FILE",
        help="a state dict of the student's timm model, or random; default: timm's own weights",
    )
    training.add_argument("--compare", action="store_true", help="also train without the teacher")
    training.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="per training; default: %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="only measure and show the table")
    parser.add_argument(
        "--configs-only", action="store_true", help="write the configs and train nothing"
    )
    parser.add_argument("--output", type=Path, default=Path("output/distill"), metavar="FOLDER")
    add_import_flag(parser)
    args = vars(parser.parse_args())
    imports = args.pop("imports")
    for name in ("teacher", "train", "test"):
        if len(args[name]) > 2:
            parser.error(f"--{name}: give one or two values")
    distill(**args, imports=imports, say=lambda text: print(text, flush=True))


class Once(logging.Handler):
    """Prints each warning once, because later steps repeat some checks."""

    said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.said:
            print(f"warning: {text}", file=sys.stderr)
        self.said.add(text)


if __name__ == "__main__":
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    logging.getLogger("fgbg_kd").addHandler(Once(logging.WARNING))
    logging.getLogger("fgbg_kd").propagate = False
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: give the same command again to continue")
    except (FgBgError, OSError, ValueError) as error:
        _quiet.stop("distill", error)
