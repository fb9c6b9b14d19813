"""Finds and checks photos without annotations. Photos of the labelled sets are left out."""

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..utils.errors import ConfigError, DataError
from ..utils.files import digest_of_files, sha256_of
from .image_files import Header, read_header
from .images import IMAGE_SUFFIXES, files_below, too_narrow

logger = logging.getLogger(__name__)


def find_photos(
    folders: Sequence[str],
    training: Iterable[dict] = (),
    tests: Iterable[dict] = (),
    longest: int = 0,
) -> list[dict]:
    """The photos in folders and their subfolders. Hidden files are skipped.

    A photo is left out if a file of a labelled set has the same content. A warning counts these
    photos.

    Args:
        folders: paths of folders.
        training, tests: Detectron2's dataset dicts of the labelled sets.
        longest: largest side of an image in training, in pixels. 0: not known.

    Returns:
        Dicts with "file_name" (absolute), "height" and "width" in pixels, sorted by file name.

    Raises:
        ConfigError: there is no such folder.
        DataError: a folder has no photos, a photo cannot be used, or none is left.
    """
    paths = [path for folder in folders for path in _photos_in(folder)]
    paths = sorted(dict.fromkeys(paths))
    with ThreadPoolExecutor(16) as pool:
        headers = dict(zip(paths, pool.map(read_header, paths)))
    _refuse_faults(headers, longest)
    for records, what in ((training, "training"), (tests, "test")):
        same = _with_content_of(paths, [r["file_name"] for r in records])
        if same:
            logger.warning(
                f"{len(same)} of {len(paths)} photos of DATASETS.UNLABELED are also in the {what} "
                f"set (the same content), such as {min(same)}. They are left out."
            )
        paths = [p for p in paths if p not in same]
    if not paths:
        raise DataError(
            f"DATASETS.UNLABELED {tuple(folders)}: all photos are in the training or test set. "
            "Name a folder with others, or set DATASETS.UNLABELED ()."
        )
    sizes = {path: headers[path].size for path in paths}
    return [{"file_name": p, "width": sizes[p][0], "height": sizes[p][1]} for p in paths]


def digest_of_photos(folders: Sequence[str]) -> str:
    """A digest of the paths, sizes and times of all files in folders and their subfolders."""
    found = (path for folder in folders for path in files_below(folder))
    return digest_of_files(sorted(path for path in found if path.is_file()))


def _photos_in(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        raise ConfigError(
            f"DATASETS.UNLABELED names {folder!r}: there is no such folder. Correct the path."
        )
    found = [
        os.path.abspath(path)
        for path in files_below(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not found:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(
            f"DATASETS.UNLABELED: {folder} has no photos. The name of a photo must end in {known}. "
            "Name another folder."
        )
    return found


def _refuse_faults(headers: dict[str, Header], longest: int) -> None:
    faults = [(path, header.fault) for path, header in headers.items() if header.fault]
    faults += [
        (path, f"it is too narrow: at INPUT.MAX_SIZE_TRAIN {longest}, no pixel is left across")
        for path, header in headers.items()
        if longest and not header.fault and too_narrow(*header.size, longest)
    ]
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{len(faults)} of {len(headers)} photos of DATASETS.UNLABELED cannot be used:\n  "
            + "\n  ".join(f"{path}: {fault}" for path, fault in faults[:5])
            + f"{more}\nRemove these files from the folder, or replace them."
        )


def _with_content_of(paths: Sequence[str], others: Iterable[str]) -> set[str]:
    """The paths whose files have the same content as one of the other files."""
    others = [x for x in others if os.path.isfile(x)]
    sizes, other_sizes = ({x: os.path.getsize(x) for x in files} for files in (paths, others))
    possible = set(sizes.values()) & set(other_sizes.values())  # only these files are read
    paths, others = (
        [x for x, size in files.items() if size in possible] for files in (sizes, other_sizes)
    )
    with ThreadPoolExecutor(4) as pool:  # hashing does not hold Python's lock
        contents = set(pool.map(sha256_of, others))
        return {x for x, content in zip(paths, pool.map(sha256_of, paths)) if content in contents}
