"""Runs as their folders tell of them: what they were, what came of them, by what versions."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from detectron2.data import DatasetCatalog

from ..data import register_datasets
from ..detectors.load import load_detector
from ..engine import read_config
from ..utils.files import read_json, read_rows
from .settings import flat
from .tables import PLAIN, TEACHER
from .tide import detections_of

DISTILLED = "distilled"
# Keys that say what a run trains and how; those that a distilled run has beside its plain one, or
# that change no result.
_RECIPE = ("MODEL.", "INPUT.", "SOLVER.", "DATASETS.TRAIN")
_APART = {
    "MODEL.META_ARCHITECTURE",
    "MODEL.DEVICE",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A folder of a training, or of a teacher's evaluation by fgbg_kd.experiments.runner.

    Attributes:
        group: its name without the seed; runs of a group differ in nothing else.
        role: "teacher", "plain" or "distilled".
        config: {"A.B.C": value}, of a YAML or a Python config.
        rows: of metrics.json.
        result: COCO metrics by name, those by class as "AP-name", where they are defined; {} if it
            was not evaluated at its end.
    """

    folder: Path
    group: str
    role: str
    config: dict[str, Any]
    rows: list[dict]
    result: dict[str, float]

    @property
    def detections(self) -> Path:
        return detections_of(self.folder)

    @property
    def is_python(self) -> bool:
        """Whether its config is a Python one."""
        return "MODEL.META_ARCHITECTURE" not in self.config

    @property
    def iterations(self) -> int:
        return self.config.get("SOLVER.MAX_ITER") or self.config.get("train.max_iter") or 0

    @property
    def task(self) -> tuple:
        """What runs must have in common for their AP to be compared: test set and iterations."""
        names = self.config.get("DATASETS.TEST") or self.config.get("dataloader.test.dataset.names")
        return str(names), self.config.get("DATASETS.TEST_JSON"), self.iterations

    def trained_as(self, other: "Run") -> bool:
        """Whether both have the same :attr:`task`, student, data and solver, as far as both configs
        say (a Python config's model and its solver are not compared)."""
        a, b = self.config, other.config
        keys = a.keys() & b.keys() - _APART
        told = [k for k in keys if k.startswith(_RECIPE) and not k.startswith("MODEL.KD.")]
        return self.task == other.task and all(a[k] == b[k] for k in told)

    @property
    def seed(self) -> int:
        return self.config.get("SEED", self.config.get("train.seed", -1))


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in and below the folders: teachers first, then plain runs, then distilled ones.

    Raises:
        ValueError: a folder without any, or a damaged file.
    """
    places: dict[Path, list[dict]] = {}
    for folder in folders:
        found = {
            p.parent: read_rows(p.parent / "metrics.json") for p in folder.rglob("config.yaml")
        }
        # An evaluation alone is no run, for it may be of any weights; by fgbg_kd.experiments.runner, a teacher's.
        found = {p: x for p, x in found.items() if _trained(x) or (p / "done.json").is_file()}
        if not found:
            raise ValueError(
                f"{folder} holds no run: no config.yaml with a training's metrics.json beside it."
            )
        places |= dict(sorted(found.items()))
    base = Path(os.path.commonpath([p.resolve().parent for p in places]))
    configs = {p: flat(read_record(p)) for p in places}
    weights = [_teacher_weights(c) for c in configs.values() if _distils(c)]
    teachers = {Path(w).resolve().parent for w in weights if w}
    runs = []
    for folder, config in configs.items():
        rows = _of_the_last_run(places[folder])
        if _distils(config):
            role = DISTILLED
        elif folder.resolve() in teachers or folder.name == TEACHER or not _trained(rows):
            role = TEACHER
        else:
            role = PLAIN
        name = str(folder.resolve().relative_to(base))
        group = re.sub(r"[/_-]?seed\d+$", "", name) or name
        run = Run(folder, group, role, config, rows, {})
        runs.append(replace(run, result=_result(run)))
    order = [TEACHER, PLAIN, DISTILLED]
    return sorted(runs, key=lambda r: (order.index(r.role), r.group, r.seed))


def _trained(rows: list[dict]) -> bool:
    return any("total_loss" in row for row in rows)


class _Data(yaml.SafeLoader):
    """Leaves out the Python objects in the record of a Python config."""


_Data.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_record(folder: Path) -> dict:
    """A run's config.yaml, of whichever kind its config was; nothing in it is run.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / "config.yaml"
    try:
        record = yaml.load(file.read_text(), Loader=_Data)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it holds no config.")
    return record


