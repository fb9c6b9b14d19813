#!/usr/bin/env python
"""Runs a detector on images, folders and videos; draws what it finds, or writes COCO's JSON.

Examples:
    tools/predict.py student.onnx photo.jpg folder/ film.mp4 --output predictions
    tools/predict.py student.pt folder/ --json results.json --score 0.05
    tools/predict.py my_student.yaml --weights output/distilled/model_final.pth photo.jpg

A detector is a file of tools/export.py, or a YAML config with --weights. In the JSON an image's id
is the number that its file is named by (000000000139.jpg), or else the file's name; of a video it
is "film.mp4:FRAME".
"""

import argparse
import json
import sys
from pathlib import Path

import _quiet  # noqa: F401
import cv2

from fgbg_kd import deploy
from fgbg_kd.checkpoint import CheckpointError
from fgbg_kd.config_files import ConfigError


def files(paths: list[Path]):
    """Images and videos, and the images of folders, each with its place in the output."""
    for path in paths:
        if not path.exists():
            raise deploy.DeployError(f"{path}: there is no such file or folder.")
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and is_image(p))
            yield from ((p, p.relative_to(path)) for p in inside)
        else:
            yield path, Path(path.name)


def target(output: Path, path: Path, place: Path) -> Path:
    """Where an image, or the MP4 of a video, is drawn."""
    return output / place if is_image(path) else output / f"{path.stem}.mp4"


def check_not_overwritten(
    inputs: list[tuple[Path, Path]], output: Path | None, results: Path | None
) -> None:
    """Nothing that is read is written over."""
    sources = {path.resolve() for path, _ in inputs}
    targets = [target(output, *pair) for pair in inputs] if output else []
    for path in [*targets, *([results] if results else [])]:
        if path.resolve() in sources:
            raise deploy.DeployError(f"{path} is an input: give another --output or --json.")


def is_image(path: Path) -> bool:
    return cv2.haveImageReader(str(path))


class Video:
    """Frames of a video, RGB, and a writer for one like it."""

    def __init__(self, path: Path):
        self.capture = cv2.VideoCapture(str(path))
        if not self.capture.isOpened():
            raise deploy.DeployError(f"{path} is neither an image nor a video that OpenCV reads.")
        self.count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def __iter__(self):
        while True:
            there, frame = self.capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def writer(self, path: Path, size: tuple[int, int]) -> cv2.VideoWriter:
        rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        return cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)


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
    parser.add_argument("--score", type=float, default=0.5, help="at least; default: %(default)s")
    args = parser.parse_args()
    output = args.output or (None if args.json else Path("predictions"))

    inputs = list(files(args.inputs))
    check_not_overwritten(inputs, output, args.json)
    model, about = deploy.open_detector(args.detector, args.weights)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    rows, images, detections = [], 0, 0

    def see(image, image_id):
        """The picture with what is in it, if it is wanted, BGR."""
        nonlocal images, detections
        found = deploy.detect(model, about, image, args.score)
        rows.extend(deploy.coco_results(found, about, image_id) if args.json else [])
        images, detections = images + 1, detections + len(found)
        return deploy.draw(found, about, image)[:, :, ::-1] if output else None

    try:
        for path, place in inputs:
            if is_image(path):
                image = cv2.imread(str(path))
                if image is None:
                    raise deploy.DeployError(f"{path} is a damaged image.")
                drawn = see(
                    cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
                    int(path.stem) if path.stem.isdigit() else path.name,
                )
                if output:
                    drawn_to = target(output, path, place)
                    drawn_to.parent.mkdir(parents=True, exist_ok=True)
                    if not cv2.imwrite(str(drawn_to), drawn):
                        raise deploy.DeployError(f"{drawn_to} cannot be written.")
                progress(f"{images} images, {detections} detections: {path}")
                continue
            video, writer = Video(path), None
            for number, frame in enumerate(video):
                drawn = see(frame, f"{path.name}:{number}")
                if output:
                    size = drawn.shape[1], drawn.shape[0]
                    writer = writer or video.writer(target(output, path, place), size)
                    writer.write(drawn)
                progress(f"{path}: frame {number + 1} of {video.count}")
            if writer:
                writer.release()
    finally:  # a damaged file or Ctrl-C does not lose what was found before
        if args.json:
            args.json.write_text(json.dumps(rows))
    places = " and ".join(str(p) for p in (output, args.json) if p)
    progress(f"{images} images, {detections} detections: {places}", end=True)


if __name__ == "__main__":
    try:
        main()
    except (deploy.DeployError, CheckpointError, ConfigError) as error:
        sys.exit(f"predict: {error}")
