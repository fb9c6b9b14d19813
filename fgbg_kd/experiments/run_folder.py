"""Runs, read from their folders: configs, results, and the versions of the software."""

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
from ..utils.errors import DataError, RunError
from ..utils.files import read_json, read_rows
from .method_specs import PLAIN, TEACHER
from .settings import flat
from .tide import detections_of

DISTILLED = "distilled"
# Keys with these prefixes describe the student, its data and its training.
_RECIPE = ("MODEL.", "INPUT.", "SOLVER.", "DATASETS.TRAIN")
# A distilled run and its plain run differ in the first key. The others do not change the result.
_MAY_DIFFER = {
    "MODEL.META_ARCHITECTURE",
    "MODEL.DEVICE",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_MAX_TO_KEEP",
}


@dataclass(frozen=True, eq=False)
class Run:
    """A training, or an evaluation of a teacher by :class:`.runner.Runner`.

    Attributes:
        folder: its OUTPUT_DIR.
        group: its name without the seed. Runs of a group differ only in their seeds.
        role: "teacher", "plain" or "distilled".
        config: its YAML or Python config as {"A.B.C": value}.
        rows: the rows of metrics.json.
        result: COCO's metrics (0..100) by name. The AP of a class has the name "AP-CLASS". A metric
            that is not defined is left out. {} if the run was not evaluated after its last
            iteration.
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
        """Whether its config is a Python config."""
        return "MODEL.META_ARCHITECTURE" not in self.config

    @property
    def iterations(self) -> int:
        return self.config.get("SOLVER.MAX_ITER") or self.config.get("train.max_iter") or 0

    @property
    def task(self) -> tuple:
        """Test set and number of iterations. Only runs that share them can be compared by AP."""
        names = self.config.get("DATASETS.TEST") or self.config.get("dataloader.test.dataset.names")
        return str(names), self.config.get("DATASETS.TEST_JSON"), self.iterations

    def trained_as(self, other: "Run") -> bool:
        """Whether both runs have the same :attr:`task`, student, data and solver.

        Only keys that both configs have are compared. The model and the solver of a Python config
        are not compared.
        """
        a, b = self.config, other.config
        keys = a.keys() & b.keys() - _MAY_DIFFER
        recipe = [k for k in keys if k.startswith(_RECIPE) and not k.startswith("MODEL.KD.")]
        return self.task == other.task and all(a[k] == b[k] for k in recipe)

    @property
    def seed(self) -> int:
        return self.config.get("SEED", self.config.get("train.seed", -1))


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in the folders and their subfolders: teachers, plain runs, then distilled runs.

    Raises:
        RunError: a folder has no run, or a file of a run is damaged.
    """
    places: dict[Path, list[dict]] = {}
    for folder in folders:
        found = {
            p.parent: read_rows(p.parent / "metrics.json") for p in folder.rglob("config.yaml")
        }
        # An evaluation without training can have any weights. Only the Runner writes done.json.
        found = {p: x for p, x in found.items() if _trained(x) or (p / "done.json").is_file()}
        if not found:
            raise RunError(
                f"{folder} holds no run: name a folder with the config.yaml and the metrics.json "
                "of a training, or a folder that contains such folders."
            )
        places |= dict(sorted(found.items()))
    base = Path(os.path.commonpath([p.resolve().parent for p in places]))
    configs = {p: flat(read_config_file(p)) for p in places}
    weights = [_teacher_weights(c) for c in configs.values() if _distils(c)]
    teachers = {Path(w).resolve().parent for w in weights if w}
    runs = []
    for folder, config in configs.items():
        rows = _since_the_last_start(places[folder])
        if _distils(config):
            role = DISTILLED
        elif folder.resolve() in teachers or folder.name == TEACHER or not _trained(rows):
            role = TEACHER
        else:
            role = PLAIN
        name = str(folder.resolve().relative_to(base))
        group = re.sub(r"[/_-]?seed\d+$", "", name) or base.name
        run = Run(folder, group, role, config, rows, {})
        runs.append(replace(run, result=_result(run)))
    order = [TEACHER, PLAIN, DISTILLED]
    return sorted(runs, key=lambda r: (order.index(r.role), r.group, r.seed))


