"""Runs a detector on images, folders and videos. Draws detections and writes COCO's JSON."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from ..data.classes import match_categories
from ..data.images import IMAGE_SUFFIXES, files_below, has_frames, read_image
from ..data.validation import read_coco
from ..utils.errors import DataError, DeployError
from .run import coco_results, detect, draw, open_detector

_GREY_ONLY = {".pbm", ".pgm"}  # OpenCV writes no colours into these


class Summary(NamedTuple):
    """Counts of :func:`predict`. A frame of a video counts as an image."""

    images: int
    detections: int


def predict(
    detector: str,
    inputs: list[Path],
    *,
    weights: str = "",
    output: Path | None = None,
    results: Path | None = None,
    ids: Path | None = None,
    score: float = 0.5,
    device: str = "",
    say: Callable[[str], None] = print,
    progress: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Runs a detector on files and writes its detections.

    Args:
        detector: name.onnx, name.xml, name.pt, or a YAML config.
        inputs: images, videos, and folders of images.
        weights: checkpoint for a config.
        output: folder for images and videos with drawn detections. None: nothing is drawn.
        results: JSON file for COCO's results. None: it is not written.
        ids: COCO file that gives the ids of images and categories in ``results``.
        score: detections with a lower score are left out.
        device: for a config, see :func:`open_detector`.
        say: is called with each warning.
        progress: is called with a line of text after each image.

    Raises:
        DataError: some inputs could not be read (all others are processed). Or the file of ``ids``
            is damaged or has other classes (no input is processed).
        DeployError, ConfigError, CheckpointError: no input is processed, or a file cannot be
            written.
    """
    if not 0 <= score <= 1:
        raise DeployError(f"--score is {score:g}: give a number from 0 to 1, such as 0.5.")
    found = find(inputs, say)
    drawn_to = targets(found, output) if output else {}
    written = [*drawn_to.values(), *filter(None, [results])]
    files = [Path(x) for x in (detector, weights, ids) if x and os.path.isfile(x)]
    check_not_overwritten([*found.values(), *files], written)
    model, about = open_detector(detector, weights, bool(results), device)
    image_ids, category_ids = {}, [c["id"] for c in about["categories"]]
    if ids:
        content = read_coco(str(ids), training=False)
        image_ids = image_ids_in(ids, content, found)
        category_ids = category_ids_in(ids, content, about)
    _warn_if_below_detector(score, about["suppression"]["score"], say)
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    if results:
        results.open("a").close()  # fails early if it cannot be written
    run = _Run(model, about, score, category_ids if results else None, drawn_to, say, progress)
    try:
        unread = run.all(found, image_ids)
    finally:  # after a damaged file or Ctrl-C, earlier detections are kept
        if results:
            results.write_text(json.dumps(run.rows))
    if unread:
        raise DataError(f"{unread} of {len(found)} inputs could not be read, see above.")
    return Summary(run.images, run.detections)


def _warn_if_below_detector(score: float, lowest: float, say: Callable[[str], None]) -> None:
    if score < lowest:
        say(
            f"--score {score:g}: the detector itself leaves out scores of {lowest:g} and less. For "
            "more detections, lower SCORE_THRESH_TEST in its config and export it again."
        )


class _Run:
    """The state of one call of :func:`predict`."""

    def __init__(self, model, about, score, category_ids, drawn_to, say, progress):
        self.model, self.about, self.score = model, about, score
        self.category_ids, self.drawn_to = category_ids, drawn_to
        self.say, self.progress = say, progress
        self.rows: list[dict] = []
        self.images = self.detections = 0

    def all(self, inputs: dict[Path, Path], ids: dict[Path, int]) -> int:
        """Processes the inputs of :func:`find`. Returns how many could not be read."""
        unread = 0
        for place, file in inputs.items():
            try:
                if is_image(file):
                    self.image(file, place, ids.get(place, place.as_posix()))
                else:
                    self.video(file, place)
            except DataError as error:
                unread += 1
                self.say(str(error))
        return unread

    def see(self, image: np.ndarray, image_id: int | str) -> np.ndarray | None:
        """(H, W, 3) RGB -> the picture with its detections, BGR; None: nothing is drawn."""
        found = detect(self.model, self.about, image, self.score)
        if self.category_ids is not None:
            self.rows += coco_results(found, self.category_ids, image_id)
        self.images, self.detections = self.images + 1, self.detections + len(found)
        return draw(found, self.about, image)[:, :, ::-1] if self.drawn_to else None

    def image(self, file: Path, place: Path, image_id: int | str) -> None:
        try:
            pixels = read_image(str(file), "RGB")
            with Image.open(file) as opened:
                if has_frames(opened):
                    self.say(f"{file} has several frames or pages: only the first one is used.")
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        try:
            drawn = self.see(pixels, image_id)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        if drawn is not None and not cv2.imwrite(str(self.drawn_to[place]), drawn):
            raise DeployError(f"{self.drawn_to[place]} cannot be written.")
        self.progress(f"{self.images} images, {self.detections} detections: {file}")

    def video(self, file: Path, place: Path) -> None:
        video, writer, number = Video(file), None, -1
        try:
            for number, frame in enumerate(video):
                drawn = self.see(frame, f"{place.as_posix()}:{number}")
                if drawn is not None:
                    height, width = drawn.shape[:2]
                    writer = writer or video.writer(self.drawn_to[place], (width, height))
                    writer.write(drawn)
                self.progress(f"{file}: frame {number + 1} of {video.count}")
        finally:
            if writer:
                writer.release()
        if number < 0:
            raise DataError(f"{file}: none of its frames can be read.")
        if number + 1 < video.count:
            self.say(
                f"{file}: its header counts {video.count} frames, but only {number + 1} could be "
                "read."
            )


