"""Files that are there whole or not at all, and files known by their sha256."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that shall be there whole, as it was before, or not at all.

    It takes the place of ``path`` at the end; after an error it is removed. Two processes that
    write the same file do not meet: the last one's stays.
    """
    partial = path.with_name(f".{path.stem}.partial{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text by :func:`whole`."""
    with whole(path) as partial:
        partial.write_text(text)


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON; says which file.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of JSON lines (metrics.json, results.jsonl); [] where there is none.

    A last row that is torn, since it is being written or its writer was killed, is left out.

    Raises:
        ValueError: another row is no JSON.
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
    """Adds a row to a file of JSON lines; a torn one before it is removed."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        write_whole(path, "".join(f"{json.dumps(r)}\n" for r in read_rows(path)))
    with open(path, "a") as file:
        file.write(f"{json.dumps(row)}\n")


def sha256_of_text(text: str) -> str:
    """Hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """Hex digits of a file's sha256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
