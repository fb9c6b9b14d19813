"""Reading configs of any origin: YAML that cannot run code, errors that name the key."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN

from .errors import ConfigError


def merge_yaml(cfg: CN, filename: str) -> None:
    """``cfg.merge_from_file`` for a file of any origin: its YAML tags cannot run code.

    Only the model zoo's own files may: Base-RetinaNet.yaml computes its anchors. A copy counts as
    the zoo's file as long as nothing in it is changed. A whole number will do where Detectron2
    wants a float.

    Raises:
        ConfigError: no such file, no valid YAML, a tag that runs code, an unknown key, a value of
            another type.
    """
    _merge(cfg, _HarmlessYaml.load_yaml_with_base(filename), filename)


def merge_overrides(cfg: CN, opts: Sequence[str]) -> None:
    """``cfg.merge_from_list``, the KEY VALUE pairs of the command line, likewise.

    Raises:
        ConfigError: an unknown key, a value of another type, a key without a value.
    """
    if len(opts) % 2:
        raise ConfigError(f"{' '.join(opts)}: KEY VALUE pairs, but one is missing.")
    for key, value in zip(opts[::2], opts[1::2]):
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(cfg, value, "command line")


class _HarmlessYaml(CN):
    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        try:  # comes back here for every _BASE_
            loaded = super().load_yaml_with_base(filename, allow_unsafe=_is_zoos(filename))
        except yaml.constructor.ConstructorError as error:
            raise ConfigError(
                f"{filename}, line {error.problem_mark.line + 1}: {error.problem}. Tags that run "
                "code are for the model zoo's own files: write the value itself."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{filename} is no YAML file: {error}") from error
        except OSError as error:
            raise ConfigError(f"{filename} cannot be read: {error}") from error
        except (AttributeError, TypeError, AssertionError) as error:  # no mapping, or a null in it
            raise ConfigError(f"{filename} is no config, KEY: VALUE and so on: {error}") from error
        except RecursionError:
            raise ConfigError(f"{filename}: _BASE_ leads back to itself.") from None
        if not isinstance(loaded, dict):
            raise ConfigError(f"{filename} is no config, KEY: VALUE and so on.")
        return loaded


def _merge(cfg: CN, new: dict, source: str) -> None:
    _check(cfg, new, source, "")
    try:
        cfg.merge_from_other_cfg(CN(new))
    except Exception as error:  # yacs raises several kinds
        raise ConfigError(f"{source}: {error}") from error


def _check(cfg: CN, new: dict, source: str, prefix: str) -> None:
    """Every key of `new` is in `cfg`; whole numbers become floats where that is meant."""
    for key, value in new.items():
        name = f"{prefix}{key}"
        if key not in cfg:
            close = difflib.get_close_matches(str(key), cfg.keys(), n=1)
            hint = f": is {prefix}{close[0]} meant?" if close else "."
            raise ConfigError(f"{source}: there is no key {name}{hint}")
        if name == "VERSION" and value != cfg.VERSION:
            raise ConfigError(
                f"{source} is of VERSION {value}, this is {cfg.VERSION}: convert it by "
                "detectron2.config.upgrade_config."
            )
        if isinstance(cfg[key], CN) != isinstance(value, dict):
            kind = "a group of keys" if isinstance(cfg[key], CN) else "a value, no group of keys"
            raise ConfigError(f"{source}: {name} is {kind}.")
        if isinstance(value, dict):
            _check(cfg[key], value, source, f"{name}.")
        elif isinstance(cfg[key], float) and re.fullmatch(r"[+-]?\d+", str(value)):
            new[key] = float(value)


def _is_zoos(filename: str) -> bool:
    path, zoo = Path(filename), Path(model_zoo.__file__).parent / "configs"
    return path.is_file() and any(
        path.read_bytes() == file.read_bytes() for file in zoo.rglob(path.name)
    )