def find(paths: list[Path], say: Callable[[str], None] = print) -> dict[Path, Path]:
    """Finds the images and videos in a list of files and folders.

    Hidden files of a folder (".DS_Store", "._photo.jpg" of macOS) are left out.

    Args:
        say: gets a line about other files of a folder that are left out.

    Returns:
        The file for each place in the output. The place is the file's name, or its path relative to
        the given folder.

    Raises:
        DeployError: a path does not exist, a folder has no image, or two files have the same place.
    """
    found = {}
    for path in paths:
        if not path.exists():
            stream = re.match(r"\w+:/", str(path)) or str(path).isdecimal()
            hint = " Cameras and URLs are not read: save the video or image to a file first."
            raise DeployError(f"{path}: there is no such file or folder.{hint * bool(stream)}")
        inside = images_in(path, say) if path.is_dir() else [path]
        for file in inside:
            place = file.relative_to(path if path.is_dir() else path.parent)
            if place in found:
                raise DeployError(
                    f"{found[place]} and {file} would both be written to {place}: give "
                    "the folder above them."
                )
            found[place] = file
    return found


def images_in(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """The images below a folder, also behind symbolic links to folders, in alphabetical order.

    Raises:
        DeployError: there are none.
    """
    images, others = [], []
    for path in files_below(folder):
        (images if path.is_file() and is_image(path) else others).append(path)
    if others:
        shown = ", ".join(str(p.relative_to(folder)) for p in sorted(others)[:3])
        say(
            f"{folder}: {len(others)} files are left out, because they are no images: {shown}"
            f"{', ...' * (len(others) > 3)}. Give a video by its own name."
        )
    if not images:
        raise DeployError(f"{folder}: there is no image in this folder.")
    return sorted(images)


def targets(inputs: dict[Path, Path], output: Path) -> dict[Path, Path]:
    """The output file for each place.

    An image keeps its name, but a format in which OpenCV writes no colours becomes PNG. A video
    becomes MP4.
    """
    found = {}
    for place, file in inputs.items():
        if not is_image(file):
            place_drawn = place.with_suffix(".mp4")
        elif cv2.haveImageWriter(place.name) and place.suffix.lower() not in _GREY_ONLY:
            place_drawn = place
        else:
            place_drawn = place.with_suffix(".png")
        found[place] = output / place_drawn
    return found


def check_not_overwritten(inputs: list[Path], written: list[Path]) -> None:
    """
    Raises:
        DeployError: an output file is also an input, or would be written twice.
    """
    sources, seen = {file.resolve() for file in inputs}, set()
    for path in (p.resolve() for p in written):
        if path in sources:
            raise DeployError(f"{path} is an input: give another --output or --json.")
        if path in seen:
            raise DeployError(f"{path} would be written twice: give only one of its inputs.")
        seen.add(path)


def image_ids_in(file: Path, content: dict, inputs: dict[Path, Path]) -> dict[Path, int]:
    """The image ids of all inputs in a COCO file. Its file_name must be the input's place.

    Raises:
        DeployError: an input is not in the file.
    """
    known = {image["file_name"]: image["id"] for image in content["images"]}
    for place in inputs:
        if place.as_posix() not in known:
            raise DeployError(f"{file} has no image with the file_name {place.as_posix()}.")
    return {place: known[place.as_posix()] for place in inputs}


def category_ids_in(file: Path, content: dict, about: dict) -> list[int]:
    """The category ids of the detector's classes in a COCO file, matched by name.

    Returns:
        The ids in the order of the class numbers.

    Raises:
        DataError: the names differ.
    """
    classes = [c["name"] for c in about["categories"]]
    numbers = match_categories(classes, content["categories"], str(file))
    ids = {number: category_id for category_id, number in numbers.items()}
    return [ids[number] for number in range(len(classes))]


def is_image(path: Path) -> bool:
    """Whether a file is read as an image. Otherwise it is read as a video."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with Image.open(path) as image:
            return image.format != "MPEG"  # Pillow opens MPEG videos, but cannot read a frame
    except Exception:  # not an image, or not readable
        return False


class Video:
    """Frames of a video, (H, W, 3) RGB, and a writer for a similar video.

    Raises:
        DataError: OpenCV cannot open it.
    """

    def __init__(self, path: Path):
        self.capture = cv2.VideoCapture(str(path))
        if not self.capture.isOpened():
            raise DataError(
                f"{path} is neither an image nor a video that OpenCV reads: give an image "
                f"({', '.join(sorted(IMAGE_SUFFIXES))} and others that Pillow reads) or a video, "
                "such as .mp4. Save a page of a PDF as an image first."
            )
        self.count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            there, frame = self.capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def writer(self, path: Path, size: tuple[int, int]) -> cv2.VideoWriter:
        """An MP4 of (width, height) with the same frame rate.

        Raises:
            DeployError: OpenCV cannot write it.
        """
        rate = self.capture.get(cv2.CAP_PROP_FPS) or 25
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        if not writer.isOpened():
            raise DeployError(f"{path} cannot be written: OpenCV cannot open an MP4 file there.")
        return writer
