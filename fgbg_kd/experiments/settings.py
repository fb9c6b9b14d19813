"""The settings of a run: everything on which its result depends.

They are the config as {"A.B.C": value}, and the hashes of the files that the config names.
"""

import inspect
import json
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ..config import get_fgbg_kd_cfg
from ..data.unlabeled import digest_of_photos
from ..detectors.load import find_config, read_detector_config
from ..methods import METHOD_REGISTRY, get_method
from ..utils.files import sha256_of, sha256_of_text

# Keys that name a file. Its content is part of the settings.
_FILES = (
    "DATASETS.TRAIN_JSON",
    "DATASETS.TEST_JSON",
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.YOLO.CFG",
)
_CONTENT = "sha256 of "
_VERSION = "version of "
# A comparison sets these keys for each run.
RUN_KEYS = ("SEED", "OUTPUT_DIR", "TEST.EVAL_PERIOD")


def settings_of(cfg, checkpoint: Path | None = None) -> dict:
    """The settings of a run with a YAML config.

    Keys that the run does not read are left out, and OUTPUT_DIR too. The hashed files are: the
    checkpoint, the teacher's config, annotations (also of registered sets), other files that the
    config names, and the Python files of methods and detectors from outside this package. A method
    also has its version (:class:`fgbg_kd.methods.Method`).

    Args:
        cfg: the config of the run.
        checkpoint: another file that the run reads, such as the teacher's weights.
    """
    settings = keys_read(flat(cfg))
    name = settings.get("MODEL.KD.METHOD")
    version = {_VERSION + name: get_method(name).version} if name else {}
    return _with_contents(settings, checkpoint) | version


def task_of(cfg, teacher: Path | None = None) -> str:
    """A hash of the settings that all runs of a comparison share.

    The method, its options, the seed, and keys with their default values are left out.

    Args:
        cfg: a config that distils.
        teacher: the teacher's checkpoint.
    """
    neutral = {"MODEL.META_ARCHITECTURE": "FgBgDistiller", "MODEL.KD.METHOD": ""}
    settings = _with_contents(keys_read({**flat(cfg), **neutral}), teacher)
    shared = {k: v for k, v in _not_default(settings).items() if k not in RUN_KEYS}
    return sha256_of_text(json.dumps(shared, sort_keys=True))[:10]


def python_settings(config: Path, opts: list[str], checkpoint: Path | None = None) -> dict:
    """The settings of a run with a Python config: its overrides, and the hash of its file."""
    overrides = {key: value.strip("'") for key, _, value in (x.partition("=") for x in opts)}
    return {**overrides, "sha256 of the config": sha256_of(config), **_hash(checkpoint)}


def keys_read(settings: dict) -> dict:
    """The part of a config that a run reads.

    A plain detector does not read MODEL.KD. A method does not read the options of other methods.

    Args:
        settings: a config as {"A.B.C": value}.
    """
    if settings.get("MODEL.META_ARCHITECTURE") != "FgBgDistiller":
        return {k: v for k, v in settings.items() if not k.startswith("MODEL.KD.")}
    chosen = settings["MODEL.KD.METHOD"]
    others = tuple(f"MODEL.KD.{name.upper()}." for name, _ in METHOD_REGISTRY if name != chosen)
    return {k: v for k, v in settings.items() if not k.startswith(others)}


def flat(node, prefix: str = "") -> dict:
    """A config as {"A.B.C": value}."""
    values = {}
    for key, value in node.items():
        values |= (
            flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        )
    return values


def changes(old: dict, new: dict) -> list[str]:
    """The differences between the settings in a folder and the settings of a new run, as texts.

    The folder can be from a version of the package without a key. Then the value is the default. A
    method without a version has version 1. A file that no longer exists is not a difference.

    Args:
        old: the settings in the folder.
        new: the settings of the new run.
    """
    default = _defaults() | {key: 1 for key in (*old, *new) if key.startswith(_VERSION)}
    keys = [*new, *(k for k in old if k not in new and not k.startswith(_CONTENT))]

    pairs = {key: (old.get(key, default.get(key)), new.get(key, default.get(key))) for key in keys}
    return [f"{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if was != now]


def _with_contents(settings: dict, checkpoint: Path | None) -> dict:
    del settings["OUTPUT_DIR"]
    files = {key: settings.get(key, "") for key in _FILES}
    for part in ("TRAIN", "TEST"):
        for name in () if files[f"DATASETS.{part}_JSON"] else settings[f"DATASETS.{part}"]:
            files[name] = _annotations_of(name)
    for key, file in [*files.items(), *_outside_code(settings).items()]:
        if os.path.isfile(file):
            settings[_CONTENT + key] = sha256_of(file)
    if (
        settings.get("MODEL.META_ARCHITECTURE") == "FgBgDistiller"
        and settings["DATASETS.UNLABELED"]
    ):
        digest = digest_of_photos(settings["DATASETS.UNLABELED"])
        settings["digest of the photos without labels"] = digest
    if teacher := settings.get("MODEL.KD.TEACHER.CONFIG"):
        settings[_CONTENT + "the teacher's config"] = _config_hash(teacher)
    # Tuples become lists, as in settings.json.
    return json.loads(json.dumps(settings | _hash(checkpoint)))


def _annotations_of(name: str) -> str:
    """The JSON file of a set that is registered in Detectron2; "" if it is not known."""
    if name not in DatasetCatalog:
        return ""
    return getattr(MetadataCatalog.get(name), "json_file", "")


def _outside_code(settings: dict) -> dict[str, str]:
    """The Python files of the run's method and detector, if a user's module registered them."""
    used = {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
        "MODEL.KD.STUDENT": META_ARCH_REGISTRY,
        "MODEL.KD.METHOD": METHOD_REGISTRY,
    }
    files = {}
    for key, registry in used.items():
        if (name := settings.get(key)) in registry:
            registered = registry.get(name)
            if registered.__module__.split(".")[0] not in ("detectron2", "fgbg_kd"):
                files[f"the file of {name}"] = inspect.getsourcefile(registered)
    return files


def _config_hash(config: str) -> str:
    """Hash of the values in a teacher's config, including its _BASE_ files.

    Of a Python config, only the file itself is hashed.
    """
    if config.endswith(".py"):
        return sha256_of(find_config(config))
    settings = _not_default(flat(read_detector_config(config)))
    settings.pop("OUTPUT_DIR", None)
    return sha256_of_text(json.dumps(settings, sort_keys=True))


def _hash(checkpoint: Path | None) -> dict:
    return {"sha256 of the checkpoint": sha256_of(checkpoint)} if checkpoint else {}


def _not_default(settings: dict) -> dict:
    default = _defaults()
    return {k: v for k, v in json.loads(json.dumps(settings)).items() if default.get(k) != v}


def _defaults() -> dict:
    return json.loads(json.dumps(flat(get_fgbg_kd_cfg())))
