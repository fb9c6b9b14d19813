"""Packages that only some users need. Each belongs to an extra of setup.py."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from .errors import FgBgError


def need(name: str, extra: str, error: type[FgBgError]) -> ModuleType:
    """Imports a package of an extra.

    Args:
        error: its kind if the package is not installed.

    Raises:
        FgBgError: the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError as reason:
        raise error(
            f"The package {name} is not installed. Install it in the folder of fgbg_kd: "
            f"{sys.executable} -m pip install -e '.[{extra}]'"
        ) from reason


def installed(*names: str) -> bool:
    """Whether all of these packages are installed."""
    try:
        return all(version(name) for name in names)
    except PackageNotFoundError:
        return False
