#!/usr/bin/env python
"""Runs a detector on images, folders and videos. Draws the detections, or writes COCO's JSON.

Examples:
    tools/predict.py student.onnx photo.jpg folder/ film.mp4 --output predictions
    tools/predict.py student.int8.xml folder/
    tools/predict.py student.pt val2017/ --json results.json --ids val2017.json --score 0.05
    tools/predict.py my_student.yaml --weights output/distilled/model_final.pth photo.jpg

DETECTOR is a file from tools/export.py, or a YAML config with --weights.

In the JSON, the id of an image is its file name, or its path relative to the given folder
("more/1.png"). The id of a frame is "film.mp4:FRAME". With --ids, the ids come from the COCO file.
The file_name of its images must be this name or path. Its categories are matched by name.

Inputs that cannot be read are reported and skipped. The exit status is then 1.
"""

import argparse
import sys
from pathlib import Path

import _quiet
from _arguments import add_import_flag

from fgbg_kd import deploy
from fgbg_kd.utils.errors import FgBgError


class Terminal:
    """Shows progress in one line on a terminal. Elsewhere, progress is not printed."""

    live = sys.stderr.isatty()

    def progress(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "detector", metavar="DETECTOR", help="name.onnx, name.xml, name.pt or config.yaml"
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="an image, a video or a folder"
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="checkpoint for a config")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for drawn detections; default: predictions, or none with --json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write COCO's results to it")
    parser.add_argument(
        "--ids", type=Path, metavar="FILE", help="COCO file that gives the ids for --json"
    )
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score that is kept; default: %(default)s"
    )
    parser.add_argument(
        "--device", default="", help="for a config, such as cpu; default: the GPU, if there is one"
    )
    add_import_flag(parser)
    args = parser.parse_args()
    if args.ids and not args.json:
        parser.error("--ids needs --json")
    output = args.output or (None if args.json else Path("predictions"))
    terminal = Terminal()
    found = deploy.predict(
        args.detector,
        args.inputs,
        weights=args.weights,
        output=output,
        results=args.json,
        ids=args.ids,
        score=args.score,
        device=args.device,
        say=lambda text: terminal.say(f"predict: {text}"),
        progress=terminal.progress,
    )
    places = " and ".join(str(p) for p in (output, args.json) if p)
    terminal.say(f"{found.images} images, {found.detections} detections: {places}")


if __name__ == "__main__":
    try:
        main()
    except (FgBgError, OSError) as error:
        _quiet.stop("predict", error)
