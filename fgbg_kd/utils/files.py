"""Files that are written whole or not at all, files of JSON lines, and checksums."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: str | Path, partial: str | Path | None = None) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames the written file to ``path`` at the end.

    So ``path`` never holds an incomplete file, even after a kill or a power failure. After an error
    the temporary file is removed, and the previous file at ``path`` is unchanged.

    Args:
        path: path of the complete file.
        partial: the temporary path, in the same folder. By default its name contains the process
            id. Two processes can then write the same file, and the last write counts. If only one
            process writes, give a fixed name. The next write then reuses the temporary file that a
            killed process leaves.

    Example::

        with whole("model.onnx") as partial:
            torch.onnx.export(model, inputs, partial)
    """
    path = Path(path)
    partial = Path(partial or path.with_name(f".{path.stem}.partial{os.getpid()}{path.suffix}"))
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
        _to_disk(path.parent)  # the new name
    finally:
        with contextlib.suppress(OSError):  # usually it is renamed already
            partial.unlink()


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file with :func:`whole`."""
    with whole(path) as partial:
        partial.write_text(text)


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        ValueError: the file is not JSON. The message names the file.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON Lines file (metrics.json, results.jsonl); [] if there is no file.

    An incomplete last row is left out. Another process may be writing it, or was killed.

    Raises:
        ValueError: a row before the last row is not JSON.
    """
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged: {error}") from None
    return rows


def add_row(path: Path, row: dict) -> None:
    """Appends a row to a JSON Lines file. An incomplete last row is removed first."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        write_whole(path, "".join(f"{json.dumps(r)}\n" for r in read_rows(path)))
    with open(path, "a") as file:
        file.write(f"{json.dumps(row)}\n")


def sha256_of_text(text: str) -> str:
    """The sha256 of a text, as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """A digest of the paths, sizes and times of files. Their content is not read."""
    facts = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    return sha256_of_text(json.dumps(facts))
