"""Reads YAML configs of any origin: they cannot run code, and errors name the key."""

import ast
import contextlib
import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from omegaconf import DictConfig, ListConfig, OmegaConf

from .errors import ConfigError

logger = logging.getLogger(__name__)

# The one of libyaml is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PATHS = (
    "OUTPUT_DIR",
    "DATASETS.TRAIN_JSON",
    "DATASETS.TRAIN_IMAGES",
    "DATASETS.TEST_JSON",
    "DATASETS.TEST_IMAGES",
    "DATASETS.UNLABELED",
    "MODEL.WEIGHTS",
    "MODEL.KD.TEACHER.CONFIG",
    "MODEL.KD.TEACHER.WEIGHTS",
    "MODEL.KD.UNLABELED.FILE",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.YOLO.CFG",
)
_PYTHON_PATHS = (
    "train.output_dir",
    "train.init_checkpoint",
    "train.unlabeled",
    "train.unlabeled_file",
    "model.teacher.config",
    "model.teacher.weights",
)


def merge_yaml(cfg: CN, filename: str) -> None:
    """``cfg.merge_from_file`` for a file of any origin: tags in its YAML cannot run code.

    Only files of Detectron2's model zoo, and unchanged copies of them, may contain such tags. For
    example, Base-RetinaNet.yaml computes its anchor sizes. A whole number is accepted where
    Detectron2 expects a float.

    Raises:
        ConfigError: the file does not exist, is not valid YAML, contains a tag that runs code, an
            unknown key, or a value of another type.
    """
    _merge(cfg, _HarmlessYaml.load_yaml_with_base(filename), filename)


def merge_overrides(cfg: CN, opts: Sequence[str]) -> None:
    """``cfg.merge_from_list`` with the checks of :func:`merge_yaml`.

    Args:
        opts: keys and values in turn, as on the command line: ["SOLVER.MAX_ITER", "9000"].

    Raises:
        ConfigError: an unknown key, a value of another type, or a key without a value.
    """
    for key in opts[::2]:
        if "=" in key:
            name, _, value = key.partition("=")
            raise ConfigError(
                f"command line: {key!r} is not a key. For a YAML config, put a space between key "
                f"and value: {name} {value}"
            )
    if len(opts) % 2:
        raise ConfigError(
            f"command line: the key {opts[-1]} has no value. Overrides are pairs of a key and a "
            "value, such as SOLVER.MAX_ITER 9000."
        )
    for key, value in zip(opts[::2], opts[1::2]):
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(cfg, value, "command line")


def expand_paths(cfg: CN | DictConfig, *, strict: bool = True) -> None:
    """Expands ``~`` and environment variables in all keys of a config that are paths, in place.

    Args:
        cfg: a YAML or a Python config, not frozen. URLs and names of the model zoo are unchanged.
        strict: False: a path with an unknown variable or user stays as it is.

    Raises:
        ConfigError: an environment variable, or the user after ``~``, does not exist.

    Example::

        cfg.OUTPUT_DIR = "~/runs/$USER"
        expand_paths(cfg)  # OUTPUT_DIR is now "/home/ann/runs/ann"
    """
    for key in _PATHS if isinstance(cfg, CN) else _PYTHON_PATHS:
        if isinstance(cfg, CN):
            *groups, name = key.split(".")
            node = cfg
            for group in groups:
                node = node.get(group, {})
            value = node.get(name)
            if isinstance(value, str):
                node[name] = _expanded(value, key, strict)
            elif isinstance(value, (tuple, list)):
                node[name] = type(value)(_expanded(str(x), key, strict) for x in value)
        else:
            value = OmegaConf.select(cfg, key)
            if isinstance(value, str):
                OmegaConf.update(cfg, key, _expanded(value, key, strict))
            elif isinstance(value, ListConfig):
                OmegaConf.update(cfg, key, [_expanded(str(x), key, strict) for x in value])


def _expanded(path: str, key: str, strict: bool) -> str:
    if "://" in path or os.path.exists(path):
        return path
    expanded = os.path.expandvars(os.path.expanduser(path))
    unknown = re.search(r"\$\{?\w+\}?|^~[^/]*", expanded)
    if unknown and not strict:
        return path
    if unknown:
        raise ConfigError(
            f"{key} is {path!r}, but {unknown[0]} is not known here: set this environment "
            "variable, or write the path in full."
        )
    return expanded


# Keys of Detectron2's main that v0.6 lacks, and their defaults.
_NEWER = {
    "DATALOADER.REPEAT_SQRT": True,
    "FLOAT32_PRECISION": "",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 50,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.NUM_DECAYS": 3,
    "SOLVER.RESCALE_INTERVAL": False,
}