def last_rows(folder: Path) -> list[dict]:
    """Rows of the last run that wrote to a folder's metrics.json, in which a new one begins anew.

    Raises:
        ValueError: a row is damaged.
    """
    return _of_the_last_run(read_rows(folder / "metrics.json"))


def _of_the_last_run(rows: list[dict]) -> list[dict]:
    starts = [i for i in range(1, len(rows)) if rows[i]["iteration"] < rows[i - 1]["iteration"]]
    return rows[starts[-1] :] if starts else rows


def _distils(config: dict) -> bool:
    name = config.get("MODEL.META_ARCHITECTURE") or config.get("model._target_") or ""
    return name.rpartition(".")[2] == "FgBgDistiller"


def _teacher_weights(config: dict) -> str | None:
    return config.get("MODEL.KD.TEACHER.WEIGHTS") or config.get("model.teacher.weights")


def _result(run: Run) -> dict[str, float]:
    """The metrics after the last iteration, by name."""
    tested = [r for r in run.rows if "bbox/AP" in r and r["iteration"] >= run.iterations - 1]
    if tested:
        found = {k.removeprefix("bbox/"): v for k, v in tested[-1].items() if "bbox/" in k}
    else:
        found = _done(run.folder)
    return {
        k: v
        for k, v in found.items()
        if k.startswith("AP") and isinstance(v, int | float) and not math.isnan(v)
    }


def _done(folder: Path) -> dict:
    """What fgbg_kd.experiments.runner kept of a run that it finished; {} of any other."""
    file = folder / "done.json"
    return read_json(file) if file.is_file() else {}


def load_run(run: Run) -> tuple:
    """Config, detector (in eval mode) and records of the test images of a run.

    Raises:
        ValueError, OSError: why they cannot be had.
    """
    if run.is_python:
        raise ValueError("it is of a Python config, which is a program and is not run for this.")
    weights = run.folder / "model_final.pth"
    if not weights.is_file() and not _trained(run.rows):
        weights = run.config["MODEL.WEIGHTS"]  # an evaluation of another's weights
    if not os.path.isfile(weights):
        raise ValueError(f"its checkpoint {str(weights)!r} is not here.")
    cfg = read_config(str(run.folder / "config.yaml"))
    cfg.DATASETS.TRAIN_JSON = ""  # only the test set is looked at
    register_datasets(cfg)
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} sets, not one.")
    (name,) = cfg.DATASETS.TEST
    records = DatasetCatalog.get(name) if name in DatasetCatalog.list() else []
    if not records:
        raise ValueError(f"its test set {name!r} is empty, or not registered here.")
    return cfg, load_detector(cfg, str(weights)), records


def versions(folder: Path) -> dict[str, str]:
    """What Detectron2 logged about versions, and the commit, where it was kept."""
    found = {}
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    bars = [i for i, line in enumerate(lines) if re.fullmatch(r"-{5,} +-{5,}", line)]
    for line in lines[bars[0] + 1 : bars[1]] if len(bars) > 1 else []:
        name, _, value = line.partition("  ")
        found[name] = re.sub(r" @\S+", "", value.strip())  # no paths
    if done := _done(folder):
        found["commit"] = done.get("commit", "–")
    return found
