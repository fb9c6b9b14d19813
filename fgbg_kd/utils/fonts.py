"""Makes names in pictures readable, in any script for which a font is installed."""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger(__name__)


@contextmanager
def readable(names: Sequence[str]) -> Iterator[list[str]]:
    """Context in which Matplotlib can draw the given names.

    By default, Matplotlib draws Chinese names as squares.

    Yields:
        The names. A name that no installed font can draw is replaced by its index, such as
        "class 3".
        A dollar sign is escaped: Matplotlib would take the text between two of them for a formula.

    Example::

        with readable(["猫", "dog"]) as names:
            Visualizer(...)
    """
    names = [str(name) for name in names]
    families, undrawable = _fonts_for(frozenset("".join(names)))
    replaced = [f"class {i}" if undrawable & set(name) else name for i, name in enumerate(names)]
    replaced = [name.replace("$", r"\$") for name in replaced]
    with matplotlib.rc_context({"font.sans-serif": families}):
        yield replaced


@functools.lru_cache
def _fonts_for(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    """Font families that together draw the characters, and the characters that no font has."""
    usual = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    missing = set(characters) - _drawn_by(usual, characters)
    fonts = {f.name: f.fname for f in font_manager.fontManager.ttflist}
    # Matplotlib's font Last Resort claims all characters, but draws frames with their numbers.
    fonts = {name: file for name, file in fonts.items() if not name.startswith("Last Resort")}
    added = []
    while missing:
        found = {name: _drawn_by(file, missing) for name, file in fonts.items()}
        best = max(found, key=lambda name: len(found[name]), default="")
        if not best or not found[best]:
            logger.warning(
                f"No installed font has the characters {''.join(sorted(missing))}. Classes with "
                "these characters are shown by their index. Install a font, such as the package "
                "fonts-noto-cjk."
            )
            break
        added.append(best)
        missing -= found[best]
    # Matplotlib searches the families in this order for each character.
    first = font_manager.FontProperties(fname=usual).get_name()
    return [first, *added], missing


def _drawn_by(file: str, characters: frozenset[str] | set[str]) -> set[str]:
    try:
        known = FT2Font(file).get_charmap()
    except (RuntimeError, OSError):  # a font that FreeType cannot read
        return set()
    return {c for c in characters if ord(c) in known or c.isspace()}
