"""A page of HTML about finished runs: tables, curves, pictures, configuration; all in one file."""

import base64
import contextlib
import datetime
import io
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jinja2
import matplotlib
import numpy as np
import torch
import yaml
from detectron2.data import DatasetCatalog
from markupsafe import Markup
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .analysis import cost, draw_side_by_side, load_detector, read_input
from .comparison import paired
from .engine import load_config
from .errors import KINDS, detection_errors
from .methods import METHOD_REGISTRY, FgBg
from .runs import METRICS, flat

logger = logging.getLogger(__name__)

TEACHER, PLAIN, DISTILLED = "teacher", "plain", "distilled"
_COLORS = {TEACHER: ["#555555", "#999999"], PLAIN: ["#0072B2", "#56B4E9"]}
_DISTILLED_COLORS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8C564B", "#7F6BB3"]
_SCORE = 0.3  # detections under it are neither counted nor drawn
_POINTS = 400  # of a curve at most: neighbours are averaged


class Run(NamedTuple):
    """A folder of a finished training or evaluation.

    Attributes:
        group: its name without the seed; runs of a group differ in nothing else.
        role: "teacher", "plain" or "distilled".
        config: {"A.B.C": value}; {} of a Python config, which only running it could read.
        rows: of metrics.json.
        result: COCO metrics by name, those by class as "AP-name"; {} if it was not evaluated.
    """

    folder: Path
    group: str
    role: str
    config: dict[str, Any]
    rows: list[dict]
    result: dict[str, float]

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    @property
    def seed(self) -> int:
        return self.config.get("SEED", -1)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in and below the folders: teachers first, then plain runs, then distilled ones.

    Raises:
        ValueError: a folder without any.
    """
    places = []
    for folder in folders:
        found = sorted(p.parent for p in folder.rglob("config.yaml") if _has_run(p.parent))
        if not found:
            raise ValueError(f"{folder} holds no run: no config.yaml with a metrics.json or log.")
        places += [p for p in found if p not in places]
    base = Path(os.path.commonpath(p.resolve().parent for p in places))
    configs = {p: _config(p) for p in places}
    teachers = {
        str(Path(c["MODEL.KD.TEACHER.WEIGHTS"]).resolve().parent)
        for c in configs.values()
        if c.get("MODEL.META_ARCHITECTURE") == "FgBgDistiller"
    }
    runs = []
    for folder, config in configs.items():
        role = PLAIN
        if config.get("MODEL.META_ARCHITECTURE") == "FgBgDistiller":
            role = DISTILLED
        elif str(folder.resolve()) in teachers or folder.name == TEACHER:
            role = TEACHER
        name = str(folder.resolve().relative_to(base))
        group = re.sub(r"[/_-]?seed\d+$", "", name) or name
        rows = _rows(folder / "metrics.json")
        runs.append(Run(folder, group, role, config, rows, _result(folder, rows)))
    order = [TEACHER, PLAIN, DISTILLED]
    return sorted(runs, key=lambda r: (order.index(r.role), r.group, r.seed))


def _has_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.json", "done.json", "log.txt"))


def _config(folder: Path) -> dict:
    try:
        return flat(yaml.safe_load((folder / "config.yaml").read_text()))
    except yaml.YAMLError:  # of a Python config, with objects in it
        return {}


def _rows(file: Path) -> list[dict]:
    return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []


def _result(folder: Path, rows: list[dict]) -> dict[str, float]:
    tested = [r for r in rows if "bbox/AP" in r]
    if tested:
        found = {k.removeprefix("bbox/"): v for k, v in tested[-1].items() if "bbox/" in k}
    elif (folder / "done.json").is_file():
        found = json.loads((folder / "done.json").read_text())
    else:
        found = {}
    return {k: v for k, v in found.items() if k.startswith("AP") and isinstance(v, int | float)}


def write_report(folders: Sequence[Path], output: Path, say: Callable[[str], None]) -> None:
    """Reads the runs, measures what they do not hold, and writes the page.

    Args:
        say: is told what is being done.

    Raises:
        ValueError: no runs.
    """
    runs = find_runs(folders)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    colors = _colors(groups)
    plain = next((g for g, members in groups.items() if members[0].role == PLAIN), None)
    environment = {name: _environment(members[0].folder) for name, members in groups.items()}
    pictures, pictures_note = _pictures(groups, plain, say)
    page = _template().render(
        title=f"Runs of {Path(folders[0]).resolve().name}",
        subtitle=f"{len(runs)} runs: {', '.join(f'{len(m)} {g}' for g, m in groups.items())}",
        colors=colors,
        plain=plain,
        gains=_gains(groups, plain),
        results=_results(groups, say),
        classes=_classes(groups, colors),
        errors=_errors(groups, say),
        curves=_curves(runs, colors),
        pictures=pictures,
        pictures_note=pictures_note,
        differences=_differences({g: m[0].config for g, m in groups.items()}),
        configs={g: (m[0].folder / "config.yaml").read_text() for g, m in groups.items()},
        versions=_side_by_side(environment),
        date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        sources=", ".join(map(str, folders)),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)


def _template() -> jinja2.Template:
    text = Path(__file__).with_name("report.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text)


def _colors(groups: dict[str, list[Run]]) -> dict[str, str]:
    palettes = {**_COLORS, DISTILLED: _DISTILLED_COLORS}
    colors, used = {}, dict.fromkeys(palettes, 0)
    for name, members in groups.items():
        palette = palettes[members[0].role]
        colors[name] = palette[used[members[0].role] % len(palette)]
        used[members[0].role] += 1
    return colors


# --- numbers ---


def _gains(groups, plain: str | None) -> list[tuple[str, str, str]]:
    """Of each distilled group: its name, mean paired gain over the plain one, and of what."""
    aps = {g: {r.seed: r.result["AP"] for r in m if "AP" in r.result} for g, m in groups.items()}
    gains = []
    for name, members in groups.items():
        gain = members[0].role == DISTILLED and plain and paired(aps[name], aps[plain])
        if gain:
            mean, half = gain
            count = len(aps[name].keys() & aps[plain].keys())
            text = f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else "")
            seeds = (
                "one seed" if count == 1 else f"{count} seeds (95 % interval of the mean, paired)"
            )
            gains.append((name, text, seeds))
    return gains


def _mean(members: list[Run], key: str) -> float | None:
    values = [r.result[key] for r in members if _known(r.result.get(key))]
    return statistics.fmean(values) if values else None


def _known(value) -> bool:
    return value is not None and not math.isnan(value)


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _results(groups, say) -> dict:
    costs = {}
    for name, members in groups.items():
        say(f"{name}: parameters, GFLOPs, latency")
        costs[name] = _cost(members[0])
    rows = {}
    for name, members in groups.items():
        aps = [r.result["AP"] for r in members if _known(r.result.get("AP"))]
        seeds = ", ".join(f"{v:.1f}" for v in aps) if len(aps) > 1 else "–"
        cells = [_number(_mean(members, METRICS[0]), 2), seeds]
        cells += [_number(_mean(members, m)) for m in METRICS[1:]]
        for key, digits in (("parameters_m", 3), ("gflops", 3), ("ms_per_image", 1)):
            cells.append(_number(costs[name].get(key), digits))
        rows[name] = cells
    columns = ["", "AP", "each seed", *METRICS[1:], "parameters (M)", "GFLOPs", "ms / image"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    note = (
        "COCO AP (0 to 100) after the last iteration, means over seeds. GFLOPs of backbone and "
        "head, one multiply-add counted once. ms: median time of one image, measured now "
        f"({device}, {torch.get_num_threads()} threads)."
    )
    return {"columns": columns, "rows": rows, "note": note}


def _load(run: Run):
    """Config and detector of a run; None where its checkpoint or its data are not there."""
    weights = run.folder / "model_final.pth"
    if not any("total_loss" in row for row in run.rows):  # an evaluation of another's weights
        weights = weights if weights.is_file() else Path(run.config.get("MODEL.WEIGHTS", ""))
    if not weights.is_file() or not run.config:
        return None
    try:
        cfg = load_config(str(run.folder / "config.yaml"))
        return cfg, load_detector(cfg, str(weights))
    except ValueError as error:
        logger.warning(f"{run.folder}: no cost and no pictures: {error}")
        return None


def _cost(run: Run) -> dict[str, float]:
    loaded = _load(run)
    if loaded is None:
        return {}
    cfg, model = loaded
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    return cost(model, read_input(cfg, record["file_name"]))


def _classes(groups, colors) -> dict | None:
    names = sorted({k for m in groups.values() for r in m for k in r.result if k.startswith("AP-")})
    if not names:
        return None
    means = {g: [_mean(members, k) for k in names] for g, members in groups.items()}
    rows = {
        name.removeprefix("AP-"): [_number(means[g][i]) for g in groups]
        for i, name in enumerate(names)
    }
    figure = None
    if len(names) <= 30:
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        axes, width = figure.subplots(), 0.8 / len(groups)
        for i, (group, values) in enumerate(means.items()):
            x = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * width
            axes.bar(x, [v or 0 for v in values], width, color=colors[group], label=group)
        axes.set_xticks(range(len(names)), rows, rotation=30 if len(names) > 12 else 0)
        axes.set_ylabel("AP")
        axes.legend(frameon=False, ncols=len(groups), fontsize=9)
        figure = _svg(figure, "AP by class")
    return {
        "title": "AP by class",
        "figure": figure,
        "columns": ["class", *groups],
        "rows": rows,
        "note": "Means over seeds.",
    }


_ABOUT_ERRORS = (
    "TIDE (Bolya et al., 2020): points of AP50 that mending all errors of a kind would bring, "
    "means over seeds. Class, place, both, duplicates, background taken for an object, "
    "objects missed; then all false positives and all false negatives."
)


def _errors(groups, say) -> dict:
    section = {"title": "Kinds of errors", "figure": None, "columns": ["", *KINDS], "rows": {}}
    for name, members in groups.items():
        found = []
        for run in members:
            truth = Path(run.config.get("DATASETS.TEST_JSON") or "")
            if run.detections.is_file() and truth.is_file():
                say(f"{name}: kinds of errors")
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        found.append(detection_errors(truth, run.detections))
                except ValueError as error:  # tidecv is not there
                    return {**section, "note": error}
        if found:
            section["rows"][name] = [_number(statistics.fmean(f[k] for f in found)) for k in KINDS]
    absent = "No detections, or no annotations for them, beside these runs."
    return {**section, "note": _ABOUT_ERRORS if section["rows"] else absent}


# --- curves ---


def _curves(runs: list[Run], colors) -> dict[str, Markup]:
    keys = {k for r in runs for row in r.rows for k in row}
    sections = {
        "Losses": sorted(k for k in keys if k.startswith("loss") or k == "total_loss"),
        "Gate: share of cells where the teacher guides": sorted(k for k in keys if "_gate" in k),
        "AP over iterations": [k for k in ("bbox/AP", "bbox/AP50", "bbox/AP75") if k in keys],
    }
    return {name: _plot(runs, of, colors, name) for name, of in sections.items() if of}


def _plot(runs: list[Run], keys: list[str], colors, title: str) -> Markup:
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    lines = {}
    for ax, key in zip(axes, keys):
        for run in runs:
            points = [(r["iteration"], r[key]) for r in run.rows if key in r]
            if points:
                few = "o" if len(points) < 3 else ""
                (line,) = ax.plot(
                    *_thinned(points).T, color=colors[run.group], linewidth=1, marker=few, alpha=0.8
                )
                lines.setdefault(run.group, line)
        ax.set_title(key, fontsize=10)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0, top=1 if "_gate" in key else None)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    names = list(lines)
    figure.legend(
        lines.values(), names, loc="outside upper center", ncols=min(5, len(names)), frameon=False
    )
    return _svg(figure, title)


def _thinned(points) -> np.ndarray:
    """(M, 2), M at most _POINTS, by means of neighbours."""
    values = np.array(points, dtype=float)
    parts = np.array_split(values, min(len(values), _POINTS))
    return np.stack([part.mean(0) for part in parts])


def _svg(figure: Figure, title: str) -> Markup:
    """Inline SVG whose text is text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