class _HarmlessYaml(CN):
    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if filename.endswith(".py"):
            raise ConfigError(
                f"{filename} is a Python config; a YAML config (.yaml) is needed here."
            )
        try:  # Detectron2 calls this method again for every _BASE_
            with cls._open_cfg(filename) as file:
                node = yaml.compose(file, _LOADER)
                _refuse_python_dump(node, filename)
                _check_repeated_keys(node, filename)
            loaded = super().load_yaml_with_base(filename, allow_unsafe=_is_zoo_file(filename))
        except yaml.constructor.ConstructorError as error:
            raise ConfigError(
                f"{filename}, line {error.problem_mark.line + 1}: {error.problem}. Only the model "
                "zoo's own files may contain tags that run code: write the value itself."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{filename} is not a valid YAML file: {error}") from error
        except OSError as error:
            raise ConfigError(f"{filename} cannot be read: {error}") from error
        except (AttributeError, TypeError, AssertionError) as error:  # not a mapping, or a null
            raise _no_config(filename) from error
        except RecursionError:
            raise ConfigError(
                f"{filename}: its _BASE_ leads back to the file itself. Remove one _BASE_."
            ) from None
        if not isinstance(loaded, dict):
            raise _no_config(filename)
        return loaded


def _refuse_python_dump(node: yaml.Node | None, filename: str) -> None:
    """Refuses the config.yaml that Detectron2 writes for a training by a Python config."""
    keys = {str(k.value) for k, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    if {"model", "dataloader"} <= keys:
        raise ConfigError(
            f"{filename} was written by a training with a Python config. It cannot be read back "
            "without running code: give that Python config (.py) instead."
        )


def _check_repeated_keys(node: yaml.Node | None, filename: str) -> None:
    """PyYAML would silently keep only the last of two groups of the same name."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            nodes += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            nodes.append(value)
            name, line = str(key.value), key.start_mark.line + 1
            if name != "<<" and lines.setdefault(name, line) != line:
                raise ConfigError(
                    f"{filename}: the key {name} stands in line {lines[name]} and again in line "
                    f"{line}. Only one of the two would be used: put their values together."
                )


def _no_config(filename: str) -> ConfigError:
    return ConfigError(
        f"{filename} is not a config: write keys and values, such as SOLVER: {{MAX_ITER: 9000}}."
    )


def _merge(cfg: CN, new: dict, source: str) -> None:
    _check(cfg, new, source, "")
    try:
        cfg.merge_from_other_cfg(CN(new))
    except Exception as error:  # yacs raises several kinds
        raise ConfigError(f"{source}: {error}") from error


def _check(cfg: CN, new: dict, source: str, prefix: str) -> None:
    """Checks that every key of ``new`` is in ``cfg``. Makes whole numbers floats where needed.

    Keys of a newer Detectron2 are removed, so that v0.6 reads its config.yaml.
    """
    for key, value in list(new.items()):
        name = f"{prefix}{key}"
        if key not in cfg and name in _NEWER:
            if value != _NEWER[name]:
                logger.warning(f"{source}: this Detectron2 has no key {name}. It is left out.")
            del new[key]
            continue
        if key not in cfg:
            close = difflib.get_close_matches(str(key), cfg.keys(), n=1)
            hint = f": did you mean {prefix}{close[0]}?" if close else "."
            raise ConfigError(f"{source}: there is no key {name}{hint}")
        if name == "VERSION" and value != cfg.VERSION:
            raise ConfigError(
                f"{source} has VERSION {value}; VERSION {cfg.VERSION} is needed: convert it with "
                "detectron2.config.upgrade_config."
            )
        if isinstance(cfg[key], CN) != isinstance(value, dict):
            kind = "a group of keys" if isinstance(cfg[key], CN) else "one value, not a group"
            raise ConfigError(f"{source}: {name} is {kind}.")
        if isinstance(value, dict):
            _check(cfg[key], value, source, f"{name}.")
        elif isinstance(cfg[key], float) and re.fullmatch(r"[+-]?\d+", str(value)):
            new[key] = float(value)
        else:
            new[key] = _as(cfg[key], value, name, source)


def _as(default, value, name: str, source: str):
    """A value that yacs takes for a key with this default: yacs reads the text "2024" as a number.

    Raises:
        ConfigError: one value where several are needed, a float where a whole number is needed, or
            a number or a date where text is needed.
    """
    read = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            read = ast.literal_eval(value)
    if isinstance(default, (tuple, list)) and isinstance(read, (str, int, float)):
        raise ConfigError(
            f"{source}: {name} takes several values, and {read!r} is one: write ({read!r},) with "
            "the comma."
        )
    if type(default) is int and isinstance(read, float):
        hint = f": write {read:.0f}." if read.is_integer() else "."
        raise ConfigError(f"{source}: {name} is a whole number, and {value} is a float{hint}")
    if not isinstance(default, str) or read is None or isinstance(read, (str, tuple, list)):
        return value
    if isinstance(value, str):  # of the command line, or in quotes: it is kept as it was written
        return repr(value)
    raise ConfigError(
        f"{source}: {name} is text, and YAML reads {value} as a {type(value).__name__}: put it in "
        f'quotes, such as "{value}".'
    )


def _is_zoo_file(filename: str) -> bool:
    """Whether a file is in the model zoo, or a copy of such a file. Line endings may differ."""
    path, zoo = Path(filename), Path(model_zoo.__file__).parent / "configs"
    return path.is_file() and any(
        _unix_lines(path) == _unix_lines(file) for file in zoo.rglob(path.name)
    )


def _unix_lines(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")
