"""What the result of a run depends on: its config, and the contents of the files that it names."""

import json
import os
from pathlib import Path

from .config import get_fgbg_kd_cfg
from .detector import find_config
from .hashing import sha256_of, sha256_of_text
from .methods import METHOD_REGISTRY, FgBg

# Keys that name a file whose content is a part of a run's settings.
_FILES = (
    "DATASETS.TRAIN_JSON",
    "DATASETS.TEST_JSON",
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.KD.TEACHER.CONFIG",
)
_CONTENT = "sha256 of "
# What runs did before there was a key for it, where that is not its default.
_BEFORE = {"MODEL.KD.GATE_QUALITY": "box"}
# What a comparison sets itself, run by run.
COUNTED = ("SEED", "OUTPUT_DIR", "TEST.EVAL_PERIOD")


def settings_of(cfg, reads: Path | None = None) -> dict:
    """What the result of a run depends on: its config as {"A.B.C": value}, and hashes of a
    checkpoint and of the files that the config names (of the data, the JSON files).

    Keys that the run does not read, and OUTPUT_DIR, are left out.
    """
    return _with_contents(keys_read(flat(cfg)), reads)


def task_of(cfg, teacher: Path | None = None) -> str:
    """Hash of what all runs of a comparison share: :func:`settings_of` without the method, its
    options and the seed, as far as they are not defaults.

    Args:
        cfg: config that distils.
        teacher: its teacher's checkpoint.
    """
    neutral = {"MODEL.META_ARCHITECTURE": "FgBgDistiller", "MODEL.KD.METHOD": ""}
    settings = _with_contents(keys_read({**flat(cfg), **neutral}), teacher)
    default = _defaults()
    told = {k: v for k, v in settings.items() if k not in COUNTED and default.get(k) != v}
    return sha256_of_text(json.dumps(told, sort_keys=True))[:10]


def _with_contents(settings: dict, reads: Path | None) -> dict:
    del settings["OUTPUT_DIR"]
    for key in _FILES:
        file = settings.get(key, "")
        if key == "MODEL.KD.TEACHER.CONFIG" and file:
            file = find_config(file)
        if os.path.isfile(file):
            settings[_CONTENT + key] = sha256_of(file)
    return json.loads(json.dumps(settings | _hash(reads)))  # tuples become lists, as in a file


def _defaults() -> dict:
    return json.loads(json.dumps(flat(get_fgbg_kd_cfg())))


def python_settings(config: Path, opts: list[str], reads: Path | None = None) -> dict:
    """:func:`settings_of` a run by a Python config: its overrides, and the hash of its file."""
    overrides = {key: value.strip("'") for key, _, value in (x.partition("=") for x in opts)}
    return {**overrides, "sha256 of the config": sha256_of(config), **_hash(reads)}


def _hash(reads: Path | None) -> dict:
    return {"sha256 of the checkpoint": sha256_of(reads)} if reads else {}


def keys_read(settings: dict) -> dict:
    """A config as {"A.B.C": value}, without MODEL.KD of a plain detector, and without the options
    of methods that are not used."""
    if settings.get("MODEL.META_ARCHITECTURE") != "FgBgDistiller":
        return {k: v for k, v in settings.items() if not k.startswith("MODEL.KD.")}
    method = settings.get("MODEL.KD.METHOD", "FgBg")  # runs of old have no key for it
    others = tuple(f"MODEL.KD.{name.upper()}." for name, _ in METHOD_REGISTRY if name != method)
    ours = [f"MODEL.KD.{key.upper()}" for key in FgBg.options()] if method != "FgBg" else []
    return {k: v for k, v in settings.items() if not k.startswith(others) and k not in ours}


def flat(node, prefix: str = "") -> dict:
    """A config as {"A.B.C": value}."""
    values = {}
    for key, value in node.items():
        values |= (
            flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        )
    return values


def changes(old: dict, new: dict) -> list[str]:
    """In words, how settings differ from those of an older run.

    What that run does not tell is no difference: keys at their default, hashes of files.
    """
    before = _BEFORE if new.get("MODEL.KD.GATE") != "off" else {}
    default = _defaults() | before | {_CONTENT + key: new.get(_CONTENT + key) for key in _FILES}
    return [
        f"{key} was {old.get(key, default.get(key))!r}, is {value!r}"
        for key, value in new.items()
        if old.get(key, default.get(key)) != value
    ]