# --- pictures ---


def image_scores(truth: Path, detections: Path) -> dict[int, float]:
    """F1 of each image: detections of a score of 0.3 and more against objects, IoU over 0.5.

    An image without objects has 1 if nothing is found in it, else 0.
    """
    found = [d for d in json.loads(detections.read_text()) if d["score"] >= _SCORE]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(found) if found else COCO(), "bbox")
        parameters = evaluation.params
        parameters.imgIds, parameters.catIds = sorted(coco.imgs), sorted(coco.cats)
        parameters.iouThrs, parameters.maxDets = np.array([0.5]), [100]
        parameters.areaRng, parameters.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    counts = {image: np.zeros(3) for image in coco.imgs}  # matched, wrong, objects
    for one in filter(None, evaluation.evalImgs):
        matched, counted = one["dtMatches"][0] > 0, ~one["dtIgnore"][0].astype(bool)
        objects = sum(1 for ignored in one["gtIgnore"] if not ignored)
        counts[one["image_id"]] += [(matched & counted).sum(), (~matched & counted).sum(), objects]
    return {
        image: float(2 * right / (right + wrong + objects)) if wrong + objects else 1.0
        for image, (right, wrong, objects) in counts.items()
    }


def _pictures(groups, plain: str | None, say, count: int = 3):
    """Drawn, by title and caption: the images that gained and lost most, from the plain run to the
    first of the best distilled group, of one seed; and a note."""
    ways = [members for members in groups.values() if members[0].role == DISTILLED]
    distilled = max(ways, key=lambda m: _mean(m, "AP") or 0)[0] if ways else None
    if plain is None or distilled is None:
        return {}, "No pictures: they need a plain and a distilled run."
    before = next((r for r in groups[plain] if r.seed == distilled.seed), groups[plain][0])
    teacher = next((m[0] for m in groups.values() if m[0].role == TEACHER), None)
    truth = Path(distilled.config.get("DATASETS.TEST_JSON") or "")
    pair = before, distilled
    if not truth.is_file() or not all(r.detections.is_file() for r in pair):
        return (
            {},
            "No pictures: the detections or the annotations of the test set are not here.",
        )
    say("looking for the largest gains and losses")
    old, new = (image_scores(truth, r.detections) for r in pair)
    gain = {image: new[image] - old[image] for image in old}
    order = sorted(gain, key=lambda image: (-gain[image], image))
    chosen = {
        "Images that gained most": [i for i in order[:count] if gain[i] > 0],
        "Images that lost most": [i for i in order[::-1][:count] if gain[i] < 0],
    }
    loaded = {r.group: _load(r) for r in (teacher, before, distilled) if r is not None}
    models = {name: parts[1] for name, parts in loaded.items() if parts}
    if distilled.group not in models:
        return {}, "No pictures: the checkpoint or the data of the distilled run is not here."
    cfg = loaded[distilled.group][0]
    records = {r["image_id"]: r for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
    pictures = {}
    for title, images in chosen.items():
        pictures[title] = {}
        for image in images:
            say(f"{title.lower()}: image {image}")
            picture = draw_side_by_side(cfg, records[image], models, _SCORE, width=270)
            name = Path(records[image]["file_name"]).name
            caption = f"{name}: F1 {old[image]:.2f} to {new[image]:.2f} ({gain[image]:+.2f})"
            pictures[title][caption] = _jpeg(picture)
    better, worse = (sum(1 for g in gain.values() if g * sign > 0) for sign in (1, -1))
    note = (
        f"{distilled.group} against {before.group}, seed {distilled.seed}: better on {better}, "
        f"worse on {worse} of {len(gain)} images. F1 of detections of a score of {_SCORE} and more "
        "(those drawn), IoU over 0.5."
    )
    return pictures, note


def _jpeg(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return base64.b64encode(data).decode()


# --- configuration and versions ---


def _differences(configs: dict[str, dict]) -> dict:
    """Keys that are read in some of the configs and whose values are not the same in all."""
    table = _side_by_side({name: _read_keys(config) for name, config in configs.items()})
    unlike = {k: v for k, v in table["rows"].items() if len(set(v)) > 1}
    for key in ("OUTPUT_DIR", "SEED"):
        unlike.pop(key, None)
    return {**table, "rows": unlike}


def _read_keys(config: dict) -> dict:
    """Without MODEL.KD of a plain run, and without the options of methods that are not used."""
    if config.get("MODEL.META_ARCHITECTURE") != "FgBgDistiller":
        return {k: v for k, v in config.items() if not k.startswith("MODEL.KD.")}
    method = config.get("MODEL.KD.METHOD", "FgBg")
    others = [f"MODEL.KD.{name.upper()}." for name, _ in METHOD_REGISTRY if name != method]
    own = [f"MODEL.KD.{key.upper()}" for key in FgBg.options()] if method != "FgBg" else []
    return {k: v for k, v in config.items() if not k.startswith(tuple(others)) and k not in own}


def _side_by_side(values: dict[str, dict]) -> dict:
    keys = dict.fromkeys(k for v in values.values() for k in v)
    rows = {k: [str(v.get(k, "–")) for v in values.values()] for k in keys}
    return {"columns": ["", *values], "rows": rows}


def _environment(folder: Path) -> dict[str, str]:
    """What Detectron2 logged about versions, and the commit, where it was kept."""
    found = {}
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    bars = [i for i, line in enumerate(lines) if re.fullmatch(r"-{5,} +-{5,}", line)]
    for line in lines[bars[0] + 1 : bars[1]] if len(bars) > 1 else []:
        name, _, value = line.partition("  ")
        found[name] = re.sub(r" @\S+", "", value.strip())  # no paths
    done = folder / "done.json"
    if done.is_file():
        found["commit"] = json.loads(done.read_text()).get("commit", "–")
    return found
