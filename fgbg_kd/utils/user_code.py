"""Imports a user's own Python module, which registers methods, detectors or config keys."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from .errors import ConfigError


def import_user_module(name: str) -> ModuleType:
    """Imports a module once. This runs the module's code: use only code that you trust.

    The folder of a .py file is added to ``sys.path``. So the file can import other files in its
    folder, and data loading processes can import the file.

    Args:
        name: a dotted module name ("my_package.l1"), or the path of a .py file
            ("~/distil/l1.py"), which is imported under the name of the file ("l1").

    Raises:
        ConfigError: there is no such module, another module has its name, or it raises an error
            during the import.

    Example::

        import_user_module("my_methods/l1.py")  # registers the method L1
    """
    if name.endswith(".py"):
        return _import_file(Path(name).expanduser().resolve(), name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"--import {name!r} is neither a module name such as my_package.my_module nor the path "
            "of a .py file."
        )
    return _import(name, name)


def _import_file(path: Path, given: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"--import {given}: there is no such file.")
    if not path.stem.isidentifier():
        raise ConfigError(
            f"--import {given}: {path.stem!r} cannot be the name of a module. Use only "
            "letters, digits and underscores in the name of the file."
        )
    folder = str(path.parent)
    if folder not in sys.path:
        # At the end, so that a file such as random.py hides no installed module from others.
        sys.path.append(folder)
    module = _import(path.stem, given)
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != path:
        raise ConfigError(
            f"--import {given}: the name {path.stem} belongs to another module "
            f"({file or 'built into Python'}). Rename the file."
        )
    return module


def _import(module: str, given: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(
                f"--import {given}: Python finds no module {error.name}. Give the path of a .py "
                "file, or install the package that contains the module."
            ) from error
        raise _failed(given, error) from error
    except Exception as error:  # the user's code can raise anything
        raise _failed(given, error) from error


def _failed(given: str, error: Exception) -> ConfigError:
    trace, line = error.__traceback__, ""
    while trace is not None:  # the last place that is not in importlib
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen"):
            line = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return ConfigError(
        f"--import {given}: the module raised {type(error).__name__}: {error}{line}. Fix the "
        "module; --traceback shows where the error was raised."
    )
