"""Errors of Detectron2 while it builds from a config become errors that name the key."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError, FgBgError


@contextlib.contextmanager
def explained(cfg: CfgNode | DictConfig, part: str = "model") -> Iterator[None]:
    """Turns errors of the block into ConfigErrors.

    Args:
        cfg: of the run. A level that does not exist is found in its lists of names.
        part: what is built, for the message.

    Raises:
        ConfigError: the block raises an error that is not one of this package.
    """
    try:
        yield
    except FgBgError:
        raise
    except (KeyError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            _unknown_level(cfg, error)
            or f"The {part} cannot be built from this config ({type(error).__name__}: {error}). "
            "--traceback shows where."
        ) from error


def _unknown_level(cfg: CfgNode | DictConfig, error: Exception) -> str | None:
    """The message for a KeyError of a level that IN_FEATURES or OUT_FEATURES names."""
    if not isinstance(error, KeyError) or not error.args:
        return None
    level = error.args[0]
    node = cfg if isinstance(cfg, CfgNode) else OmegaConf.to_container(cfg, resolve=False)
    keys = [key for key, names in _lists(node) if level in names]
    if not keys:
        return None
    return (
        f"{' or '.join(keys)} names {level!r}, which the network does not give. A backbone gives "
        "the maps of its OUT_FEATURES (of res2 to res5). An FPN of res3 to res5 gives p3 to p5, "
        "and p6 and p7 if it has a top block for them."
    )


def _lists(node: Any, prefix: str = "") -> Iterator[tuple[str, list]]:
    """The keys that end with "features", and their names."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if isinstance(value, (list, tuple)) and str(key).lower().endswith("features"):
            yield f"{prefix}{key}", list(value)
        yield from _lists(value, f"{prefix}{key}.")
