"""What the result of a run depends on: its config, and the contents of the files that it names."""

import json
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import get_fgbg_kd_cfg
from ..detectors.load import find_config, read_detector_config
from ..methods import METHOD_REGISTRY, FgBg
from ..utils.files import sha256_of, sha256_of_text

# Keys that name a file whose content is a part of a run's settings.
_FILES = ("DATASETS.TRAIN_JSON", "DATASETS.TEST_JSON", "MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS")
_CONTENT = "sha256 of "
# What a comparison sets itself, run by run.
COUNTED = ("SEED", "OUTPUT_DIR", "TEST.EVAL_PERIOD")


def settings_of(cfg, reads: Path | None = None) -> dict:
    """What the result of a run depends on: its config as {"A.B.C": value}, and hashes of a
    checkpoint, of the teacher's config and of the files that the config names (of the data, the
    JSON files, those of registered sets too).

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
    told = {k: v for k, v in _told(settings).items() if k not in COUNTED}
    return sha256_of_text(json.dumps(told, sort_keys=True))[:10]


def _with_contents(settings: dict, reads: Path | None) -> dict:
    del settings["OUTPUT_DIR"]
    files = {key: settings.get(key, "") for key in _FILES}
    for part in ("TRAIN", "TEST"):
        for name in () if files[f"DATASETS.{part}_JSON"] else settings[f"DATASETS.{part}"]:
            files[name] = _registered(name)
    for key, file in files.items():
        if os.path.isfile(file):
            settings[_CONTENT + key] = sha256_of(file)
    if teacher := settings.get("MODEL.KD.TEACHER.CONFIG"):
        settings[_CONTENT + "the teacher's config"] = _config_hash(teacher)
    return json.loads(json.dumps(settings | _hash(reads)))  # tuples become lists, as in a file


def _registered(name: str) -> str:
    """The JSON file of a set that is registered in Detectron2; "": none is known."""
    if name not in DatasetCatalog:
        return ""
    return getattr(MetadataCatalog.get(name), "json_file", "")


def _config_hash(config: str) -> str:
    """Of what a teacher's config says, its _BASE_ files included; of a Python config, its file."""
    if config.endswith(".py"):
        return sha256_of(find_config(config))
    told = _told(flat(read_detector_config(config)))
    told.pop("OUTPUT_DIR", None)
    return sha256_of_text(json.dumps(told, sort_keys=True))


def _told(settings: dict) -> dict:
    """Settings without those that are defaults."""
    default = _defaults()
    return {k: v for k, v in json.loads(json.dumps(settings)).items() if default.get(k) != v}


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


def options_before(gate: str | None) -> dict:
    """What ours did before there was an option for it, where that is not the option's default."""
    return {} if gate == "off" else {"gate_quality": "box"}


def changes(old: dict, new: dict) -> list[str]:
    """In words, how settings differ from those of an older run.

    What that run does not tell is no difference: keys at their default, hashes of files.
    """
    default = _defaults() | {k: v for k, v in new.items() if k.startswith(_CONTENT)}
    for key, value in options_before(new.get("MODEL.KD.GATE")).items():
        default[f"MODEL.KD.{key.upper()}"] = value
    return [
        f"{key} was {old.get(key, default.get(key))!r}, is {value!r}"
        for key, value in new.items()
        if old.get(key, default.get(key)) != value
    ]