def _trained(rows: list[dict]) -> bool:
    return any("total_loss" in row for row in rows)


class _Data(yaml.SafeLoader):
    """Reads the config.yaml of a Python config: Python objects become None."""


_Data.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_config_file(folder: Path) -> dict:
    """Reads config.yaml of a run with a YAML or a Python config. No code in it is run.

    Raises:
        RunError: the file is damaged.
    """
    file = folder / "config.yaml"
    try:
        config = yaml.load(file.read_text(), Loader=_Data)
    except yaml.YAMLError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} is damaged: it holds no config.")
    return config


def last_rows(folder: Path) -> list[dict]:
    """The rows of the last run in metrics.json.

    Several runs in the same folder write to the same file. A new run begins where the iteration
    gets smaller.

    Raises:
        ValueError: a row is damaged.
    """
    return _since_the_last_start(read_rows(folder / "metrics.json"))


def _since_the_last_start(rows: list[dict]) -> list[dict]:
    starts = [i for i in range(1, len(rows)) if rows[i]["iteration"] < rows[i - 1]["iteration"]]
    return rows[starts[-1] :] if starts else rows


def _distils(config: dict) -> bool:
    name = config.get("MODEL.META_ARCHITECTURE") or config.get("model._target_") or ""
    return name.rpartition(".")[2] == "FgBgDistiller"


def _teacher_weights(config: dict) -> str | None:
    return config.get("MODEL.KD.TEACHER.WEIGHTS") or config.get("model.teacher.weights")


def _result(run: Run) -> dict[str, float]:
    """COCO's metrics after the last iteration, by name."""
    tested = [r for r in run.rows if "bbox/AP" in r and r["iteration"] >= run.iterations - 1]
    if tested:
        found = {k.removeprefix("bbox/"): v for k, v in tested[-1].items() if "bbox/" in k}
    else:
        found = _done(run.folder)
    found = {k: v for k, v in found.items() if k.startswith("AP")}
    return defined_metrics(found, detections_of(run.folder))


def defined_metrics(found: dict[str, float | None], detections: Path) -> dict[str, float]:
    """The COCO metrics that are defined.

    In two cases, Detectron2 gives an AP that is not a number. If nothing was detected, AP, AP50 and
    AP75 are set to 0. If there are detections, but no box of the test set counts, there is no AP.

    Args:
        found: metrics by name.
        detections: path of the file with the run's detections.
    """
    values = {k: v for k, v in found.items() if v is not None and not math.isnan(v)}
    if "AP" in found and "AP" not in values and detections.is_file() and not read_json(detections):
        values |= dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    return values


def _done(folder: Path) -> dict:
    """The result that :class:`.runner.Runner` wrote to done.json; {} if there is no such file."""
    file = folder / "done.json"
    return read_json(file) if file.is_file() else {}


def load_run(run: Run) -> tuple:
    """Reads the config of a run, its detector and its test images.

    Returns:
        The config, the detector in eval mode, and the images as Detectron2's dataset dicts.

    Raises:
        RunError, DataError, OSError: one of them cannot be read.
    """
    if run.is_python:
        raise RunError("its config is Python code, and the report does not run code.")
    weights = run.folder / "model_final.pth"
    if not weights.is_file() and not _trained(run.rows):
        weights = run.config["MODEL.WEIGHTS"]  # an evaluation, with the weights of another run
    if not os.path.isfile(weights):
        raise RunError(f"its checkpoint {str(weights)!r} does not exist.")
    cfg = read_config(str(run.folder / "config.yaml"))
    register_datasets(cfg, training=False)
    if len(cfg.DATASETS.TEST) != 1:
        raise DataError(f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} sets, not exactly one.")
    (name,) = cfg.DATASETS.TEST
    images = DatasetCatalog.get(name) if name in DatasetCatalog.list() else []
    if not images:
        raise DataError(f"its test set {name!r} is empty, or not registered here.")
    return cfg, load_detector(cfg, str(weights)), images


def versions(folder: Path) -> dict[str, str]:
    """The versions that Detectron2 logged at the start of a run, and the commit if it is known."""
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
