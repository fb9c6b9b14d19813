#!/usr/bin/env python
"""Runs a detector on images, folders and videos; draws what it finds, or writes COCO's JSON.

Examples:
    tools/predict.py student.onnx photo.jpg folder/ film.mp4 --output predictions
    tools/predict.py student.pt val2017/ --json results.json --ids val2017.json --score 0.05
    tools/predict.py my_student.yaml --weights output/distilled/model_final.pth photo.jpg

A detector is a file of tools/export.py, or a YAML config with --weights. In the JSON an image's id
is its name or, of one in a folder that is given, its path from there ("more/1.png"); a frame's is
"film.mp4:FRAME". With --ids it is the id in that COCO file, whose file_name is that path.

What cannot be read is named and left out, and the exit status is not 0.
"""

import argparse
import json
import sys
from pathlib import Path

import _quiet  # noqa: F401
import cv2

from fgbg_kd import deploy
from fgbg_kd.data.validation import read_coco
from fgbg_kd.utils.errors import CheckpointError, ConfigError, DataError

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Unreadable(deploy.DeployError):
    """An input that is damaged, or no image and no video."""


def find(paths: list[Path]) -> dict[Path, Path]:
    """Images, videos, and the images of folders, by their place in the output."""
    found = {}
    for path in paths:
        if not path.exists():
            raise deploy.DeployError(f"{path}: there is no such file or folder.")
        inside = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and is_image(p)]
        for file in inside:
            place = file.relative_to(path if path.is_dir() else path.parent)
            if place in found:
                raise deploy.DeployError(
                    f"{found[place]} and {file} would both be {place}: give the folder above them."
                )
            found[place] = file
    return found


def targets(inputs: dict[Path, Path], output: Path) -> dict[Path, Path]:
    """Where each place is drawn: an image, or the MP4 of a video."""
    return {
        place: output / (place if is_image(file) else place.with_suffix(".mp4"))
        for place, file in inputs.items()
    }


def check_not_overwritten(inputs: dict[Path, Path], written: list[Path]) -> None:
    """Nothing that is read, or written before, is written over."""
    sources, seen = {file.resolve() for file in inputs.values()}, set()
    for path in (p.resolve() for p in written):
        if path in sources:
            raise deploy.DeployError(f"{path} is an input: give another --output or --json.")
        if path in seen:
            raise deploy.DeployError(f"{path} would be written twice: give one of its inputs.")
        seen.add(path)


def ids_in(file: Path, inputs: dict[Path, Path]) -> dict[Path, int]:
    """The ids that a COCO file gives to images, all of them."""
    content = read_coco(str(file), training=False)
    known = {image["file_name"]: image["id"] for image in content["images"]}
    for place in inputs:
        if place.as_posix() not in known:
            raise deploy.DeployError(f"{file} has no image with the file_name {place.as_posix()}.")
    return {place: known[place.as_posix()] for place in inputs}


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES or cv2.haveImageReader(str(path))


class Video:
    """Frames of a video, RGB, and a writer for one like it."""

    def __init__(self, path: Path):
        self.capture = cv2.VideoCapture(str(path))
        if not self.capture.isOpened():
            raise Unreadable(f"{path} is neither an image nor a video that OpenCV reads.")
        self.count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def __iter__(self):
        while True:
            there, frame = self.capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def writer(self, path: Path, size: tuple[int, int]) -> cv2.VideoWriter:
        rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise deploy.DeployError(f"{path} cannot be written: OpenCV opens no MP4 there.")
        return writer


def progress(text: str, end: bool = False) -> None:
    """A line that overwrites itself on a terminal; only the last one elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if end else "", file=sys.stderr, flush=True)
    elif end:
        print(text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("detector", metavar="DETECTOR", help="name.onnx, name.pt or config.yaml")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    parser.add_argument("--weights", default="", metavar="FILE", help="of a config")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: predictions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write that; draw with --output")
    parser.add_argument("--ids", type=Path, metavar="FILE", help="of COCO, for --json; see above")
    parser.add_argument("--score", type=float, default=0.5, help="at least; default: %(default)s")
    args = parser.parse_args()
    if args.ids and not args.json:
        parser.error("--ids is for --json")
    output = args.output or (None if args.json else Path("predictions"))

    inputs = find(args.inputs)
    drawn_to = targets(inputs, output) if output else {}
    written = [*drawn_to.values(), *filter(None, [args.json])]
    check_not_overwritten(inputs, written)
    ids = ids_in(args.ids, inputs) if args.ids else {}
    model, about = deploy.open_detector(args.detector, args.weights, need_ids=bool(args.json))
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        args.json.open("a").close()  # shows whether it can be written
    rows, images, detections, unread = [], 0, 0, 0

    def see(image, image_id):
        """The picture with what is in it, if it is wanted, BGR."""
        nonlocal images, detections
        found = deploy.detect(model, about, image, args.score)
        rows.extend(deploy.coco_results(found, about, image_id) if args.json else [])
        images, detections = images + 1, detections + len(found)
        return deploy.draw(found, about, image)[:, :, ::-1] if output else None

    def see_image(file, place):
        image = cv2.imread(str(file))
        if image is None:
            raise Unreadable(f"{file} is a damaged image.")
        drawn = see(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), ids.get(place, place.as_posix()))
        if output and not cv2.imwrite(str(drawn_to[place]), drawn):
            raise deploy.DeployError(f"{drawn_to[place]} cannot be written.")
        progress(f"{images} images, {detections} detections: {file}")

    def see_video(file, place):
        video, writer, number = Video(file), None, -1
        try:
            for number, frame in enumerate(video):
                drawn = see(frame, f"{place}:{number}")
                if output:
                    height, width = drawn.shape[:2]
                    writer = writer or video.writer(drawn_to[place], (width, height))
                    writer.write(drawn)
                progress(f"{file}: frame {number + 1} of {video.count}")
        finally:
            if writer:
                writer.release()
        if number < 0:
            raise Unreadable(f"{file}: no frame of it can be read.")
        if number + 1 < video.count:
            text = f"only {number + 1} of the {video.count} frames that its header counts were read"
            progress(f"predict: {file}: {text}", end=True)

    try:
        for place, file in inputs.items():
            try:
                (see_image if is_image(file) else see_video)(file, place)
            except Unreadable as error:
                unread += 1
                progress(f"predict: {error}", end=True)
    finally:  # a damaged file or Ctrl-C does not lose what was found before
        if args.json:
            args.json.write_text(json.dumps(rows))
    places = " and ".join(str(p) for p in (output, args.json) if p)
    progress(f"{images} images, {detections} detections: {places}", end=True)
    if unread:
        raise Unreadable(f"{unread} of {len(inputs)} inputs could not be read, see above.")


if __name__ == "__main__":
    try:
        main()
    except (deploy.DeployError, CheckpointError, ConfigError, DataError, OSError) as error:
        sys.exit(f"predict: {error}")
