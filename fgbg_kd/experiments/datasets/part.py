"""A small labelled part of a set, and the other photos without labels."""

import shutil
from pathlib import Path

from ...data.groups import split
from ...data.validation import read_coco
from ...utils.files import sha256_of
from .packages import build_folder, summarise, write_json

RECIPE = 1  # increase it when the same file gives another part


def build_part(folder, annotations, images, share, seed=0):
    """Makes a folder with train.json, the labelled part, and the other photos in ``unlabeled``.

    The part is drawn at random. Photos whose names differ only in a number at the end stay
    together, as in :func:`fgbg_kd.data.groups.split`.

    Args:
        folder: path of the folder.
        annotations: a COCO file.
        images: the folder of its images. train.json names them as the COCO file does.
        share: of the images that stay labelled, between 0 and 1.
        seed: the same seed gives the same part.

    Returns:
        The content of meta.json, and whether the folder was made by this call.

    Raises:
        DataError: the file is not valid COCO format, or cannot be split.
        FileExistsError: see :func:`.packages.build_folder`.
    """
    content = read_coco(str(annotations), training=True)

    def write(partial):
        rest, part, _ = split(content, str(annotations), seed, share)
        write_json(partial / "train.json", part)
        for image in rest["images"]:
            place = partial / "unlabeled" / image["file_name"]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(images, image["file_name"]), place)
        return {"train": summarise(part), "unlabeled": {"images": len(rest["images"])}}

    options = {"recipe": RECIPE, "of": sha256_of(annotations), "share": share, "seed": seed}
    return build_folder(folder, options, write)
