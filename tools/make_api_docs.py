#!/usr/bin/env python
"""Writes docs/api.md from the docstrings of what the package exports.

Example:
    tools/make_api_docs.py
    tools/make_api_docs.py --check     fails where the page is out of date
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

import _quiet  # noqa: F401

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MODULES = ("fgbg_kd", "fgbg_kd.methods", "fgbg_kd.ops", "fgbg_kd.engine", "fgbg_kd.deploy")
HEAD = (
    "# API\n\nMade from the docstrings by `tools/make_api_docs.py`: change those, not this page.\n"
)


def public(module) -> dict:
    """What a module exports: its __all__, or else what it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return {name: getattr(module, name) for name in sorted(names)}


def signature(thing) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    text = str(inspect.signature(thing))
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text)


def entry(name: str, thing, level: str = "###") -> list[str]:
    doc = inspect.getdoc(thing) or ""
    if not callable(thing):
        return []
    parts = [f"{level} {name}", f"```python\n{name.split('.')[-1]}{signature(thing)}\n```"]
    if inspect.isclass(thing):
        doc = inspect.cleandoc(thing.__doc__ or "")  # not an inherited one
        constructor = vars(thing).get("__init__")
        about = getattr(constructor, "__doc__", None)
        if about and not about.startswith("Initialize self"):
            doc += "\n\n" + inspect.cleandoc(about)
    parts.append(f"```text\n{doc.strip()}\n```")
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            if not key.startswith("_") and inspect.isfunction(value) and value.__doc__:
                parts += entry(f"{name}.{key}", value, level + "#")
    return parts


def page() -> str:
    parts, seen = [HEAD], set()
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"## {name}", f"```text\n{inspect.getdoc(module)}\n```"]
        for key, thing in public(module).items():
            if id(thing) not in seen:
                seen.add(id(thing))
                parts += entry(key, thing)
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        sys.exit("docs/api.md is out of date: run tools/make_api_docs.py")


if __name__ == "__main__":
    main()
