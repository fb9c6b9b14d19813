"""Importing a user's own module, which registers methods, detectors, config keys or data."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import ConfigError


def import_user_module(name: str) -> ModuleType:
    """Imports a module by its name, or by the path of its .py file.

    Raises:
        ConfigError: there is no such module.
    """
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--import {name}: there is no such module ({error}). Give a module that Python "
                "finds, or the path of a .py file."
            ) from error
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"--import {name}: there is no such file.")
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[path.stem]
