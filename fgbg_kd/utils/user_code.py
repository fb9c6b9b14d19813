"""Modules of the user that register methods, detectors, data sets or keys."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from .errors import ConfigError


def import_user_module(name: str) -> ModuleType:
    """Imports a module, once.

    Args:
        name: of a module that can be imported from the current folder or is installed; or the path
            of a .py file.

    Raises:
        ConfigError: there is no such module or file.
    """
    if not name.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise  # the module is there, and imports something that is not
            raise ConfigError(
                f"--import {name}: there is no such module. Give the path of its file, such as "
                f"{name.replace('.', '/')}.py."
            ) from None
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"--import {name}: there is no such file.")
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
