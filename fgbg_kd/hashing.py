"""Which file it is: downloads, checkpoints and made data are known by their sha256."""

import hashlib
from pathlib import Path


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
